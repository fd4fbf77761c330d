"""Affinity sums and loss equal the reference's, values and gradients, on both paths."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.launches import launches
from fsr_fast import reference
from fsr_fast.kernels import affinity, affinity_sums
from fsr_fast.kernels.affinity import affinity_sums_backward_op, affinity_sums_op
from fsr_fast.method.losses import affinity_loss
from tests.kernels.helpers import assert_close, assert_low_precision, compile_backend, gradients, leaf, permuted

SHAPES = [(2, 25, 40), (1, 150, 70), (3, 49, 300)]  # B, N, D: one tile; several, cut; several blocks of columns


def case(B: int, N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(B, N, D, generator=generator) + 0.2).to(dtype)
    labels = torch.randint(0, 4, (B, N), generator=generator)
    return features, torch.where(labels == 3, 255, labels)


def sums_and_gradient(function: Any, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    features = leaf(features)
    sums = function(features, labels)
    return sums.detach().cpu(), gradients(sums, [features])[0].cpu()


def check_sums(features: Tensor, labels: Tensor, device: torch.device, relative: float | None = None) -> None:
    expected = sums_and_gradient(reference.affinity_sums, features.double(), labels)
    actual = sums_and_gradient(affinity_sums, features.to(device), labels.to(device))
    assert actual[0].dtype == torch.promote_types(features.dtype, torch.float32)
    for index, name in enumerate(("same_sum", "same_count", "different_sum", "different_count")):
        assert_close(actual[0][index], expected[0][index], relative, label=name)
    assert_close(actual[1], expected[1], relative, label="gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_agrees_with_the_reference(shape: tuple[int, int, int], triton_device: torch.device) -> None:
    check_sums(*case(*shape), triton_device, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_errs_little_in_low_precision(dtype: torch.dtype, triton_device: torch.device) -> None:
    features, labels = case(2, 70, 72, dtype)
    truth = sums_and_gradient(reference.affinity_loss, features.double(), labels)
    low = sums_and_gradient(reference.affinity_loss, features, labels)
    actual = sums_and_gradient(affinity_loss, features.to(triton_device), labels.to(triton_device))
    assert_low_precision(actual[0], low[0], truth[0], atol=1e-6, label="loss")
    assert_low_precision(actual[1], low[1], truth[1], atol=1e-6, label="gradient")


def test_kernels_follow_autocast(triton_device: torch.device) -> None:
    features, labels = (value.to(triton_device) for value in case(2, 25, 40))
    expected = sums_and_gradient(affinity_sums, features.bfloat16(), labels)
    with torch.autocast(triton_device.type, dtype=torch.bfloat16):
        sums, gradient = sums_and_gradient(affinity_sums, features, labels)
    assert torch.equal(sums, expected[0])
    assert torch.equal(gradient, expected[1].float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_agrees_with_the_reference_at_full_size(dtype: torch.dtype) -> None:
    features, labels = case(2, 784, 768, dtype)
    check_sums(features, labels, torch.device("cuda"), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_torch_path_agrees_with_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, relative: float, torch_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "BAND", 16)  # several bands an image
    check_sums(*case(*shape, dtype), torch.device("cpu"), relative)


def test_torch_path_passes_gradcheck(torch_path: None) -> None:
    features, labels = case(2, 7, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda f: affinity_sums(f, labels)[::2], (leaf(features),))


def test_loss_and_gradient_equal_the_reference(triton_device: torch.device) -> None:
    features, labels = case(2, 25, 40)
    expected = sums_and_gradient(reference.affinity_loss, features.double(), labels)
    actual = sums_and_gradient(affinity_loss, features.to(triton_device), labels.to(triton_device))
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pair_at_a_right_angle_has_no_gradient(dtype: torch.dtype, triton_device: torch.device) -> None:
    features = torch.eye(16, dtype=dtype, device=triton_device)[None, :5]
    labels = torch.tensor([[0, 0, 1, 2, 255]], device=triton_device)
    sums, gradient = sums_and_gradient(affinity_sums, features, labels)
    assert sums.tolist() == [0, 2, 0, 10]
    assert not gradient.any()


def test_zero_vector_keeps_the_gradient_finite(triton_device: torch.device) -> None:
    features, labels = case(2, 25, 40)
    features[0, :3] = 0
    labels[0, :3] = 1
    check_sums(features, labels, triton_device, 1e-5)


def test_vector_below_eps_is_scaled_and_not_normalised(triton_device: torch.device) -> None:
    features, labels = case(1, 25, 40)
    features[0, 1] *= 1e-11
    labels[0, 1] = 1
    check_sums(features, labels, triton_device, 1e-5)


def test_nothing_known_gives_zero_sums_and_no_gradient(triton_device: torch.device) -> None:
    features, labels = case(2, 25, 40)
    unknown = torch.full_like(labels, 255).to(triton_device)
    sums, gradient = sums_and_gradient(affinity_sums, features.to(triton_device), unknown)
    assert sums.tolist() == [0, 0, 0, 0]
    assert not gradient.any()
    assert affinity_loss(features.to(triton_device), unknown).item() == 0.5


def test_single_class_has_no_different_pair(triton_device: torch.device) -> None:
    features, labels = case(1, 70, 40)
    sums = affinity_sums(features.to(triton_device), torch.ones_like(labels).to(triton_device)).cpu()
    assert sums[1:].tolist() == [70 * 69, 0, 0]


def test_ignored_patch_has_no_influence(triton_device: torch.device) -> None:
    features, labels = case(2, 25, 40)
    labels = torch.where(labels == 255, -7, labels)  # another mark than the default
    altered = torch.where((labels == -7)[:, :, None], 1e3, features)
    moved = labels.to(triton_device)
    sums = affinity_sums(features.to(triton_device), moved, ignore_index=-7)
    assert torch.equal(affinity_sums(altered.to(triton_device), moved, ignore_index=-7), sums)
    _, gradient = sums_and_gradient(
        lambda *inputs: affinity_sums(*inputs, ignore_index=-7), features.to(triton_device), moved
    )
    assert not gradient[labels == -7].any()
    assert gradient[labels != -7].any(1).all()


def check_operators(device: torch.device) -> None:
    features, labels = (permuted(value.to(device)) for value in case(2, 20, 24))
    torch.library.opcheck(affinity_sums_op, (features, labels, 255, False))
    torch.library.opcheck(affinity_sums_op, (features.requires_grad_(), labels, 255, True))
    _, *found = affinity_sums_op(features.detach(), labels, 255, True)
    gradient = torch.ones((), device=device).expand(4)
    torch.library.opcheck(affinity_sums_backward_op, (gradient, features.detach(), labels, *found))


def test_operators_pass_opcheck_on_permuted_layouts(triton_device: torch.device) -> None:
    check_operators(triton_device)


def test_torch_path_passes_opcheck(torch_path: None) -> None:
    check_operators(torch.device("cpu"))


def test_compiles_as_one_graph(triton_device: torch.device) -> None:
    features, labels = (value.to(triton_device) for value in case(2, 25, 40))
    compiled = torch.compile(affinity_loss, fullgraph=True, backend=compile_backend(triton_device))
    expected = sums_and_gradient(affinity_loss, features, labels)
    actual = sums_and_gradient(compiled, features, labels)
    assert_close(actual[0], expected[0], 1e-6)
    assert_close(actual[1], expected[1], 1e-6)


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int64), ValueError, r"features has shape \(2, 9\)"),
        (torch.zeros(2, 9, 4), torch.zeros(2, 8, dtype=torch.int64), ValueError, r"labels has shape \(2, 8\)"),
        (torch.zeros(2, 9, 4), torch.zeros(2, 9), TypeError, "labels is float32; expected int64"),
        (torch.zeros(2, 9, 4).long(), torch.zeros(2, 9).long(), TypeError, "features is int64"),
        (torch.zeros(2, 9, 4), torch.zeros(2, 9, device="meta").long(), ValueError, "labels is on meta"),
    ],
)
def test_wrong_argument_is_named_in_one_line(
    features: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        affinity_loss(features, labels)
    assert "\n" not in str(caught.value)


def test_kernel_refuses_double_precision(triton_device: torch.device) -> None:
    features, labels = case(1, 9, 4, torch.float64)
    with pytest.raises(TypeError, match="float64; expected float32"):
        affinity_sums(features.to(triton_device), labels.to(triton_device))


def test_the_backward_pass_is_one_launch(triton_device: torch.device) -> None:
    features, labels = (tensor.to(triton_device) for tensor in case(1, 9, 5))
    sums = affinity_sums(features.requires_grad_(), labels)
    gradient = torch.ones_like(sums)
    with launches() as backward:
        torch.autograd.grad(sums, [features], gradient)
    assert backward == ["backward_kernel"]
