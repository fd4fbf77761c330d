"""Which patches are masked: exactly k of them, the uncertain ones first (paper, Eq. 2-4).

The soft mask is given, or computed from features and classifier, or from a given class activation map.

Legend: B batch, N patches, D width, C classes, h w patch grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, require_shape, use_triton
from .patch_selection_kernels import empty_selection, launch_activation, launch_selection

# --- torch path: present classes only, one product per image; a stable sort


def _soft_torch(value: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
    return uniform + ((value > low) & (value < high)).to(uniform.dtype)


def _value_from_features(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    exact = torch.promote_types(features.dtype, torch.float32)
    value = features.new_zeros(features.shape[:2], dtype=exact)
    for b in range(features.shape[0]):
        present = weight[labels[b] > 0].to(features.dtype)
        if present.shape[0]:
            cam = (present.to(exact) @ features[b].to(exact).T).relu_()  # (present classes, N)
            lowest, highest = cam.aminmax(dim=1, keepdim=True)
            value[b] = cam.sub_(lowest).div_(highest - lowest + 1e-5).amax(0)
    return value


def _value_from_cam(cam: Tensor, labels: Tensor, rows: int, columns: int) -> Tensor:
    sampled = F.interpolate(cam, size=(rows, columns), mode="nearest").flatten(2)
    return torch.where(labels[:, :, None] > 0, sampled, 0).clamp(min=0).amax(1)


def _select_torch(soft: Tensor, rows: int, columns: int, block: int, k: int) -> tuple[Tensor, Tensor]:
    """The torch path of :func:`top_k_mask`: a stable sort."""
    soft = soft.contiguous()
    chosen = torch.sort(soft, dim=1, descending=True, stable=True).indices[:, :k]
    blocks = torch.zeros_like(soft, dtype=torch.bool).scatter_(1, chosen, True)
    grid = blocks.view(-1, rows, 1, columns, 1).expand(-1, rows, block, columns, block)
    mask = grid.reshape(soft.shape[0], -1).clone()
    return mask, mask.nonzero()[:, 1].reshape(len(mask), k * block * block).contiguous()


# --- registration


@torch.library.custom_op("fsr::top_k_mask", mutates_args=())
def top_k_mask_op(soft: Tensor, rows: int, columns: int, block: int, k: int) -> tuple[Tensor, Tensor]:
    """Registered form of :func:`top_k_mask`; checked arguments."""
    if not use_triton(soft):
        return _select_torch(soft, rows, columns, block, k)
    return launch_selection(soft, k, rows, columns, block)


@top_k_mask_op.register_fake
def _(soft, rows, columns, block, k):
    return empty_selection(soft, k, block)


@torch.library.custom_op("fsr::uncertain_mask", mutates_args=())
def uncertain_mask_op(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, k: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Registered form of :func:`uncertain_mask`; checked arguments."""
    N = features.shape[1]
    if not use_triton(features):
        value = _value_from_features(features, weight, labels)
        return _select_torch(_soft_torch(value, uniform, low, high), 1, N, 1, k)
    cam = launch_activation(features, weight, labels)
    return launch_selection(uniform, k, 1, N, 1, cam, labels, low, high, normalise=True)


@uncertain_mask_op.register_fake
def _(features, weight, labels, uniform, k, low, high):
    return empty_selection(uniform, k, 1)


@torch.library.custom_op("fsr::uncertain_mask_from_cam", mutates_args=())
def uncertain_mask_from_cam_op(
    cam: Tensor, labels: Tensor, uniform: Tensor, rows: int, columns: int, block: int, k: int, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Registered form of :func:`uncertain_mask_from_cam`; checked arguments."""
    if not use_triton(cam):
        soft = _soft_torch(_value_from_cam(cam, labels, rows, columns), uniform, low, high)
        return _select_torch(soft, rows, columns, block, k)
    require_dtype("cam (Triton)", cam, FEATURE_DTYPES)
    return launch_selection(uniform, k, rows, columns, block, cam, labels, low, high)


@uncertain_mask_from_cam_op.register_fake
def _(cam, labels, uniform, rows, columns, block, k, low, high):
    return empty_selection(uniform, k, block)


# --- public functions


class PatchSelection(NamedTuple):
    """Which patches are masked, in both forms that the method uses.

    Attributes:
        mask: (B, N) bool, True = masked.
        masked: (B, k) int64, the masked patches, ascending.
    """

    mask: Tensor
    masked: Tensor


def top_k_mask(soft: Tensor, *, k: int, grid: tuple[int, int] | None = None, block: int = 1) -> PatchSelection:
    """Mask exactly the k highest entries of a soft mask, the lower index first among equals.

    Args:
        soft: (B, blocks) fp32, finite.
        k: number of blocks to mask in each image, 0 <= k <= blocks.
        grid: (h, w) patches, needed where ``block`` > 1; both are multiples of ``block``.
        block: patches along a block's side.

    Returns:
        The selection over the N = blocks * block² patches. No gradient.

    Raises:
        ValueError: a shape does not fit or ``k`` is out of range.
        TypeError: the dtype is not supported.

    Source: Eq. 4.
    """
    require_shape("soft", soft, ("B", "blocks"))
    if grid is None and block != 1:
        raise ValueError(f"block is {block} without a grid; expected grid=(h, w), to cut blocks into patches")
    rows, columns = _block_grid(grid or (1, soft.shape[1]), block)
    require_shape("soft", soft, ("B", rows * columns))
    _require_k(k, rows * columns)
    require_dtype("soft", soft, (torch.float32, torch.float64))
    return PatchSelection(*top_k_mask_op(soft.detach(), rows, columns, block, k))


def uncertain_mask(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, *, k: int, low: float = 0.2, high: float = 0.7
) -> PatchSelection:
    """Mask the k patches with the highest soft mask, patches of uncertain activation first.

    Args:
        features: (B, N, D) fp32, bf16 or fp16 (fp64 on the torch path): patch features of the view to be masked.
        weight: (C, D) floating: the classifier's weight; used in the dtype of ``features``.
        labels: (B, C) any dtype: a class is present where it is > 0.
        uniform: (B, N) fp32 in [0, 1): the random draw u of Eq. 3.
        k: number of patches to mask in each image, 0 <= k <= N.
        low: lower threshold of Eq. 3, exclusive.
        high: upper threshold of Eq. 3, exclusive.

    Returns:
        The selection over the N patches. No gradient.

    Raises:
        ValueError: a shape does not fit, ``k`` is out of range, or the tensors live on several devices.
        TypeError: a dtype is not supported.

    Source: Eq. 2-4, activation of a single scale at patch granularity.
    """
    require_shape("features", features, ("B", "N", "D"))
    B, N, D = features.shape
    require_shape("weight", weight, ("C", D))
    require_shape("labels", labels, (B, weight.shape[0]))
    require_shape("uniform", uniform, (B, N))
    _require_k(k, N)
    require_dtype("features", features, (*FEATURE_DTYPES, torch.float64))
    require_dtype("weight", weight, (*FEATURE_DTYPES, torch.float64))
    require_dtype("uniform", uniform, (torch.float32, torch.float64))
    require_same_device(features=features, weight=weight, labels=labels, uniform=uniform)
    return PatchSelection(
        *uncertain_mask_op(features.detach(), weight.detach(), labels.detach(), uniform.detach(), k, low, high)
    )


def uncertain_mask_from_cam(
    cam: Tensor,
    labels: Tensor,
    uniform: Tensor,
    *,
    grid: tuple[int, int],
    k: int,
    low: float = 0.2,
    high: float = 0.7,
    block: int = 1,
) -> PatchSelection:
    """Mask by a normalised class activation map, at patch or block granularity.

    Args:
        cam: (B, C, h', w') fp32, bf16 or fp16 in [0, 1], any resolution, sampled at its nearest pixel.
        labels: (B, C) any dtype: a class is present where it is > 0.
        uniform: (B, (h / block) * (w / block)) fp32 in [0, 1): one draw per block.
        grid: (h, w) patches; both are multiples of ``block``.
        k: number of blocks to mask in each image.
        low: lower threshold of Eq. 3, exclusive.
        high: upper threshold of Eq. 3, exclusive.
        block: patches along a block's side; 1 is patch granularity.

    Returns:
        The selection over the N = h * w patches, k * block² of them masked. No gradient.

    Raises:
        ValueError: a shape does not fit, ``k`` is out of range, or the tensors live on several devices.
        TypeError: a dtype is not supported.

    Source: Eq. 3-4; official code for blocks and for nearest sampling.
    """
    require_shape("cam", cam, ("B", "C", "h'", "w'"))
    rows, columns = _block_grid(grid, block)
    require_shape("labels", labels, tuple(cam.shape[:2]))
    require_shape("uniform", uniform, (cam.shape[0], rows * columns))
    _require_k(k, rows * columns)
    require_dtype("cam", cam, (*FEATURE_DTYPES, torch.float64))
    require_dtype("uniform", uniform, (torch.float32, torch.float64))
    require_same_device(cam=cam, labels=labels, uniform=uniform)
    arguments = (cam.detach(), labels.detach(), uniform.detach())
    return PatchSelection(*uncertain_mask_from_cam_op(*arguments, rows, columns, block, k, low, high))


def _require_k(k: int, blocks: int) -> None:
    """Refuse a ``k`` that cannot be chosen from ``blocks`` entries."""
    if not 0 <= k <= blocks:
        raise ValueError(f"k is {k}; expected 0 <= k <= {blocks}, the number that can be masked; lower the mask ratio")


def _block_grid(grid: tuple[int, int], block: int) -> tuple[int, int]:
    """Count the blocks along both sides of a patch grid; refuse a grid that is not made of whole blocks."""
    if block < 1 or grid[0] % block or grid[1] % block:
        raise ValueError(f"grid {tuple(grid)} is not made of whole blocks of {block} patches; choose a divisor of both")
    return grid[0] // block, grid[1] // block
