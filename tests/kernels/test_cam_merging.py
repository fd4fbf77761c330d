"""CAM merge: both paths against the reference, which resizes every class at every scale."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsr_fast.kernels import merge_cams, present_classes
from fsr_fast.kernels.cam_merging import merge_cams_op
from fsr_fast.kernels.class_slots import present_classes_op
from fsr_fast.reference import merge_cams as reference
from fsr_fast.reference import present_classes as reference_classes
from tests.kernels.helpers import assert_close, assert_low_precision, compile_backend, permuted

CASES = (  # B, C, max_classes, grids, size, output size
    pytest.param((2, 2, 2, ((3, 4), (2, 2), (4, 6)), (18, 66), None), id="three scales, several tiles"),
    pytest.param((2, 3, 2, ((3, 4), (2, 2)), (18, 30), (3, 5)), id="resized, fewer slots than classes"),
    pytest.param((1, 2, 2, ((3, 1),), (7, 1), None), id="one pixel wide"),
    pytest.param((2, 1, 3, ((2, 2),), (1, 9), (2, 3)), id="one class, more slots than classes"),
    pytest.param((1, 80, 4, ((2, 3), (5, 3)), (4, 3), (9, 2)), id="80 classes, CAM larger than the image"),
)


def arguments(case: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, dict]:
    """CAMs of the scales, those of the mirrored images and labels; the last image has every class."""
    B, C, max_classes, grids, size, output_size = case
    generator = torch.Generator().manual_seed(B * C + max_classes)
    cams, flipped = (
        [torch.randn(B, C, *grid, generator=generator, dtype=torch.float64).to(dtype).to(device) for grid in grids]
        for _ in range(2)
    )
    labels = (torch.rand(B, C, generator=generator) < 0.5).float()
    labels[-1] = 1
    return (cams, flipped, labels.to(device)), {"max_classes": max_classes, "size": size, "output_size": output_size}


def converted(maps: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [cam.to(dtype) for cam in maps]


def check_against_reference(case: Any, dtype: torch.dtype, device: torch.device) -> None:
    (cams, flipped, labels), options = arguments(case, dtype, device)
    truth = reference(converted(cams, torch.float64), converted(flipped, torch.float64), labels, **options)
    ours = merge_cams([permuted(cam) for cam in cams], flipped, permuted(labels), **options)
    assert torch.equal(ours.live, truth.live)
    assert torch.equal(ours.classes, truth.classes)
    assert_close(ours.values, truth.values)


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_reference(case: Any, triton_device: torch.device) -> None:
    check_against_reference(case, torch.float32, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("output_size", [None, (28, 28)])
def test_kernels_equal_reference_at_full_size(output_size: tuple[int, int] | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    case = (2, 20, 5, ((28, 28), (14, 14), (42, 42)), (448, 448), output_size)
    check_against_reference(case, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("torch_path")
def test_torch_path_equals_reference(case: Any, dtype: torch.dtype) -> None:
    check_against_reference(case, dtype, torch.device("cpu"))


side = st.integers(1, 12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 6)),
    grids=st.lists(st.tuples(side, side), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    output_size=st.none() | st.tuples(side, side),
)
def test_torch_path_equals_reference_at_any_size(counts: Any, grids: Any, size: Any, output_size: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSR_KERNELS", "torch")
        check_against_reference((*counts, grids, size, output_size), torch.float64, torch.device("cpu"))


def test_map_without_activation_and_image_without_class_are_zero(path: torch.device) -> None:
    (cams, flipped, labels), options = arguments((2, 2, 2, ((2, 2),), (5, 6), None), device=path)
    labels[0] = 0
    merged = merge_cams([-cam.abs() for cam in cams], [-cam.abs() for cam in flipped], labels, **options)
    assert merged.live.tolist() == [[False, False], [True, True]]
    assert not merged.values.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype, path: torch.device) -> None:
    (cams, flipped, labels), options = arguments((1, 2, 2, ((3, 3), (2, 2)), (9, 8), None), dtype, path)
    truth = reference(converted(cams, torch.float32), converted(flipped, torch.float32), labels, **options)
    low = reference(cams, flipped, labels, **options)
    ours = merge_cams(cams, flipped, labels, **options)
    assert ours.values.dtype == torch.float32
    assert_low_precision(ours.values, low.values, truth.values)


@pytest.mark.usefixtures("torch_path")
def test_autocast_and_gradients_change_nothing_on_the_cpu() -> None:
    (cams, flipped, labels), options = arguments((2, 3, 3, ((3, 4), (2, 2)), (20, 11), (4, 4)))
    plain = merge_cams(cams, flipped, labels, **options)
    for cam in cams:
        cam.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge_cams(cams, flipped, labels, **options)
    assert torch.equal(merged.values, plain.values)
    assert not merged.values.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("max_classes", [1, 3, 9])
def test_present_classes_equal_reference(dtype: torch.dtype, max_classes: int, path: torch.device) -> None:
    labels = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).to(dtype).to(path)
    for actual, expected in zip(
        present_classes(permuted(labels), max_classes=max_classes),
        reference_classes(labels, max_classes=max_classes),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_host_never_waits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    case = (2, 20, 5, ((28, 28), (14, 14), (42, 42)), (448, 448), (28, 28))
    (cams, flipped, labels), options = arguments(case, device="cuda")
    merge_cams(cams, flipped, labels, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_cams(cams, flipped, labels, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_resized_result_needs_no_full_resolution_map() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    case = (4, 20, 4, ((28, 28), (14, 14), (42, 42)), (448, 448), (28, 28))
    (cams, flipped, labels), options = arguments(case, device="cuda")
    merge_cams(cams, flipped, labels, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    merge_cams(cams, flipped, labels, **options)
    assert torch.cuda.max_memory_allocated() - before < 4 * 4 * 448 * 448 * 4


def test_operators_are_registered_rightly(path: torch.device) -> None:
    (cams, flipped, labels), _ = arguments((1, 2, 2, ((2, 3), (1, 2)), (4, 5), None), device=path)
    for slots in (1, 3):  # fewer and more than there are classes
        torch.library.opcheck(present_classes_op, (permuted(labels), slots))
    classes, live = present_classes(labels, max_classes=2)
    opened = [permuted(cam) for cam in cams]
    for size in ([2, 3], [4, 5]):
        torch.library.opcheck(merge_cams_op, (opened, flipped, permuted(classes), live, [4, 5], size))


def test_merge_compiles_into_one_graph(path: torch.device) -> None:
    (cams, flipped, labels), options = arguments((1, 2, 2, ((2, 3), (1, 2)), (4, 5), (2, 2)), device=path)
    compiled = torch.compile(merge_cams, fullgraph=True, backend=compile_backend(path))
    merged, expected = (function(cams, flipped, labels, **options) for function in (compiled, merge_cams))
    assert_close(merged.values, expected.values)
    assert torch.equal(merged.classes, expected.classes)
    assert torch.equal(merged.live, expected.live)


def test_kernels_refuse_float64(triton_device: torch.device) -> None:
    (cams, flipped, labels), options = arguments((1, 2, 2, ((2, 3),), (4, 5), None), torch.float64, triton_device)
    with pytest.raises(TypeError, match=r"cams\[0\] is float64; expected float32"):
        merge_cams(cams, flipped, labels, **options)


GOOD = torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("cams", "flipped", "labels", "options", "error", "message"),
    [
        ([], [], torch.ones(1, 2), {}, ValueError, "one map per scale"),
        ([GOOD], [GOOD, GOOD], torch.ones(1, 2), {}, ValueError, "got 1 and 2 maps"),
        ([GOOD, GOOD], [GOOD, GOOD[..., :2]], torch.ones(1, 2), {}, ValueError, r"cams\[1\] and flipped\[1\]"),
        ([GOOD], [GOOD], torch.ones(1, 5), {}, ValueError, r"labels must be \(B, C\), got \(1, 5\)"),
        ([GOOD.int()], [GOOD.int()], torch.ones(1, 2), {}, TypeError, r"cams\[0\] is int32"),
        ([GOOD, GOOD.half()], [GOOD, GOOD.half()], torch.ones(1, 2), {}, TypeError, r"cams\[1\] is float16"),
        ([GOOD], [GOOD.to("meta")], torch.ones(1, 2), {}, ValueError, "on meta"),
        ([GOOD], [GOOD], torch.ones(1, 2), {"size": (4, 0)}, ValueError, "size must be two positive"),
        ([GOOD], [GOOD], torch.ones(1, 2), {"output_size": (4,)}, ValueError, "output_size must be two positive"),
        ([GOOD], [GOOD], torch.ones(1, 2), {"max_classes": 0}, ValueError, "max_classes must be at least 1"),
    ],
)
def test_bad_input_is_refused(
    cams: Any, flipped: Any, labels: Tensor, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge_cams(cams, flipped, labels, **({"max_classes": 2, "size": (4, 4)} | options))


def test_labels_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be \(B, C\)"):
        present_classes(torch.ones(3), max_classes=1)
