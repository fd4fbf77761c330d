"""Segmentation loss: both paths against the reference, which resizes the logits to the label map."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.launches import launches
from fsr_fast.kernels import segmentation, segmentation_counts, segmentation_sum
from fsr_fast.kernels.segmentation import segmentation_counts_op, segmentation_loss_op
from fsr_fast.method.losses import segmentation_loss
from fsr_fast.reference import segmentation_loss as reference_loss
from fsr_fast.reference import segmentation_sums as reference_sums
from tests.kernels.helpers import (
    assert_close,
    assert_low_precision,
    compile_backend,
    gradients,
    leaf,
    permuted,
)

IGNORE = 255
WEIGHTS = (0.75, 2.5)  # of a background and of a foreground pixel
SHAPES = (  # B, C + 1, h, w, H, W
    pytest.param((1, 3, 2, 2, 7, 1), id="one pixel wide"),
    pytest.param((2, 21, 2, 1, 5, 13), id="not divisible"),
    pytest.param((1, 4, 3, 2, 2, 2), id="labels smaller than logits"),
    pytest.param((1, 81, 1, 2, 3, 7), id="80 classes"),
    pytest.param((1, 2, 1, 1, 2, 19), id="one logit"),
)


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits that require a gradient, and labels of every class and of none."""
    B, K, h, w, H, W = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(B, K, h, w, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, K + 1, (B, H, W), generator=generator)
    labels = labels.where(torch.rand(B, H, W, generator=generator) > 0.3, 0)
    labels = labels.where(labels < K, IGNORE)
    return logits.to(dtype).to(device).requires_grad_(), labels.to(device)


def run(function: Any, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Weighted sum, counts and gradient."""
    total, counts = function(logits, labels)
    return [total, counts, *gradients(total, [logits])]


def ours_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.tensor(WEIGHTS, device=labels.device)
    return segmentation_sum(logits, labels, weights), segmentation_counts(labels)


def reference_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    background, background_pixels, foreground, foreground_pixels = reference_sums(logits, labels)
    return WEIGHTS[0] * background + WEIGHTS[1] * foreground, torch.stack([background_pixels, foreground_pixels])


def check_against_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = arguments(shape, dtype, device)
    truth = run(reference_of, leaf(logits.double()), labels)
    ours = run(ours_of, permuted(logits), permuted(labels).to(torch.uint8))
    for name, actual, expected in zip(("sum", "counts", "gradient"), ours, truth, strict=True):
        assert_close(actual, expected, label=f"{name} {shape}")


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_reference(shape: tuple[int, ...], triton_device: torch.device) -> None:
    check_against_reference(shape, torch.float32, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [21, 81])
def test_kernels_equal_reference_at_full_size(channels: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    check_against_reference((2, channels, 28, 28, 448, 448), torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("torch_path")
def test_torch_path_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_reference(shape, dtype, torch.device("cpu"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(*bounds) for bounds in ((1, 2), (2, 5), (1, 9), (1, 9), (1, 40), (1, 40)))),
    band=st.integers(1, 400),
)
def test_torch_path_equals_reference_at_any_size_and_band(shape: tuple[int, ...], band: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSR_KERNELS", "torch")
        patch.setattr(segmentation, "BAND_ELEMENTS", band)
        check_against_reference(shape, torch.float64, torch.device("cpu"))


@pytest.mark.usefixtures("torch_path")
def test_gradient_is_the_derivative() -> None:
    logits, labels = arguments((2, 3, 3, 2, 7, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda x: ours_of(x, labels)[0], (logits,))
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, labels), (logits,))


@pytest.mark.parametrize("label", [None, 0, 2, IGNORE])
def test_loss_counts_an_empty_set_as_zero(label: int | None, triton_device: torch.device) -> None:
    logits, labels = arguments((1, 3, 1, 2, 3, 4), device=triton_device)
    if label is not None:
        labels = torch.full_like(labels, label)
    loss, exact = segmentation_loss(logits, labels), leaf(logits.double())
    expected = reference_loss(exact, labels)
    assert_close(loss, expected)
    for actual, truth in zip(gradients(loss, [logits]), gradients(expected, [exact]), strict=True):
        assert_close(actual, truth)
    if label == IGNORE:
        assert loss.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype, path: torch.device) -> None:
    logits, labels = arguments((1, 21, 1, 2, 3, 9), dtype, path)
    ours = run(ours_of, logits, labels)
    low = run(reference_of, leaf(logits), labels)
    truth = run(reference_of, leaf(logits.float()), labels)
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == dtype
    for actual, plain, exact in zip(ours, low, truth, strict=True):
        assert_low_precision(actual, plain, exact)


def test_gradient_is_the_same_in_every_run(triton_device: torch.device) -> None:
    logits, labels = arguments((1, 3, 2, 1, 4, 5), device=triton_device)
    for first, second in zip(*(run(ours_of, logits, labels) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_the_sum_without_gradient_is_the_same(triton_device: torch.device) -> None:
    logits, labels = arguments((2, 3, 1, 1, 2, 3), device=triton_device)
    with torch.no_grad():
        total, _ = ours_of(logits, labels)
    assert not total.requires_grad
    assert torch.equal(total, ours_of(logits, labels)[0].detach())


@pytest.mark.usefixtures("torch_path")
def test_autocast_changes_nothing_on_the_cpu() -> None:
    logits, labels = arguments((1, 3, 3, 3, 8, 8))
    plain, _ = ours_of(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours_of(logits, labels)[0], plain)


@pytest.mark.gpu
def test_no_full_resolution_logits_are_stored() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    logits, labels = arguments((4, 21, 28, 28, 448, 448), device="cuda")
    segmentation_loss(logits, labels).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    segmentation_loss(logits, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 21 * 448 * 448  # bytes; the logits would take four times it


@pytest.mark.gpu
def test_host_never_waits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    logits, labels = arguments((2, 21, 28, 28, 448, 448), device="cuda")
    segmentation_loss(logits, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segmentation_loss(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operators_are_registered_rightly(triton_device: torch.device) -> None:
    logits, labels = arguments((1, 3, 2, 1, 2, 2), device=triton_device)
    weights = torch.tensor(WEIGHTS, device=triton_device)
    torch.library.opcheck(segmentation_loss_op, (permuted(logits), permuted(labels), weights, IGNORE, True))
    torch.library.opcheck(segmentation_loss_op, (logits.detach(), labels, weights, IGNORE, False))
    torch.library.opcheck(segmentation_counts_op, (permuted(labels), IGNORE))


def test_the_loss_takes_few_launches(triton_device: torch.device) -> None:
    logits, labels = arguments((1, 3, 2, 1, 4, 3), device=triton_device)
    with launches() as forward:
        loss = segmentation_loss(logits, labels)
    gradient = torch.ones_like(loss)
    with launches() as backward:
        torch.autograd.grad(loss, [logits], gradient)
    weights = ["clamp", "reciprocal", "mul"]
    assert forward == ["_count_kernel", "sum", *weights, "_cell_kernel", "_gather_kernel", "sum"]
    assert backward == ["mul"]


def test_more_pixels_than_one_program_counts_are_counted(triton_device: torch.device) -> None:
    labels = torch.arange(3 * 60 * 70).view(3, 60, 70).remainder(7).to(triton_device)
    labels[labels == 6] = IGNORE
    assert segmentation_counts(labels).tolist() == [(labels == 0).sum().item(), ((labels != 0) & (labels != 255)).sum()]


def test_loss_compiles_into_one_graph(path: torch.device) -> None:
    logits, labels = arguments((1, 3, 2, 1, 4, 3), device=path)
    compiled = torch.compile(segmentation_loss, fullgraph=True, backend=compile_backend(path))
    loss, expected = compiled(logits, labels), segmentation_loss(logits, labels)
    assert_close(loss, expected)
    assert_close(gradients(loss, [logits])[0], gradients(expected, [logits])[0])


def test_label_without_a_channel_never_passes_unseen(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = arguments((1, 3, 1, 1, 2, 2), device=triton_device)
    labels[0, 0, 0] = 3
    assert segmentation_loss(logits, labels).item() == torch.inf
    if triton_device.type == "cpu":
        monkeypatch.setenv("FSR_KERNELS", "torch")
        with pytest.raises(RuntimeError, match="out of bounds"):
            segmentation_loss(logits, labels)


def test_kernels_refuse_float64(triton_device: torch.device) -> None:
    logits, labels = arguments((1, 3, 1, 1, 2, 2), torch.float64, triton_device)
    with pytest.raises(TypeError, match="logits is float64; expected float32"):
        segmentation_loss(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 8, 8), ValueError, r"logits must be \(B, C\+1, h, w\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3, 8, 8), ValueError, r"got \(2, 3, 4, 4\) and \(3, 8, 8\)"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 8, 8), ValueError, "none of them 0"),
        (torch.zeros(2, 3, 4, 4).int(), torch.zeros(2, 8, 8).long(), TypeError, "logits is int32"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8), TypeError, "labels is float32; expected uint8, int64"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.uint8, device="meta"), ValueError, "device"),
    ],
)
def test_bad_input_is_refused(logits: Tensor, labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        segmentation_sum(logits, labels, torch.ones(2))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(3), ValueError, r"weights has shape \(3,\); expected \(2\)"),
        (torch.ones(2).long(), TypeError, "weights is int64"),
        (torch.ones(2, device="meta"), ValueError, "weights is on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        segmentation_sum(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.uint8), weights)


def test_labels_of_another_dtype_are_not_counted() -> None:
    with pytest.raises(TypeError, match="labels is float32; expected uint8, int64"):
        segmentation_counts(torch.zeros(2, 8, 8))
