"""Triton kernels of the segmentation loss: bilinear resize, cross-entropy and its gradient, cell by cell.

Legend: B batch, K = C + 1 channels, H W label pixels, h w logit grid.
Cell (i, j): the pixels between logits i, i+1 and j, j+1, the four corners that their resized logits are made of. Each
pixel belongs to one cell, so one program per cell computes each softmax once, forward and gradient in one pass; a
second kernel gathers, in a fixed order, what up to four cells hold for one logit. The pixels are counted beforehand, so
that the pass knows what each of them weighs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import FEATURE_DTYPES, CompileCase, device_guard, next_power_of_2, require_dtype, tl, triton

COUNTED = 4096  # pixels that one program counts

# --- kernels


@triton.jit
def _cell_start(cell, length, pixels):
    """First pixel whose lower sample is `cell`: the smallest y with (2y + 1) * length >= (2 * cell + 1) * pixels."""
    start = ((2 * cell + 1) * pixels + length - 1) // (2 * length)
    return tl.where(cell == 0, 0, tl.minimum(start, pixels))


@triton.jit
def _part(position, ratio, cell, length):
    """Weight of the upper sample; 0 in the last cell, whose two samples are one."""
    part = tl.maximum((position + 0.5) * ratio - 0.5 - cell, 0.0)
    return tl.where(cell < length - 1, part, 0.0)


@triton.jit
def _cross_entropy(z, label, k, K):
    """Cross-entropy of a row of pixels (infinite for a label that is not a channel) and its gradient in the logits."""
    z -= tl.max(z, axis=0)[None, :]
    exponential = tl.exp(z)
    total = tl.sum(exponential, axis=0)
    target = (k == label[None, :]) & (k < K)
    entropy = tl.log(total) - tl.max(tl.where(target, z, -float("inf")), axis=0)
    return entropy, exponential * (1 / total)[None, :] - target.to(tl.float32)


@triton.jit
def _load_corners(logits, i, j, h, w, stride_h, stride_w, inside):
    """Upper left, upper right, lower left and lower right logits of a cell, each (BLOCK_K, 1)."""
    upper, lower = logits + i * stride_h, logits + tl.minimum(i + 1, h - 1) * stride_h
    left, right = j * stride_w, tl.minimum(j + 1, w - 1) * stride_w
    floor = -1e30  # for channels beyond K: finite, so that a weight of 0 does not make it NaN
    upper_left = tl.where(inside, tl.load(upper + left, mask=inside, other=0).to(tl.float32), floor)
    upper_right = tl.where(inside, tl.load(upper + right, mask=inside, other=0).to(tl.float32), floor)
    lower_left = tl.where(inside, tl.load(lower + left, mask=inside, other=0).to(tl.float32), floor)
    lower_right = tl.where(inside, tl.load(lower + right, mask=inside, other=0).to(tl.float32), floor)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def _both_sides(values, right, column: tl.constexpr):
    """(BLOCK_K, 4): the sum over pixels for the left corner in `column`, for the right corner two columns on."""
    columns = tl.arange(0, 4)[None, :]
    left_sum = tl.sum(values * (1 - right), axis=1)[:, None]
    right_sum = tl.sum(values * right, axis=1)[:, None]
    return tl.where(columns == column, left_sum, 0.0) + tl.where(columns == column + 2, right_sum, 0.0)


@triton.jit
def _count_kernel(labels, counts, pixels, ignore_index, BLOCK: tl.constexpr):
    """counts (blocks, 2): background and foreground pixels of each block."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + place, mask=place < pixels, other=ignore_index).to(tl.int32)
    known = label != ignore_index
    tl.store(counts + tl.program_id(0) * 2, tl.sum((known & (label == 0)).to(tl.float32)))
    tl.store(counts + tl.program_id(0) * 2 + 1, tl.sum((known & (label != 0)).to(tl.float32)))


@triton.jit(do_not_specialize=["stride_k"])  # with a stride of 1 known, lanes would lie along the channels
def _cell_kernel(
    logits, labels, weights, sums, parts, K, h, w, H, W, ratio_h, ratio_w, stride_b, stride_k, stride_h, stride_w,
    label_b, label_h, label_w, ignore_index, WITH_GRADIENT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One cell: sums (B, h, w) and parts (B, h, w, 4, K), the four being left/right x upper/lower."""
    b = tl.program_id(1).to(tl.int64)
    cell = b * h * w + tl.program_id(0)
    i, j = tl.program_id(0) // w, tl.program_id(0) % w
    k = tl.arange(0, BLOCK_K)[:, None]
    channel = tl.broadcast_to(k, (BLOCK_K, BLOCK_X))  # loading the whole tile sets its layout: lanes along the pixels
    first_y, last_y = _cell_start(i, h, H), _cell_start(i + 1, h, H)
    first_x, last_x = _cell_start(j, w, W), _cell_start(j + 1, w, W)
    background, foreground = tl.load(weights), tl.load(weights + 1)
    loss = tl.full((BLOCK_X,), 0, tl.float32)
    corners = tl.full((BLOCK_K, 4), 0, tl.float32)
    for start in range(first_x, last_x, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        right = _part(x, ratio_w, j, w)[None, :]
        upper_left, upper_right, lower_left, lower_right = _load_corners(
            logits + b * stride_b + channel * stride_k, i, j, h, w, stride_h, stride_w, channel < K
        )
        upper = upper_left * (1 - right) + upper_right * right
        lower = lower_left * (1 - right) + lower_right * right
        upper_gradient = tl.full((BLOCK_K, BLOCK_X), 0, tl.float32)
        lower_gradient = tl.full((BLOCK_K, BLOCK_X), 0, tl.float32)
        for y in range(first_y, last_y):
            down = _part(y, ratio_h, i, h)
            pixels = labels + b * label_b + y * label_h + x * label_w
            label = tl.load(pixels, mask=x < last_x, other=ignore_index).to(tl.int32)
            weight = tl.where(label == ignore_index, 0.0, tl.where(label == 0, background, foreground))
            entropy, gradient = _cross_entropy(upper * (1 - down) + lower * down, label, k, K)
            loss += weight * tl.where(label == ignore_index, 0.0, entropy)
            if WITH_GRADIENT:
                upper_gradient += gradient * (weight * (1 - down))[None, :]
                lower_gradient += gradient * (weight * down)[None, :]
        if WITH_GRADIENT:
            corners += _both_sides(upper_gradient, right, 0) + _both_sides(lower_gradient, right, 1)
    tl.store(sums + cell, tl.sum(loss))
    if WITH_GRADIENT:
        tl.store(parts + (cell * 4 + tl.arange(0, 4)[None, :]) * K + k, corners, mask=k < K)


@triton.jit
def _gather_kernel(parts, gradient, K, h, w, BLOCK_K: tl.constexpr):
    """gradient (B, K, h, w): for each logit, what its own cell and those above and to the left hold."""
    b = tl.program_id(1).to(tl.int64)
    i, j = tl.program_id(0) // w, tl.program_id(0) % w
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for right in tl.static_range(2):
        for lower in tl.static_range(2):
            cell = (b * h + i - lower) * w + j - right
            exists = (k < K) & (i >= lower) & (j >= right)
            total += tl.load(parts + (cell * 4 + right * 2 + lower) * K + k, mask=exists, other=0.0)
    tl.store(gradient + (b * K + k) * h * w + i * w + j, total, mask=k < K)


# --- launch


def launch_counts(labels: Tensor, ignore_index: int) -> Tensor:
    """Count the pixels of both sets.

    Args:
        labels: (B, H, W), uint8 or int64.
        ignore_index: label of the pixels in neither set.

    Returns:
        (2,) float32, background and foreground pixels.
    """
    labels = labels.contiguous()
    blocks = triton.cdiv(labels.numel(), COUNTED)
    counts = labels.new_empty((blocks, 2), dtype=torch.float32)
    with device_guard(labels):
        _count_kernel[(blocks,)](labels, counts, labels.numel(), ignore_index, COUNTED)
    return counts.sum(0)


def launch_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernels of the loss.

    Args:
        logits: (B, K, h, w), float32, bfloat16 or float16.
        labels: (B, H, W), uint8 or int64.
        weights: (2,) float32, of a background and of a foreground pixel.
        ignore_index: label of the pixels in neither set.
        with_gradient: whether to compute the gradient.

    Returns:
        Scalar, float32; its gradient (B, K, h, w), float32, or an empty tensor.

    Raises:
        TypeError: if the logits are float64.
    """
    require_dtype("logits", logits, FEATURE_DTYPES)
    B, K, h, w = logits.shape
    H, W = labels.shape[1:]
    sums = logits.new_empty(B * h * w, dtype=torch.float32)
    parts = logits.new_empty((B * h * w, 4, K) if with_gradient else 0, dtype=torch.float32)
    gradient = logits.new_empty(logits.shape if with_gradient else 0, dtype=torch.float32)
    with device_guard(logits):
        _cell_kernel[(h * w, B)](
            logits, labels, weights.contiguous(), sums, parts, K, h, w, H, W, h / H, w / W,
            *logits.stride(), *labels.stride(), ignore_index, WITH_GRADIENT=with_gradient, **_configuration(K),
        )  # fmt: skip
        if with_gradient:
            _gather_kernel[(h * w, B)](parts, gradient, K, h, w, BLOCK_K=next_power_of_2(K), num_warps=1)
    return sums.sum(), gradient


def _configuration(channels: int) -> dict[str, Any]:
    """One warp per cell and 256 numbers per tile: channels are reduced within a warp, gradients stay in registers."""
    block = max(16, next_power_of_2(channels))
    return {"BLOCK_K": block, "BLOCK_X": max(1, 256 // block), "num_warps": 1, "num_stages": 1}


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernels, for the ahead-of-time compile test."""
    for kind, label, channels, with_gradient in (
        ("bf16", "u8", 21, True),
        ("bf16", "u8", 81, True),
        ("fp32", "i64", 21, True),
        ("fp16", "u8", 21, True),
        ("bf16", "u8", 21, False),
    ):
        configuration = _configuration(channels)
        warps, stages = configuration.pop("num_warps"), configuration.pop("num_stages")
        integers = ("K", "h", "w", "H", "W", "stride_b", "stride_k", "stride_h", "label_b", "label_h", "ignore_index")
        signature = {"logits": f"*{kind}", "labels": f"*{label}"}
        signature |= dict.fromkeys(("weights", "sums", "parts"), "*fp32")
        signature |= dict.fromkeys(integers, "i32") | {"ratio_h": "fp32", "ratio_w": "fp32"}
        constants = configuration | {"stride_w": 1, "label_w": 1, "WITH_GRADIENT": with_gradient}
        name = f"cells {kind} {label} K={channels}{'' if with_gradient else ' forward only'}"
        yield CompileCase(
            name, _cell_kernel, signature, constants, warps, stages, main=kind == "bf16" and with_gradient
        )
    signature = {"parts": "*fp32", "gradient": "*fp32", "K": "i32", "h": "i32", "w": "i32"}
    yield CompileCase("gather K=21", _gather_kernel, signature, {"BLOCK_K": 32}, num_warps=1, main=True)
    for label in ("u8", "i64"):
        signature = {"labels": f"*{label}", "counts": "*fp32", "pixels": "i32", "ignore_index": "i32"}
        yield CompileCase(f"count {label}", _count_kernel, signature, {"BLOCK": COUNTED}, main=label == "u8")
