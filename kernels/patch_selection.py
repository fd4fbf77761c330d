"""Exact top-k of a soft mask, and what follows from it: the hard mask and the ordered indices (paper, Eq. 3-4).

One program an image. The k-th largest value is found bit by bit on an order-preserving integer key (32 counts over
registers); equal values are taken in the order of their index, so exactly k are masked, always, and nothing is sorted.
The soft mask itself is read, or built in the same pass from a class activation map.

Legend: B batch, N patches, C classes, h w patch grid.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, next_power_of_2, require_dtype, require_shape, tl, triton, use_triton

MAX_PATCHES = 8192  # one program holds an image's soft mask in registers


class PatchSelection(NamedTuple):
    """Which patches are masked, in the three forms that the method reads.

    Attributes:
        mask: (B, N) bool, True = masked.
        masked: (B, k) int64, the masked patches, ascending.
        kept: (B, N - k) int64, the others, ascending.
    """

    mask: Tensor
    masked: Tensor
    kept: Tensor


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
    rows, columns = block_grid(grid or (1, soft.shape[1]), block)
    require_shape("soft", soft, ("B", rows * columns))
    require_k(k, rows * columns)
    require_dtype("soft", soft, (torch.float32, torch.float64))
    return PatchSelection(*top_k_mask_op(soft.detach(), rows, columns, block, k))


def require_k(k: int, blocks: int) -> None:
    """Refuse a ``k`` that cannot be chosen from ``blocks`` entries."""
    if not 0 <= k <= blocks:
        raise ValueError(f"k is {k}; expected 0 <= k <= {blocks}, what can be masked; lower the mask ratio")


def block_grid(grid: tuple[int, int], block: int) -> tuple[int, int]:
    """Count the blocks along both sides of a patch grid; refuse a grid that is not made of whole blocks."""
    if block < 1 or grid[0] % block or grid[1] % block:
        raise ValueError(f"grid {tuple(grid)} is not made of whole blocks of {block} patches; choose a divisor of both")
    return grid[0] // block, grid[1] // block


def select_torch(soft: Tensor, rows: int, columns: int, block: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The torch path of :func:`top_k_mask`: two stable sorts."""
    soft = soft.contiguous()
    chosen = torch.sort(soft, dim=1, descending=True, stable=True).indices[:, :k]
    blocks = torch.zeros_like(soft, dtype=torch.bool).scatter_(1, chosen, True)
    grid = blocks.view(-1, rows, 1, columns, 1).expand(-1, rows, block, columns, block)
    mask = grid.reshape(soft.shape[0], -1).clone()
    order = torch.sort(mask, dim=1, stable=True).indices  # kept patches first, both ascending
    kept, masked = order.split([order.shape[1] - k * block * block, k * block * block], dim=1)
    kept, masked = (part.clone(memory_format=torch.contiguous_format) for part in (kept, masked))
    return mask, masked, kept  # outputs may not share memory


@triton.jit
def _soft_values(
    cam, labels, uniform, b, index, valid, C, height, width, columns, scale_y, scale_x,
    cam_b, cam_c, cam_y, cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high,
    HAS_CAM: tl.constexpr, NORMALISE: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Soft mask (Eq. 3) of the blocks ``index``; the activation is sampled at its nearest pixel."""
    soft = tl.load(uniform + b * uniform_b + index * uniform_n, mask=valid, other=0.0)
    if HAS_CAM:
        if NORMALISE:  # (B, C, 1, N): a value for each patch
            offset = index * cam_x
        else:  # sampled as F.interpolate's "nearest" does, in fp32
            y = tl.minimum(tl.floor((index // columns).to(tl.float32) * scale_y).to(tl.int32), height - 1)
            x = tl.minimum(tl.floor((index % columns).to(tl.float32) * scale_x).to(tl.int32), width - 1)
            offset = y * cam_y + x * cam_x
        classes = tl.arange(0, CLASSES)
        present = tl.load(labels + b * labels_b + classes * labels_c, mask=classes < C, other=0).to(tl.float32) > 0
        value = tl.zeros_like(soft)
        c = tl.full((), -1, tl.int32)
        for _ in range(tl.sum(present.to(tl.int32), 0)):
            c = tl.min(tl.where(present & (classes > c), classes, CLASSES), 0)  # the next present class
            activation = tl.load(cam + b * cam_b + c.to(tl.int64) * cam_c + offset, mask=valid, other=0.0).to(
                tl.float32
            )
            if NORMALISE:
                activation -= tl.min(tl.where(valid, activation, float("inf")), 0)
                highest = tl.max(tl.where(valid, activation, float("-inf")), 0)
                activation = tl.div_rn(activation, tl.zeros_like(activation) + (highest + 1e-5))
            value = tl.maximum(value, activation)
        soft += ((value > low) & (value < high)).to(tl.float32)
    return soft


@triton.jit
def _ordered_key(soft):
    """Unsigned integer that orders as the float does; 0 for none of the numbers."""
    bits = tl.where(soft == 0, 0.0, soft).to(tl.uint32, bitcast=True)  # -0 equals +0
    return tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def _select_kernel(
    cam, labels, uniform, mask, masked, kept, blocks, k, C, height, width, rows, columns, scale_y, scale_x,
    cam_b, cam_c, cam_y, cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high,
    HAS_CAM: tl.constexpr, NORMALISE: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, SIDE: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """One image: soft mask, its k highest blocks, and the patches that they cover."""
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    valid = index < blocks
    soft = _soft_values(
        cam, labels, uniform, b, index, valid, C, height, width, columns, scale_y, scale_x, cam_b, cam_c, cam_y, cam_x,
        labels_b, labels_c, uniform_b, uniform_n, low, high, HAS_CAM, NORMALISE, CLASSES,
    )  # fmt: skip
    key = tl.where(valid, _ordered_key(soft), 0)
    threshold = tl.zeros((), tl.uint32)  # becomes the k-th largest key, from the highest bit down
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((key >= (threshold | bit)).to(tl.int32), 0) >= k
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    equal = ((key == threshold) & valid).to(tl.int32)
    needed = k - tl.sum((key > threshold).to(tl.int32), 0)
    last = tl.max(tl.where((equal == 1) & (tl.cumsum(equal, 0) <= needed), index, -1), 0)
    patch = tl.arange(0, PATCHES)
    inside = patch < blocks * SIDE * SIDE
    if SIDE == 1:
        owner, owner_key = index, key
    else:
        owner = patch // (columns * SIDE) // SIDE * columns + patch % (columns * SIDE) // SIDE
        soft = _soft_values(
            cam, labels, uniform, b, owner, inside, C, height, width, columns, scale_y, scale_x, cam_b, cam_c, cam_y,
            cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high, HAS_CAM, NORMALISE, CLASSES,
        )  # fmt: skip
        owner_key = _ordered_key(soft)
    chosen = inside & ((owner_key > threshold) | ((owner_key == threshold) & (owner <= last)))
    N = blocks * SIDE * SIDE
    total = k * SIDE * SIDE
    before = tl.cumsum(chosen.to(tl.int32), 0)  # masked patches up to and with this one
    tl.store(mask + b * N + patch, chosen, mask=inside)
    tl.store(masked + b * total + before - 1, patch.to(tl.int64), mask=chosen)
    tl.store(kept + b * (N - total) + patch - before, patch.to(tl.int64), mask=inside & ~chosen)


def select_triton(
    uniform: Tensor, k: int, rows: int, columns: int, block: int, cam: Tensor | None = None,
    labels: Tensor | None = None, low: float = 0.0, high: float = 0.0, normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the selection; ``uniform`` is the soft mask itself where there is no ``cam`` (B, C, h', w')."""
    require_dtype("uniform (Triton)", uniform, (torch.float32,))
    if rows * columns * block * block > MAX_PATCHES:
        raise ValueError(f"{rows * columns * block * block} patches; the kernel takes at most {MAX_PATCHES}")
    mask, masked, kept = outputs = empty_selection(uniform, k, block)
    blocks = rows * columns
    has_cam = cam is not None
    cam, labels = (uniform[:, :, None, None], uniform) if cam is None or labels is None else (cam, labels)
    height, width = cam.shape[2:]
    patches, warps = _select_configuration(blocks * block * block)
    with device_guard(uniform):
        _select_kernel[(uniform.shape[0],)](
            cam, labels, uniform, mask, masked, kept, blocks, k, cam.shape[1], height, width, rows, columns,
            height / rows, width / columns, *cam.stride(), *labels.stride(), *uniform.stride(), low, high,
            HAS_CAM=has_cam, NORMALISE=normalise, CLASSES=next_power_of_2(cam.shape[1]) if has_cam else 1,
            BLOCKS=next_power_of_2(blocks), SIDE=block, PATCHES=patches, num_warps=warps,
        )  # fmt: skip
    return outputs


def _select_configuration(patches: int) -> tuple[int, int]:
    """(padded number of patches, warps): 8 values a thread, 16 for the largest."""
    padded = next_power_of_2(patches)
    return padded, min(max(padded // 256, 4), 16)


def empty_selection(uniform: Tensor, k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a selection, not filled."""
    B, patches, chosen = uniform.shape[0], uniform.shape[1] * block * block, k * block * block
    return (
        uniform.new_empty(B, patches, dtype=torch.bool),
        uniform.new_empty(B, chosen, dtype=torch.int64),
        uniform.new_empty(B, patches - chosen, dtype=torch.int64),
    )


@torch.library.custom_op("fsr::top_k_mask", mutates_args=())
def top_k_mask_op(soft: Tensor, rows: int, columns: int, block: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Registered form of :func:`top_k_mask`; checked arguments."""
    if not use_triton(soft):
        return select_torch(soft, rows, columns, block, k)
    return select_triton(soft, k, rows, columns, block)


@top_k_mask_op.register_fake
def _(soft, rows, columns, block, k):
    return empty_selection(soft, k, block)


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernel, for the ahead-of-time compile test."""
    integers = ["blocks", "k", "C", "height", "width", "rows", "columns"]
    integers += ["cam_b", "cam_c", "cam_y", "labels_b", "uniform_b"]
    for name, patches, side, has_cam, normalise in (
        ("select N=784", 784, 1, True, True),
        ("select N=4096", 4096, 1, True, True),
        ("select N=8192", 8192, 1, True, True),
        ("select from CAM, blocks", 784, 4, True, False),
        ("select from CAM, N=4096", 4096, 1, True, False),
        ("select from soft mask", 784, 1, False, False),
    ):
        padded, warps = _select_configuration(patches)
        yield CompileCase(
            name,
            _select_kernel,
            {"cam": "*fp32", "labels": "*fp32", "uniform": "*fp32", "mask": "*i1", "masked": "*i64", "kept": "*i64"}
            | dict.fromkeys(integers, "i32")
            | dict.fromkeys(("scale_y", "scale_x", "low", "high"), "fp32"),
            {"cam_x": 1, "labels_c": 1, "uniform_n": 1, "HAS_CAM": has_cam, "NORMALISE": normalise, "SIDE": side}
            | {"CLASSES": 128 if has_cam else 1, "BLOCKS": next_power_of_2(patches // side**2), "PATCHES": padded},
            num_warps=warps,
            main=patches == 784 and has_cam,
        )
