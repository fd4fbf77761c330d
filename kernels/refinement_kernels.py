"""Affinity, label softmax, iteration, labels: the Triton kernels of pixel-adaptive refinement.

Affinities are (B, n, h * w), maps (B, P, h * w), both float32: neighbouring threads hold neighbouring pixels.

Legend: B batch, M class slots, P maps (of both background scores), H W pixels, h w pixels of the halved image,
n neighbours.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, next_power_of_2, tl, triton

PLACE_WEIGHT = 0.01  # an affinity row is a softmax over colours plus this much of a softmax over places
COLOUR_SCALE = 0.3 * math.sqrt(3)  # mean over 3 channels of (Δ / σ / 0.3)² = Σ (Δ / (σ · 0.3 · √3))²
EPSILON = 1e-8
_PLACE_SCALE = 0.3
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
ROUNDING = 32  # units in the last place of the channels' sum, by which a class must beat the background
_MOST_MAPS = 8  # maps that one program refines for one load of an affinity; more take too many registers
_UNROLL = 4  # affinities under way at a time: one alone would leave the memory waiting


# --- kernels


@triton.jit
def _neighbour(offsets, index, row, column, h, w):
    """Place of a neighbour in the flattened image; beyond the border the border's pixel repeats."""
    y = row + tl.load(offsets + 2 * index)
    x = column + tl.load(offsets + 2 * index + 1)
    return tl.minimum(tl.maximum(y, 0), h - 1) * w + tl.minimum(tl.maximum(x, 0), w - 1)


@triton.jit
def _colour(image, pixels, place, mask):
    """Red, green and blue of some pixels of an image (3, pixels)."""
    red = tl.load(image + place, mask=mask, other=0.0).to(tl.float32)
    green = tl.load(image + pixels + place, mask=mask, other=0.0).to(tl.float32)
    blue = tl.load(image + 2 * pixels + place, mask=mask, other=0.0).to(tl.float32)
    return red, green, blue


@triton.jit
def _affinity(images, offsets, place, affinity, h, w, N, colour_scale, epsilon, BLOCK: tl.constexpr):
    """Affinities of a block of pixels. The neighbours' colours are read again in each pass: they lie in the L1."""
    pixel, pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), h * w
    inside = pixel < pixels
    row, column = pixel // w, pixel % w
    image = images + tl.program_id(1).to(tl.int64) * 3 * pixels
    target = affinity + tl.program_id(1).to(tl.int64) * N * pixels + pixel
    mean_r, mean_g, mean_b = (tl.zeros([BLOCK], tl.float32),) * 3
    for index in range(N):
        r, g, b = _colour(image, pixels, _neighbour(offsets, index, row, column, h, w), inside)
        mean_r, mean_g, mean_b = mean_r + r, mean_g + g, mean_b + b
    mean_r, mean_g, mean_b = mean_r / N, mean_g / N, mean_b / N
    var_r, var_g, var_b = (tl.zeros([BLOCK], tl.float32),) * 3
    for index in range(N):
        r, g, b = _colour(image, pixels, _neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = r - mean_r, g - mean_g, b - mean_b
        var_r, var_g, var_b = var_r + r * r, var_g + g * g, var_b + b * b
    scale_r = 1.0 / ((tl.sqrt(var_r / (N - 1)) + epsilon) * colour_scale)
    scale_g = 1.0 / ((tl.sqrt(var_g / (N - 1)) + epsilon) * colour_scale)
    scale_b = 1.0 / ((tl.sqrt(var_b / (N - 1)) + epsilon) * colour_scale)
    own_r, own_g, own_b = _colour(image, pixels, pixel, inside)
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(N):
        r, g, b = _colour(image, pixels, _neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = (r - own_r) * scale_r, (g - own_g) * scale_g, (b - own_b) * scale_b
        distance = r * r + g * g + b * b
        closer = tl.minimum(nearest, distance)
        total = total * tl.exp(closer - nearest) + tl.exp(closer - distance)
        nearest = closer
    for index in range(N):
        r, g, b = _colour(image, pixels, _neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = (r - own_r) * scale_r, (g - own_g) * scale_g, (b - own_b) * scale_b
        weight = tl.exp(nearest - (r * r + g * g + b * b)) / total + tl.load(place + index)
        tl.store(target, weight, mask=inside)
        target += pixels


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
            place = _neighbour(offsets, index, row, column, h, w)
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


# --- launch


def neighbour_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the places of the neighbours.

    Args:
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (dy, dx) in pixels of each neighbour, dilation by dilation.
    """
    return [(dilation * dy, dilation * dx) for dilation in dilations for dy, dx in _DIRECTIONS]


def place_weights(dilations: Sequence[int]) -> list[float]:
    """Return what a neighbour's place adds to its affinity: 0.01 of a softmax, the same at every pixel.

    Args:
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        One weight a neighbour, in the order of :func:`neighbour_offsets`; they sum to 0.01.

    Source: official code, pixel-adaptive refinement, position term.
    """
    distances = [math.hypot(dy, dx) for dy, dx in neighbour_offsets(dilations)]
    mean = math.fsum(distances) / len(distances)
    deviation = math.sqrt(math.fsum((distance - mean) ** 2 for distance in distances) / (len(distances) - 1))
    logits = [-((distance / (deviation + EPSILON) / _PLACE_SCALE) ** 2) for distance in distances]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [PLACE_WEIGHT * weight / math.fsum(weights) for weight in weights]


@functools.cache
def neighbours_on(device: torch.device, dilations: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Copies the neighbours' offsets and place weights to a device, once.

    Args:
        device: where the kernels run.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        Offsets (n, 2) int32 in pixels, weights (n) float32.
    """
    offsets = torch.tensor(neighbour_offsets(dilations), dtype=torch.int32, device=device)
    return offsets, torch.tensor(place_weights(dilations), dtype=torch.float32, device=device)


def launch_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weighs the neighbours of every pixel by colour and place.

    Args:
        images: (B, 3, h, w) float32, bfloat16 or float16.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, n, h * w) float32; the weights of a pixel sum to 1.01.

    Source: official code, pixel-adaptive refinement.
    """
    images = images.contiguous()
    B, _, h, w = images.shape
    offsets, place = neighbours_on(images.device, tuple(dilations))
    affinity = torch.empty(B, len(place), h * w, dtype=torch.float32, device=images.device)
    block, warps = pixel_config()
    with device_guard(images):
        _affinity[(triton.cdiv(h * w, block), B)](
            images, offsets, place, affinity, h, w, len(place), COLOUR_SCALE, EPSILON, BLOCK=block, num_warps=warps
        )
    return affinity


def pixel_config() -> tuple[int, int]:
    """Chooses the block of every kernel that walks over pixels.

    Returns:
        (pixels of a program, warps): one pixel a thread, enough programs for every multiprocessor.
    """
    return 128, 4


def launch_refinement(
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


def launch_labels(
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
    affinity = launch_affinity(images, dilations)
    block, warps = pixel_config()
    total = (1 + PLACE_WEIGHT) ** iterations
    rounding = ROUNDING * torch.finfo(torch.float32).eps * total
    with device_guard(cams):
        _foreground_softmax[(triton.cdiv(h * w, block), B)](
            cams, live, maps, backgrounds[0], backgrounds[1], h * w, M, BLOCK=block, num_warps=warps
        )
        maps = launch_refinement(affinity, maps, live, w, iterations, dilations)
        _label[(triton.cdiv(H * W, block), B)](
            maps, classes, live, labels, total, rounding, h, w, H, W, h / H, w / W, M, ignore_index,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return labels


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

    for image_kind in ("fp32", "bf16"):
        yield case(f"affinity {image_kind}", _affinity, main=image_kind == "fp32", kind=image_kind)
    for group in (2, _MOST_MAPS):
        yield case(f"refine {group} maps", _refine, main=group == _MOST_MAPS, GROUP=group, UNROLL=_UNROLL)
    yield case("softmax fp32", _foreground_softmax, main=True)
    yield case("softmax bf16", _foreground_softmax, kind="bf16")
    yield case("label", _label, main=True)
