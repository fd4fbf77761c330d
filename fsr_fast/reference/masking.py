"""Uncertain-patch selection, one image, one class and one patch at a time (paper, Eq. 2-4)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import require_shape


class PatchSelection(NamedTuple):
    """Which patches are masked, in both forms that the method uses."""

    mask: Tensor
    """(B, N) bool, True = masked."""
    masked: Tensor
    """(B, k) int64, the masked patches, ascending."""


@torch.no_grad()
def uncertain_mask(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, *, k: int, low: float = 0.2, high: float = 0.7
) -> PatchSelection:
    """Mask the k patches with the highest soft mask, patches of uncertain activation first.

    Args:
        features: (B, N, D) floating, patch features of the view that will be masked.
        weight: (C, D) floating, the classifier's weight.
        labels: (B, C), a class is present where it is > 0.
        uniform: (B, N) floating in [0, 1), the random draw u of Eq. 3.
        k: the number of patches to mask in each image, 0 <= k <= N.
        low: β_l of Eq. 3, in [0, 1].
        high: β_h of Eq. 3, in [0, 1].

    Returns:
        The selection over the N patches.

    Raises:
        ValueError: if a shape does not fit or k is out of range.

    Source: paper, Eq. 2-4.
    """
    require_shape("features", features, "B", "N", "D")
    B, N, D = features.shape
    require_shape("weight", weight, "C", D)
    C = weight.shape[0]
    require_shape("labels", labels, B, C)
    require_shape("uniform", uniform, B, N)
    value = features.new_zeros(B, N)  # no class present: nothing is activated
    for b in range(B):
        for c in range(C):
            if labels[b, c] <= 0:
                continue
            # Eq. 2: the class activation map of one class, min-max normalised over the patches
            activation = torch.relu(features[b] @ weight[c])
            activation = activation - activation.min()
            activation = activation / (activation.max() + 1e-5)
            value[b] = torch.maximum(value[b], activation)
    return top_k_mask(soften(value, uniform, low, high), k=k)


@torch.no_grad()
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
        cam: (B, C, h', w') floating in [0, 1], any resolution.
        labels: (B, C), a class is present where it is > 0.
        uniform: (B, (h / block) * (w / block)) floating in [0, 1), one draw per block.
        grid: (h, w), the patch grid.
        k: the number of blocks to mask in each image.
        low: β_l of Eq. 3, in [0, 1].
        high: β_h of Eq. 3, in [0, 1].
        block: patches along a block's side; 1 = patch granularity.

    Returns:
        The selection over the N = h * w patches; k * block² of them are masked.

    Raises:
        ValueError: if a shape does not fit, the grid is not whole blocks or k is out of range.

    Source: paper, Eq. 3-4; official code for blocks and nearest sampling.
    """
    require_shape("cam", cam, "B", "C", "h'", "w'")
    B, C = cam.shape[:2]
    require_shape("labels", labels, B, C)
    rows, columns = block_grid(grid, block)
    require_shape("uniform", uniform, B, rows * columns)
    value = sample_activation(cam, labels, (rows, columns))
    return top_k_mask(soften(value, uniform, low, high), k=k, grid=grid, block=block)


@torch.no_grad()
def exactly_uncertain_mask(
    cam: Tensor, labels: Tensor, *, grid: tuple[int, int], low: float = 0.2, high: float = 0.7
) -> Tensor:
    """Mask exactly the patches of uncertain activation, however many there are.

    Args:
        cam: (B, C, h', w') floating in [0, 1], any resolution.
        labels: (B, C), a class is present where it is > 0.
        grid: (h, w), the patch grid.
        low: β_l of Eq. 3, in [0, 1].
        high: β_h of Eq. 3, in [0, 1].

    Returns:
        (B, N) bool, True = masked.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Table 3 (CAM strict).
    """
    require_shape("cam", cam, "B", "C", "h'", "w'")
    require_shape("labels", labels, *cam.shape[:2])
    value = sample_activation(cam, labels, grid)
    return (value > low) & (value < high)


@torch.no_grad()
def edge_mask(edges: Tensor, patch_size: int) -> Tensor:
    """Mask exactly the patches that contain an edge pixel, however it was found.

    Args:
        edges: (B, H, W) bool; H and W are whole patches.
        patch_size: side of a patch, in pixels.

    Returns:
        (B, N) bool, True = masked.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Table 3 (edge strict).
    """
    require_shape("edges", edges, "B", "H", "W")
    B, H, W = edges.shape
    mask = torch.zeros(B, H // patch_size, W // patch_size, dtype=torch.bool, device=edges.device)
    for b, y, x in torch.nonzero(edges).tolist():
        mask[b, y // patch_size, x // patch_size] = True
    return mask.flatten(1)


def sample_activation(cam: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Take the largest activation of the present classes and sample its nearest pixel for every patch or block.

    Args:
        cam: (B, C, h', w') floating in [0, 1], any resolution.
        labels: (B, C), a class is present where it is > 0.
        size: (rows, columns) of patches or blocks.

    Returns:
        (B, rows * columns), v of Eq. 3; 0 where no class is present.

    Source: paper, Eq. 3; official code for the nearest sampling.
    """
    B, C = labels.shape
    value = cam.new_zeros(B, *cam.shape[2:])
    for b in range(B):
        for c in range(C):
            if labels[b, c] > 0:
                value[b] = torch.maximum(value[b], cam[b, c])
    return F.interpolate(value[:, None], size=size, mode="nearest").flatten(1)


def count_masked(blocks: int, ratio: float, block: int) -> int:
    """Count the blocks to mask in each image.

    Args:
        blocks: number of blocks in an image; of patches if block is 1.
        ratio: r, the share that is masked, in [0, 1).
        block: patches along a block's side.

    Returns:
        k: ⌊N r⌋ patches, or ⌈blocks r⌉ blocks of more than one patch.

    Source: paper, Eq. 4; official code for blocks.
    """
    share = round(blocks * ratio, 6)  # 30 * 0.1 is 3, not a little more
    return math.floor(share) if block == 1 else math.ceil(share)


def soften(value: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
    """Draw the soft mask M_s: u, plus 1 where the activation is uncertain.

    Args:
        value: (B, blocks) floating, v of Eq. 3.
        uniform: (B, blocks) floating in [0, 1), u of Eq. 3.
        low: β_l; strictly below an uncertain value.
        high: β_h; strictly above an uncertain value.

    Returns:
        (B, blocks) of uniform's dtype, in [0, 2).

    Source: paper, Eq. 3.
    """
    soft = uniform.clone()
    for b in range(value.shape[0]):
        for i in range(value.shape[1]):
            if low < value[b, i] < high:
                soft[b, i] += 1
    return soft


@torch.no_grad()
def top_k_mask(soft: Tensor, *, k: int, grid: tuple[int, int] | None = None, block: int = 1) -> PatchSelection:
    """Compute the hard mask M_b: exactly the k highest entries of the soft mask, the lower index first among equals.

    Args:
        soft: (B, blocks) floating, M_s.
        k: the number of blocks to mask in each image, 0 <= k <= blocks.
        grid: (h, w), the patch grid; needed where block > 1.
        block: patches along a block's side.

    Returns:
        The selection over the N = blocks * block² patches.

    Raises:
        ValueError: if a shape does not fit, the grid is not whole blocks or k is out of range.

    Source: paper, Eq. 4.
    """
    require_shape("soft", soft, "B", "blocks")
    B, blocks = soft.shape
    if not 0 <= k <= blocks:
        raise ValueError(f"k is {k}, expected 0 <= k <= {blocks}, the number of blocks; lower the mask ratio")
    if grid is None and block != 1:
        raise ValueError(f"block is {block} without a grid; pass grid=(h, w) so that blocks can be cut into patches")
    rows, columns = block_grid(grid or (1, blocks), block)
    if rows * columns != blocks:
        raise ValueError(f"soft has {blocks} blocks, expected {rows * columns} for grid {grid} and block {block}")
    width = columns * block
    mask = torch.zeros(B, blocks * block * block, dtype=torch.bool)
    for b in range(B):
        scores = soft[b].tolist()
        for chosen in sorted(range(blocks), key=lambda i: (-scores[i], i))[:k]:
            top, left = chosen // columns * block, chosen % columns * block
            for y in range(top, top + block):
                mask[b, y * width + left : y * width + left + block] = True
    masked = torch.stack([torch.nonzero(row).flatten() for row in mask])
    return PatchSelection(mask.to(soft.device), masked.to(soft.device))


def block_grid(grid: tuple[int, int], block: int) -> tuple[int, int]:
    """Count the blocks along both sides of a patch grid.

    Args:
        grid: (h, w), patches along the sides.
        block: patches along a block's side.

    Returns:
        (h / block, w / block).

    Raises:
        ValueError: if the grid is not made of whole blocks.
    """
    if block < 1 or grid[0] % block or grid[1] % block:
        raise ValueError(f"grid {grid} is not made of whole blocks of {block} patches; choose a block that divides it")
    return grid[0] // block, grid[1] // block
