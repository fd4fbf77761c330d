"""Selection of the patches to mask (paper, Eq. 2-4 and Table 3)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.config import MaskConfig
from fsr_fast.errors import UserError
from fsr_fast.kernels import PatchSelection, top_k_mask, uncertain_mask, uncertain_mask_from_cam
from fsr_fast.method.edges import canny_edges


@dataclass(frozen=True)
class MaskedPatches:
    """The masked patches of a batch, as the distillation loss reads them."""

    mask: Tensor
    """(B, N), bool, True where masked."""
    index: Tensor
    """(B, k), int64, patches to compare; k is the same for all images."""
    weight: Tensor | None
    """(B, k), float32, weight of each of them in the batch mean; none: all alike."""


@dataclass(frozen=True)
class MaskShape:
    """Sizes of the mask for one grid."""

    grid: tuple[int, int]
    """h and w, patches."""
    blocks: int
    """Number of blocks that are drawn over."""
    count: int
    """Number of blocks that are masked."""


def mask_shape(config: MaskConfig, grid: tuple[int, int]) -> MaskShape:
    """Count blocks and masked blocks: ⌊N·r⌋ patches, or ⌈blocks·r⌉ where blocks are larger than a patch.

    Raises:
        UserError: the blocks do not fill the grid.
    """
    height, width = grid
    if height % config.block or width % config.block:
        raise UserError(f"mask.block: {config.block} does not divide the grid of {height} by {width} patches")
    blocks = (height // config.block) * (width // config.block)
    share = blocks * config.ratio
    return MaskShape(grid, blocks, math.floor(share + 1e-6) if config.block == 1 else math.ceil(share - 1e-6))


def mask_randomly(uniform: Tensor, shape: MaskShape, config: MaskConfig) -> MaskedPatches:
    """Mask k blocks at random.

    Args:
        uniform: (B, blocks), u of Eq. 3.
        shape: as `mask_shape` gives it.
        config: for the size of a block.
    """
    return _compare_masked(top_k_mask(uniform, k=shape.count, grid=shape.grid, block=config.block))


def mask_from_features(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, shape: MaskShape, config: MaskConfig
) -> MaskedPatches:
    """Mask the most uncertain patches by the single-scale CAM.

    Args:
        features: (B, N, D), feature map of the classifier that guides.
        weight: (C, D), the classifier.
        labels: (B, C), 0 or 1.
        uniform: (B, N), u of Eq. 3.
        shape: as `mask_shape` gives it.
        config: thresholds.
    """
    thresholds = {"low": config.low, "high": config.high}
    return _compare_masked(uncertain_mask(features, weight, labels, uniform, k=shape.count, **thresholds))


def mask_from_cam(cam: Tensor, labels: Tensor, uniform: Tensor, shape: MaskShape, config: MaskConfig) -> MaskedPatches:
    """Mask by a ready, normalised CAM: the most uncertain blocks, or exactly the uncertain patches (`cam_strict`).

    Args:
        cam: (B, C, H, W), normalised.
        labels: (B, C), 0 or 1.
        uniform: (B, blocks), u of Eq. 3.
        shape: as `mask_shape` gives it.
        config: strategy, thresholds, block.
    """
    if config.strategy == "cam_strict":
        value = F.interpolate((cam * labels[..., None, None]).amax(1, keepdim=True), size=shape.grid, mode="nearest")
        value = value.flatten(1)
        return _compare_exactly((config.low < value) & (value < config.high))
    selection = uncertain_mask_from_cam(
        cam,
        labels,
        uniform,
        grid=shape.grid,
        k=shape.count,
        low=config.low,
        high=config.high,
        block=config.block,
    )
    return _compare_masked(selection)


def mask_edges(images: Tensor, shape: MaskShape) -> MaskedPatches:
    """Mask exactly the patches that hold an edge (`edge_strict`).

    Args:
        images: (B, 3, H, W), 0…255.
        shape: as `mask_shape` gives it.
    """
    edges = F.adaptive_max_pool2d(canny_edges(images).float()[:, None], shape.grid)
    return _compare_exactly(edges.flatten(1) > 0)


def _compare_masked(selection: PatchSelection) -> MaskedPatches:
    return MaskedPatches(selection.mask, selection.masked, None)


def _compare_exactly(mask: Tensor) -> MaskedPatches:
    # The number of masked patches differs between images: all are compared, the unmasked with weight 0.
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask))
    return MaskedPatches(mask, index, weight)
