"""Uncertain-patch selection picks exactly the reference's patches, on both paths."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fsr_fast import reference
from fsr_fast.kernels import PatchSelection, top_k_mask, uncertain_mask, uncertain_mask_from_cam
from fsr_fast.kernels.patch_selection import top_k_mask_op, uncertain_mask_from_cam_op, uncertain_mask_op
from tests.kernels.helpers import compile_backend, permuted

SHAPES = [(2, 25, 40, 1, 10), (2, 61, 33, 80, 20), (1, 150, 72, 5, 60)]  # B, N, D, C, k
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def features_case(B: int, N: int, D: int, C: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Random inputs whose activations keep away from both thresholds, so that rounding decides nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, N, D, generator=generator).to(dtype)
    weight = torch.randn(C, D, generator=generator).to(dtype)
    labels = (torch.rand(B, C, generator=generator) < 0.3).float()
    labels[0, 0] = 1
    cam = torch.relu(features.double() @ weight.double().T)
    cam = cam - cam.amin(1, keepdim=True)
    cam = cam / (cam.amax(1, keepdim=True) + 1e-5)
    value = torch.where(labels[:, None] > 0, cam, 0).amax(2)
    assert min((value - 0.2).abs().min(), (value - 0.7).abs().min()) > 1e-6, "choose another seed"
    assert ((value > 0.2) & (value < 0.7)).any()
    return features, weight, labels, torch.rand(B, N, generator=generator)


def assert_same(actual: PatchSelection, expected: Any) -> None:
    for name in ("mask", "masked"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours.cpu(), theirs), name


def check_features(inputs: Inputs, k: int, device: torch.device) -> None:
    features, weight, labels, uniform = inputs
    expected = reference.uncertain_mask(features.double(), weight.double(), labels, uniform, k=k)
    assert_same(uncertain_mask(*(value.to(device) for value in inputs), k=k), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_masks_the_patches_of_the_reference(shape: tuple[int, ...], triton_device: torch.device) -> None:
    check_features(features_case(*shape[:4]), shape[4], triton_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_takes_low_precision_features(dtype: torch.dtype, triton_device: torch.device) -> None:
    check_features(features_case(2, 49, 72, 20, dtype), 19, triton_device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_path_masks_the_patches_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, torch_path: None
) -> None:
    check_features(features_case(*shape[:4], dtype), shape[4], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "C"), [(784, 20), (784, 80), (4096, 20)])
def test_kernel_masks_the_patches_of_the_reference_at_full_size(N: int, C: int) -> None:
    check_features(features_case(2, N, 768, C, seed=3), int(0.4 * N), torch.device("cuda"))


def test_full_precision_weight_is_used_in_the_dtype_of_the_features(triton_device: torch.device) -> None:
    features, weight, labels, uniform = features_case(2, 25, 40, 4, torch.bfloat16)
    noise = 1 + 1e-4 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))  # rounded away in bf16
    expected = uncertain_mask(features, weight, labels, uniform, k=9)
    moved = [value.to(triton_device) for value in (features, weight.float() * noise, labels, uniform)]
    assert_same(uncertain_mask(*moved, k=9), expected)


@pytest.mark.parametrize("k", [0, 25])
def test_none_or_all_patches_can_be_masked(k: int, triton_device: torch.device) -> None:
    inputs = [value.to(triton_device) for value in features_case(2, 25, 40, 3)]
    selection = uncertain_mask(*inputs, k=k)
    assert selection.mask.sum(1).tolist() == [k, k]
    assert selection.masked.shape == (2, k)


def test_image_without_a_class_is_masked_at_random(triton_device: torch.device) -> None:
    features, weight, labels, uniform = (value.to(triton_device) for value in features_case(2, 25, 40, 3))
    selection = uncertain_mask(features, weight, torch.zeros_like(labels), uniform, k=10)
    assert_same(selection, reference.top_k_mask(uniform.cpu(), k=10))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_labels_of_any_dtype_mark_the_present_classes(dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = features_case(2, 25, 40, 3)
    expected = uncertain_mask(*inputs, k=10)
    features, weight, labels, uniform = (value.to(triton_device) for value in inputs)
    assert_same(uncertain_mask(features, weight, labels.to(dtype), uniform, k=10), expected)


@pytest.mark.parametrize(
    ("size", "grid", "block", "k"), [((13, 17), (6, 8), 2, 5), ((5, 7), (5, 7), 1, 14), ((3, 40), (9, 6), 3, 2)]
)
def test_kernel_samples_a_ready_cam_as_the_reference(
    size: tuple[int, int], grid: tuple[int, int], block: int, k: int, triton_device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(2, 7, *size, generator=generator)
    labels = (torch.rand(2, 7, generator=generator) < 0.3).float()
    uniform = torch.rand(2, grid[0] * grid[1] // block**2, generator=generator)
    expected = reference.uncertain_mask_from_cam(cam, labels, uniform, grid=grid, k=k, block=block)
    options: dict[str, Any] = {"grid": grid, "k": k, "block": block}
    moved = [value.to(triton_device) for value in (permuted(cam), labels, uniform)]
    assert_same(uncertain_mask_from_cam(*moved, **options), expected)


@pytest.mark.parametrize("block", [1, 2])
def test_torch_path_samples_a_ready_cam_as_the_reference(block: int, torch_path: None) -> None:
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(3, 7, 45, 61, generator=generator)
    labels = (torch.rand(3, 7, generator=generator) < 0.3).float()
    uniform = torch.rand(3, 28 * 26 // block**2, generator=generator)
    options: dict[str, Any] = {"grid": (28, 26), "k": 70, "block": block, "low": 0.5, "high": 0.9}
    expected = reference.uncertain_mask_from_cam(cam, labels, uniform, **options)
    assert_same(uncertain_mask_from_cam(cam, labels, uniform, **options), expected)


def test_equal_values_are_masked_in_the_order_of_their_index(triton_device: torch.device) -> None:
    soft = torch.tensor([[0.5, 1.5, 0.5, -0.0, 0.0, -1.0, 1.5, 0.5, -2.0, 0.0], [0.25] * 10])
    for k in (3, 7):
        assert_same(top_k_mask(soft.to(triton_device), k=k), reference.top_k_mask(soft, k=k))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
    block=st.sampled_from([1, 2, 3]),
)
def test_selection_is_exact_ordered_and_complete(values: list[int], share: float, block: int) -> None:
    soft = torch.tensor([values, values[::-1]], dtype=torch.float32)
    k = round(share * len(values))
    selection = top_k_mask(soft, k=k, grid=(block, block * len(values)), block=block)
    assert_same(selection, reference.top_k_mask(soft, k=k, grid=(block, block * len(values)), block=block))
    assert selection.mask.sum(1).tolist() == [k * block**2] * 2
    for b in range(2):
        assert selection.masked[b].tolist() == selection.mask[b].nonzero().flatten().tolist()


def test_operators_pass_opcheck_on_permuted_layouts(triton_device: torch.device) -> None:
    inputs = [permuted(value.to(triton_device)) for value in features_case(2, 25, 40, 3)]
    torch.library.opcheck(uncertain_mask_op, (*inputs, 10, 0.2, 0.7))
    cam = permuted(torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0)).to(triton_device))
    soft = permuted(inputs[3][:, :6])
    torch.library.opcheck(uncertain_mask_from_cam_op, (cam, inputs[2], soft, 2, 3, 2, 4, 0.2, 0.7))
    torch.library.opcheck(top_k_mask_op, (soft, 2, 3, 2, 4))


def test_torch_path_passes_opcheck(torch_path: None) -> None:
    inputs = [permuted(value) for value in features_case(2, 25, 40, 3)]
    torch.library.opcheck(uncertain_mask_op, (*inputs, 0, 0.2, 0.7))


def test_compiles_as_one_graph(triton_device: torch.device) -> None:
    inputs = [value.to(triton_device) for value in features_case(2, 25, 40, 3)]

    def select(*inputs: Tensor) -> Tensor:
        return uncertain_mask(*inputs, k=10).mask.float() + uncertain_mask(*inputs, k=5).mask

    compiled = torch.compile(select, fullgraph=True, backend=compile_backend(triton_device))
    assert torch.equal(compiled(*inputs), select(*inputs))


def test_classifier_gets_no_gradient_and_no_graph() -> None:
    features, weight, labels, uniform = features_case(2, 25, 40, 3)
    selection = uncertain_mask(features.requires_grad_(), weight.requires_grad_(), labels, uniform, k=10)
    assert not any(part.requires_grad for part in selection)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(2, 25)}, ValueError, r"features has shape \(2, 25\); expected \(B, N, D\)"),
        ({"weight": torch.zeros(3, 7)}, ValueError, r"weight has shape \(3, 7\); expected \(C, 40\)"),
        ({"labels": torch.zeros(2, 4)}, ValueError, r"labels has shape \(2, 4\); expected \(2, 3\)"),
        ({"uniform": torch.zeros(2, 24)}, ValueError, r"uniform has shape \(2, 24\); expected \(2, 25\)"),
        ({"uniform": torch.zeros(2, 25, dtype=torch.float16)}, TypeError, "uniform is float16; expected float32"),
        ({"features": torch.zeros(2, 25, 40, dtype=torch.int32)}, TypeError, "features is int32"),
        ({"k": 26}, ValueError, "k is 26; expected 0 <= k <= 25"),
        ({"labels": torch.zeros(2, 3, device="meta")}, ValueError, "labels is on meta, features on cpu"),
    ],
)
def test_wrong_argument_is_named_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    features, weight, labels, uniform = features_case(2, 25, 40, 3)
    arguments = {"features": features, "weight": weight, "labels": labels, "uniform": uniform, "k": 10} | change
    with pytest.raises(error, match=message) as caught:
        uncertain_mask(**arguments)
    assert "\n" not in str(caught.value)


def test_grid_must_be_made_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="not made of whole blocks of 4"):
        uncertain_mask_from_cam(torch.rand(1, 2, 6, 6), torch.ones(1, 2), torch.rand(1, 1), grid=(6, 8), k=1, block=4)
    with pytest.raises(ValueError, match="without a grid"):
        top_k_mask(torch.rand(1, 4), k=1, block=2)


def test_kernel_refuses_what_it_cannot_hold(triton_device: torch.device) -> None:
    with pytest.raises(ValueError, match="at most 8192"):
        top_k_mask(torch.zeros(1, 8193, device=triton_device), k=1)
    with pytest.raises(TypeError, match="float64; expected float32"):
        top_k_mask(torch.zeros(1, 8, dtype=torch.float64, device=triton_device), k=1)
