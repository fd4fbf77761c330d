"""Dense energy and its official gradient against the reference, on the torch path and on the Triton kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fsr_fast import reference
from fsr_fast.kernels import dense_energy
from tests.kernels.helpers import assert_close, compile_backend, leaf, permuted
from tests.kernels.test_gaussian import tolerance

SHAPES = [(2, 3, 6, 7), (1, 1, 1, 9), (1, 81, 11, 1), (1, 21, 12, 13)]
KINDS = ["noise", "smooth", "constant"]


def draw(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    B, C, h, w = shape
    generator = torch.Generator().manual_seed(C)
    probabilities = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(dim=1)
    images = 255 * torch.rand(B, 3, h, w, generator=generator, dtype=torch.float64)
    if kind == "smooth":
        images = torch.linspace(40, 90, h * w, dtype=torch.float64).view(1, 1, h, w) + images / 20
    if kind == "constant":
        images = torch.full_like(images, 128)
    labels = torch.randint(0, 4, (B, h, w), generator=generator, dtype=torch.uint8)
    return probabilities.to(dtype), images.to(dtype), labels.masked_fill(labels == 3, 255)


def energy_and_gradient(function: Any, probabilities: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    scores = leaf(probabilities)
    energy = function(scores, *others, **options)
    return energy.detach(), torch.autograd.grad(3 * energy, scores)[0]


def check(arguments: tuple[Tensor, ...], device: torch.device, relative: float | None = None, **options: Any) -> None:
    truth = energy_and_gradient(reference.dense_energy, *(a.double() for a in arguments[:2]), arguments[2], **options)
    ours = energy_and_gradient(dense_energy, *(a.to(device) for a in arguments), **options)
    assert_close(ours[0].cpu(), truth[0], relative, "energy")
    assert_close(ours[1].cpu(), truth[1], relative, "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 27, 26)])
def test_torch_path_equals_the_reference(torch_path, shape, dtype, kind) -> None:
    check(draw(shape, kind, dtype), torch.device("cpu"), 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(triton_device, shape) -> None:
    for kind in KINDS:
        check(draw(shape, kind), triton_device, tolerance(triton_device))


def test_deviations_and_ignored_label_can_be_chosen(torch_path) -> None:
    options = {"sigma_rgb": 60.0, "sigma_xy": 3.0, "ignore_index": 1}
    check(draw((1, 3, 8, 9), "noise"), torch.device("cpu"), 1e-5, **options)


def test_labels_that_are_all_ignored_open_every_gate(torch_path) -> None:
    probabilities, images, labels = draw((2, 3, 6, 7), "smooth")
    labels = torch.full_like(labels, 255)
    check((probabilities, images, labels), torch.device("cpu"), 1e-5)
    opened = dense_energy(probabilities, images, labels)
    assert opened < dense_energy(probabilities, images, torch.zeros_like(labels)) < 0


def test_pixels_that_are_certain_and_labelled_cost_nothing(torch_path) -> None:
    probabilities, images, labels = draw((2, 3, 6, 7), "smooth")
    certain = torch.nn.functional.one_hot(probabilities.argmax(dim=1)).movedim(3, 1).float()
    energy, gradient = energy_and_gradient(dense_energy, certain, images, torch.zeros_like(labels))
    assert energy == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_summed_in_float32(torch_path, dtype) -> None:
    probabilities, images, labels = draw((1, 3, 6, 7), "smooth")
    energy, gradient = energy_and_gradient(dense_energy, probabilities.to(dtype), images.to(dtype), labels)
    arguments = (probabilities.to(dtype).float(), images.to(dtype).float(), labels)
    truth = energy_and_gradient(reference.dense_energy, *arguments)
    assert energy.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_close(energy, truth[0])
    assert_close(gradient.float(), truth[1], relative=torch.finfo(dtype).eps)


def test_images_may_be_bytes(torch_path) -> None:
    probabilities, images, labels = draw((1, 3, 4, 5), "noise")
    expected = dense_energy(probabilities, images.floor(), labels)
    assert torch.equal(dense_energy(probabilities, images.to(torch.uint8), labels), expected)


def test_any_layout_and_int64_labels_are_taken(triton_device) -> None:
    probabilities, images, labels = (a.to(triton_device) for a in draw((2, 3, 4, 5), "noise"))
    ours = dense_energy(permuted(probabilities), permuted(images), permuted(labels.long()))
    assert_close(ours, dense_energy(probabilities, images, labels))


def test_compiles_without_graph_breaks(triton_device) -> None:
    arguments = [a.to(triton_device) for a in draw((1, 3, 4, 5), "noise")]
    compiled = torch.compile(dense_energy, fullgraph=True, backend=compile_backend(triton_device))
    for ours, plain in zip(
        energy_and_gradient(compiled, *arguments), energy_and_gradient(dense_energy, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, plain)


BAD = [
    ({"probabilities": torch.rand(3, 4, 5)}, ValueError, r"probabilities has shape \(3, 4, 5\)"),
    ({"probabilities": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, TypeError, "probabilities is int64"),
    (
        {"images": torch.rand(1, 3, 8, 10)},
        ValueError,
        r"images \(1, 3, 8, 10\) must be \(B, 3, h, w\) = \(1, 3, 4, 5\)",
    ),
    ({"images": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, TypeError, "images is int64"),
    ({"labels": torch.zeros(1, 8, 10, dtype=torch.uint8)}, ValueError, r"labels \(1, 8, 10\)"),
    ({"labels": torch.zeros(1, 4, 5)}, TypeError, "labels is float32"),
    ({"sigma_rgb": 0.0}, ValueError, "sigma_rgb is 0.0"),
    ({"sigma_xy": -1.0}, ValueError, "sigma_xy is -1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change, error, message) -> None:
    arguments: dict[str, Any] = {
        "probabilities": torch.rand(1, 3, 4, 5),
        "images": torch.rand(1, 3, 4, 5),
        "labels": torch.zeros(1, 4, 5, dtype=torch.uint8),
    }
    with pytest.raises(error, match=message):
        dense_energy(**(arguments | change))
