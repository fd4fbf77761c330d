"""Triton kernels of pixel-adaptive refinement: label softmax, iteration, labels.

Affinities are (B, n, h * w), maps (B, P, h * w), both float32: neighbouring threads hold neighbouring pixels.

Legend: B batch, M class slots, P maps (of both background scores), H W pixels, h w pixels of the halved image,
n neighbours.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, next_power_of_2, tl, triton
from .pixel_affinity import PLACE_WEIGHT, compute_affinity, neighbour, neighbours_on, pixel_config

ROUNDING = 32  # units in the last place of the channels' sum, by which a class must beat the background
_MOST_MAPS = 8  # maps that one program refines for one load of an affinity; more take too many registers
_UNROLL = 4  # affinities under way at a time: one alone would leave the memory waiting


def refine_maps(
    affinity: Tensor, maps: Tensor, live: Tensor, width: int, iterations: int, dilations: Sequence[int]
) -> Tensor:
    """Replaces every pixel of the live maps, again and again, by the mean of its neighbours.

    Args:
        affinity: (B, n, h * w) float32.
        maps: (B, P, h * w) float32, contiguous; overwritten.
        live: (B, M) bool, contiguous; map p belongs to slot p % M.
        width: w, in pixels.
        iterations: how often.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, P, h * w) float32; what dead maps hold is left open.
    """
    B, P, pixels = maps.shape
    offsets, place = neighbours_on(maps.device, tuple(dilations))
    following = torch.empty_like(maps)
    block, warps = pixel_config()
    group = min(_MOST_MAPS, next_power_of_2(P))
    with device_guard(maps):
        for _ in range(iterations):
            _refine[(triton.cdiv(pixels, block), triton.cdiv(P, group), B)](
                affinity, maps, live, offsets, following, pixels // width, width, len(place), P, live.shape[1],
                GROUP=group, BLOCK=block, UNROLL=_UNROLL, num_warps=warps,
            )  # fmt: skip
            maps, following = following, maps
    return maps


def label_pixels(
    images: Tensor,
    cams: Tensor,
    classes: Tensor,
    live: Tensor,
    backgrounds: Sequence[float],
    size: Sequence[int],
    iterations: int,
    dilations: Sequence[int],
    ignore_index: int,
) -> Tensor:
    """Pseudo labels of checked maps, see ``refine_pseudo_labels``: softmax, affinity, iterations and labels.

    Args:
        images: (B, 3, h, w) float32, bfloat16 or float16.
        cams: (B, M, h, w) of the same dtypes.
        classes: (B, M) int64.
        live: (B, M) bool.
        backgrounds: high and low background score.
        size: (H, W) in pixels.
        iterations: of the refinement.
        dilations: of the refinement, in pixels.
        ignore_index: label of the pixels where the two disagree.

    Returns:
        (B, H, W) uint8.
    """
    cams, classes, live = cams.contiguous(), classes.contiguous(), live.contiguous()
    B, M, h, w = cams.shape
    H, W = size
    labels = torch.empty(B, H, W, dtype=torch.uint8, device=cams.device)
    maps = torch.empty(B, 2 * M, h * w, dtype=torch.float32, device=cams.device)
    affinity = compute_affinity(images, dilations)
    block, warps = pixel_config()
    total = (1 + PLACE_WEIGHT) ** iterations
    rounding = ROUNDING * torch.finfo(torch.float32).eps * total
    with device_guard(cams):
        _foreground_softmax[(triton.cdiv(h * w, block), B)](
            cams, live, maps, backgrounds[0], backgrounds[1], h * w, M, BLOCK=block, num_warps=warps
        )
        maps = refine_maps(affinity, maps, live, w, iterations, dilations)
        _label[(triton.cdiv(H * W, block), B)](
            maps, classes, live, labels, total, rounding, h, w, H, W, h / H, w / W, M, ignore_index,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return labels


@triton.jit
def _refine(
    affinity, maps, live, offsets, output, h, w, N, P, M, GROUP: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """One iteration for a block of pixels of a group of maps; dead maps are neither read nor written."""
    image, pixels = tl.program_id(2), h * w
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = pixel // w, pixel % w
    channel = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    alive = tl.load(live + image * M + channel % M, mask=channel < P, other=0).to(tl.int32)
    if tl.max(alive, 0) > 0:
        inside = pixel < pixels
        mask = (alive > 0)[:, None] & inside[None, :]
        first = (image * P + channel).to(tl.int64)[:, None] * pixels
        weights = affinity + image.to(tl.int64) * N * pixels + pixel
        total = tl.zeros([GROUP, BLOCK], tl.float32)
        for index in tl.range(0, N, loop_unroll_factor=UNROLL):
            place = neighbour(offsets, index, row, column, h, w)
            weight = tl.load(weights, mask=inside, other=0.0)
            total += weight[None, :] * tl.load(maps + first + place[None, :], mask=mask, other=0.0)
            weights += pixels
        tl.store(output + first + pixel[None, :], total, mask=mask)


@triton.jit
def _foreground_softmax(cams, live, maps, high, low, pixels, M, BLOCK: tl.constexpr):
    """Softmax over a constant background and the live slots, for both backgrounds; stores (B, 2 M, pixels)."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    source = cams + (image * M).to(tl.int64) * pixels + pixel
    target = maps + (image * 2 * M).to(tl.int64) * pixels + pixel
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for slot in range(M):
        mask = inside & (tl.load(live + image * M + slot) != 0)
        top = tl.maximum(top, tl.load(source + slot * pixels, mask=mask, other=float("-inf")).to(tl.float32))
    top_high, top_low = tl.maximum(top, high), tl.maximum(top, low)
    total_high, total_low = tl.exp(high - top_high), tl.exp(low - top_low)
    for slot in range(M):
        mask = inside & (tl.load(live + image * M + slot) != 0)
        score = tl.load(source + slot * pixels, mask=mask, other=float("-inf")).to(tl.float32)
        total_high, total_low = total_high + tl.exp(score - top_high), total_low + tl.exp(score - top_low)
    for slot in range(M):
        mask = inside & (tl.load(live + image * M + slot) != 0)
        score = tl.load(source + slot * pixels, mask=mask, other=float("-inf")).to(tl.float32)
        tl.store(target + slot * pixels, tl.exp(score - top_high) / total_high, mask=inside)
        tl.store(target + (M + slot) * pixels, tl.exp(score - top_low) / total_low, mask=inside)


@triton.jit
def _taps(position, scale, length):
    """Bilinear taps of output positions (align_corners=False): two samples and the share of the second."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), length - 1)
    return first, tl.minimum(first + 1, length - 1), source - first.to(tl.float32)


@triton.jit
def _resize(plane, top, bottom, left, right, down, across, w, mask):
    """Bilinear samples of one map (h, w)."""
    upper_left = tl.load(plane + top * w + left, mask=mask, other=0.0)
    upper_right = tl.load(plane + top * w + right, mask=mask, other=0.0)
    lower_left = tl.load(plane + bottom * w + left, mask=mask, other=0.0)
    lower_right = tl.load(plane + bottom * w + right, mask=mask, other=0.0)
    upper = (1 - across) * upper_left + across * upper_right
    lower = (1 - across) * lower_left + across * lower_right
    return (1 - down) * upper + down * lower


@triton.jit
def _label(
    maps, classes, live, labels, total, rounding, h, w, H, W, scale_y, scale_x, M, ignore_index, BLOCK: tl.constexpr
):
    """Resizes the slots of both backgrounds, lets the classes compete with what they leave, and merges the labels."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < H * W
    top, bottom, down = _taps(pixel // W, scale_y, h)
    left, right, across = _taps(pixel % W, scale_x, w)
    plane = maps + (image * 2 * M).to(tl.int64) * h * w
    best_high, best_low = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    left_high, left_low = tl.full([BLOCK], total, tl.float32), tl.full([BLOCK], total, tl.float32)
    label = tl.zeros([BLOCK], tl.int32)
    for slot in range(M):
        mask = inside & (tl.load(live + image * M + slot) != 0)
        value = tl.load(classes + image * M + slot).to(tl.int32) + 1
        value_high = _resize(plane + slot * h * w, top, bottom, left, right, down, across, w, mask)
        value_low = _resize(plane + (M + slot) * h * w, top, bottom, left, right, down, across, w, mask)
        label = tl.where(value_high > best_high, value, label)
        best_high, best_low = tl.maximum(best_high, value_high), tl.maximum(best_low, value_low)
        left_high, left_low = left_high - value_high, left_low - value_low
    otherwise = tl.where(best_low > left_low + rounding, ignore_index, 0)
    label = tl.where(best_high > left_high + rounding, label, otherwise)
    tl.store(labels + image.to(tl.int64) * H * W + pixel, label, mask=inside)


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernels, for the ahead-of-time compile test."""
    block, warps = pixel_config()
    pointers = {"images": "*fp32", "cams": "*fp32", "maps": "*fp32", "output": "*fp32", "affinity": "*fp32"}
    pointers |= {"place": "*fp32", "offsets": "*i32", "live": "*i1", "classes": "*i64", "labels": "*u8"}
    integers = dict.fromkeys(("h", "w", "H", "W", "P", "M", "pixels", "ignore_index"), "i32") | {"N": "i32:16"}
    floats = ("colour_scale", "epsilon", "high", "low", "total", "rounding", "scale_y", "scale_x")
    types = pointers | integers | dict.fromkeys(floats, "fp32")

    def case(name: str, kernel: Any, main: bool = False, kind: str = "fp32", **constants: int) -> CompileCase:
        constants["BLOCK"] = block
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        signature |= {argument: f"*{kind}" for argument in ("images", "cams") if argument in signature}
        return CompileCase(name, kernel, signature, constants, num_warps=warps, main=main)

    for group in (2, _MOST_MAPS):
        yield case(f"refine {group} maps", _refine, main=group == _MOST_MAPS, GROUP=group, UNROLL=_UNROLL)
    yield case("softmax fp32", _foreground_softmax, main=True)
    yield case("softmax bf16", _foreground_softmax, kind="bf16")
    yield case("label", _label, main=True)
