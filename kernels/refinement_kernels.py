"""Affinity, label softmax, iteration, labels: the Triton kernels of pixel-adaptive refinement.

A thread holds a pixel. Its neighbours' colours, or the values of a group of G maps, lie side by side and come with one
load of 16 bytes: colours (B, h * w, 4), maps (B, groups, h * w, G), both float32. Affinities are (B, n, h * w) float32.
The 8 neighbours of one dilation share their rows and columns; beyond the border the border's pixel repeats.

Legend: B batch, M class slots, H W pixels, h w pixels of the halved image, n neighbours, G maps of a group.
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


# --- kernels


@triton.jit
def _neighbour(row, column, dilation, direction: tl.constexpr, h, w):
    """Place of one of the 8 neighbours at a dilation in the flattened image, in the order of `_DIRECTIONS`."""
    cell: tl.constexpr = direction + direction // 4  # of a square of 9, whose middle is the pixel itself
    y = tl.minimum(tl.maximum(row + dilation * (cell // 3 - 1), 0), h - 1)
    x = tl.minimum(tl.maximum(column + dilation * (cell % 3 - 1), 0), w - 1)
    return y * w + x


@triton.jit
def _colours(image, place):
    """Red, green, blue and 0 of some pixels of an image: (BLOCK, 4)."""
    return tl.load(image + place[:, None] * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def _affinity(images, dilations, place, affinity, h, w, COUNT, colour_scale, epsilon, BLOCK: tl.constexpr):
    """Affinities of a block of pixels. The neighbours' colours are read again in each pass: they lie in the L1.

    Distances are scaled so that exp(-distance) is 2 to its power.
    """
    pixels = h * w
    own_place = tl.minimum(
        tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), pixels - 1
    )  # the last pixel repeats at the end
    row, column = own_place // w, own_place % w
    image = images + tl.program_id(1).to(tl.int64) * 4 * pixels
    target = affinity + tl.program_id(1).to(tl.int64) * COUNT * 8 * pixels + own_place
    mean = tl.zeros([BLOCK, 4], tl.float32)
    for index in range(COUNT):
        dilation = tl.load(dilations + index)
        for direction in tl.static_range(8):
            mean += _colours(image, _neighbour(row, column, dilation, direction, h, w))
    mean = mean / (COUNT * 8)
    variance = tl.zeros([BLOCK, 4], tl.float32)
    for index in range(COUNT):
        dilation = tl.load(dilations + index)
        for direction in tl.static_range(8):
            centred = _colours(image, _neighbour(row, column, dilation, direction, h, w)) - mean
            variance += centred * centred
    scale = 1.0 / ((tl.sqrt(variance / (COUNT * 8 - 1)) + epsilon) * colour_scale)
    own = _colours(image, own_place)
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(COUNT):
        dilation = tl.load(dilations + index)
        for direction in tl.static_range(8):
            change = (_colours(image, _neighbour(row, column, dilation, direction, h, w)) - own) * scale
            distance = tl.sum(change * change, 1)
            closer = tl.minimum(nearest, distance)
            total = total * tl.exp2(closer - nearest) + tl.exp2(closer - distance)
            nearest = closer
    for index in range(COUNT):
        dilation = tl.load(dilations + index)
        for direction in tl.static_range(8):
            change = (_colours(image, _neighbour(row, column, dilation, direction, h, w)) - own) * scale
            weight = tl.exp2(nearest - tl.sum(change * change, 1)) / total + tl.load(place + index * 8 + direction)
            tl.store(target, weight)
            target += pixels


@triton.jit
def _refine(
    affinity, maps, live, dilations, output, h, w, COUNT, M, SHARE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One iteration for a block of pixels of a group of maps; groups without a live slot are left alone."""
    image, pixels = tl.program_id(2).to(tl.int64), h * w
    lane = tl.arange(0, GROUP)
    slot = (tl.program_id(1) * GROUP + lane) // SHARE
    if tl.max(tl.load(live + image * M + slot, mask=slot < M, other=0).to(tl.int32), 0) > 0:
        own_place = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), pixels - 1)  # some twice, at the end
        row, column = own_place // w, own_place % w
        first = (image * tl.num_programs(1) + tl.program_id(1)) * pixels * GROUP
        group = maps + first
        weights = affinity + image * COUNT * 8 * pixels + own_place
        total = tl.zeros([BLOCK, GROUP], tl.float32)
        for index in range(COUNT):
            dilation = tl.load(dilations + index)
            for direction in tl.static_range(8):
                place = _neighbour(row, column, dilation, direction, h, w)
                total += tl.load(weights)[:, None] * tl.load(group + place[:, None] * GROUP + lane[None, :])
                weights += pixels
        tl.store(output + first + own_place[:, None] * GROUP + lane[None, :], total)


@triton.jit
def _foreground_softmax(
    cams, live, maps, high, low, pixels, M, GROUPS, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Softmax over a constant background and the live slots; a slot's maps for both backgrounds lie side by side."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    source = cams + (image * M).to(tl.int64) * pixels + pixel
    target = maps + (image * GROUPS).to(tl.int64) * pixels * GROUP + pixel * GROUP
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
    for slot in range(GROUPS * GROUP // 2):  # a dead slot's maps are 0, as are those beyond the last
        mask = inside & (tl.load(live + image * M + slot, mask=slot < M, other=0) != 0)
        score = tl.load(source + slot * pixels, mask=mask, other=float("-inf")).to(tl.float32)
        both = target + (2 * slot // GROUP) * pixels * GROUP + 2 * slot % GROUP
        tl.store(both, tl.exp(score - top_high) / total_high, mask=inside)
        tl.store(both + 1, tl.exp(score - top_low) / total_low, mask=inside)


@triton.jit
def _taps(position, scale, length):
    """Bilinear taps of output positions (align_corners=False): two samples and the share of the second."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), length - 1)
    return first, tl.minimum(first + 1, length - 1), source - first.to(tl.float32)


@triton.jit
def _resize(plane, top, bottom, left, right, down, across, mask):
    """Bilinear samples of one map; rows and columns are given as memory offsets."""
    upper_left = tl.load(plane + top + left, mask=mask, other=0.0)
    upper_right = tl.load(plane + top + right, mask=mask, other=0.0)
    lower_left = tl.load(plane + bottom + left, mask=mask, other=0.0)
    lower_right = tl.load(plane + bottom + right, mask=mask, other=0.0)
    upper = (1 - across) * upper_left + across * upper_right
    lower = (1 - across) * lower_left + across * lower_right
    return (1 - down) * upper + down * lower


@triton.jit
def _label(
    maps, classes, live, labels, total, rounding, h, w, H, W, scale_y, scale_x, M, GROUPS, ignore_index,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Resize the slots of both backgrounds, compare the classes with what they leave, and merge the labels."""
    image = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < H * W
    top, bottom, down = _taps(pixel // W, scale_y, h)
    left, right, across = _taps(pixel % W, scale_x, w)
    top, bottom, left, right = top * w * GROUP, bottom * w * GROUP, left * GROUP, right * GROUP
    best_high, best_low = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    left_high, left_low = tl.full([BLOCK], total, tl.float32), tl.full([BLOCK], total, tl.float32)
    label = tl.zeros([BLOCK], tl.int32)
    for slot in range(M):
        mask = inside & (tl.load(live + image * M + slot) != 0)
        value = tl.load(classes + image * M + slot).to(tl.int32) + 1
        both = maps + (image * GROUPS + 2 * slot // GROUP).to(tl.int64) * h * w * GROUP + 2 * slot % GROUP
        value_high = _resize(both, top, bottom, left, right, down, across, mask)
        value_low = _resize(both + 1, top, bottom, left, right, down, across, mask)
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
        One weight per neighbour, in the order of :func:`neighbour_offsets`; they sum to 0.01.

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
    """Copy the dilations and the neighbours' place weights to a device, once.

    Args:
        device: where the kernels run.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        Dilations (n / 8) int32 in pixels, weights (n) float32.
    """
    distances = torch.tensor(dilations, dtype=torch.int32, device=device)
    return distances, torch.tensor(place_weights(dilations), dtype=torch.float32, device=device)


def launch_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weight the neighbours of every pixel by colour and place.

    Args:
        images: (B, 3, h, w) float32, bfloat16 or float16.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, n, h * w) float32; the weights of a pixel sum to 1.01.

    Source: official code, pixel-adaptive refinement.
    """
    B, _, h, w = images.shape
    distances, place = neighbours_on(images.device, tuple(dilations))
    colours = images.new_zeros((B, h * w, 4), dtype=torch.float32)
    colours[:, :, :3] = images.flatten(2).mT
    affinity = colours.new_empty(B, len(place), h * w)
    block, warps = pixel_config()
    scale = COLOUR_SCALE / math.sqrt(math.log2(math.e))
    with device_guard(images):
        _affinity[(triton.cdiv(h * w, block), B)](
            colours, distances, place, affinity, h, w, len(dilations), scale, EPSILON, BLOCK=block, num_warps=warps
        )  # fmt: skip
    return affinity


def pixel_config() -> tuple[int, int]:
    """Choose the block of every kernel that walks over pixels.

    Returns:
        (pixels of a program, warps): one pixel per thread, enough programs for every multiprocessor.
    """
    return 128, 4


def group_size(maps: int) -> int:
    """Number of maps stored side by side: four are one load of 16 bytes."""
    return min(4, next_power_of_2(maps))


def launch_refinement(
    affinity: Tensor, maps: Tensor, live: Tensor, width: int, iterations: int, dilations: Sequence[int]
) -> Tensor:
    """Replace, in every iteration, each pixel of the live maps by the mean of its neighbours.

    Args:
        affinity: (B, n, h * w) float32.
        maps: (B, groups, h * w, G) float32, contiguous; overwritten.
        live: (B, M) bool, contiguous; the maps of slot m are m, or 2 m and 2 m + 1 where there are as many.
        width: w, in pixels.
        iterations: their number.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, groups, h * w, G) float32; dead maps are undefined.
    """
    B, groups, pixels, group = maps.shape
    distances, _ = neighbours_on(maps.device, tuple(dilations))
    following = torch.empty_like(maps)
    block, warps = pixel_config()
    share = 2 if groups * group >= 2 * live.shape[1] else 1
    with device_guard(maps):
        for _ in range(iterations):
            _refine[(triton.cdiv(pixels, block), groups, B)](
                affinity, maps, live, distances, following, pixels // width, width, len(dilations), live.shape[1],
                SHARE=share, GROUP=group, BLOCK=block, num_warps=warps,
            )  # fmt: skip
            maps, following = following, maps
    return maps


def launch_maps(images: Tensor, maps: Tensor, iterations: int, dilations: Sequence[int]) -> Tensor:
    """Results of ``fsr::pixel_adaptive_refinement`` for images (B, 3, h, w) and maps (B, M, h, w)."""
    B, M, _, w = maps.shape
    group = group_size(M)
    groups = triton.cdiv(M, group)
    packed = maps.new_zeros((B, groups * group, maps[0, 0].numel()), dtype=torch.float32)
    packed[:, :M] = maps.flatten(2)
    packed = packed.unflatten(1, (groups, group)).mT.contiguous()
    live = torch.ones(B, groups * group, dtype=torch.bool, device=maps.device)
    refined = launch_refinement(launch_affinity(images, dilations), packed, live, w, iterations, dilations)
    return refined.mT.flatten(1, 2)[:, :M].unflatten(2, (-1, w)).contiguous()


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
    """Results of ``fsr::refine_pseudo_labels``: softmax, affinity, iterations and labels."""
    cams, classes, live = cams.contiguous(), classes.contiguous(), live.contiguous()
    B, M, h, w = cams.shape
    H, W = size
    group = group_size(2 * M)
    groups = triton.cdiv(2 * M, group)
    labels = torch.empty(B, H, W, dtype=torch.uint8, device=cams.device)
    maps = torch.empty(B, groups, h * w, group, dtype=torch.float32, device=cams.device)
    affinity = launch_affinity(images, dilations)
    block, warps = pixel_config()
    total = (1 + PLACE_WEIGHT) ** iterations
    rounding = ROUNDING * torch.finfo(torch.float32).eps * total
    with device_guard(cams):
        _foreground_softmax[(triton.cdiv(h * w, block), B)](
            cams, live, maps, backgrounds[0], backgrounds[1], h * w, M, groups,
            GROUP=group, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        maps = launch_refinement(affinity, maps, live, w, iterations, dilations)
        _label[(triton.cdiv(H * W, block), B)](
            maps, classes, live, labels, total, rounding, h, w, H, W, h / H, w / W, M, groups, ignore_index,
            GROUP=group, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return labels


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernels, for the ahead-of-time compile test."""
    block, warps = pixel_config()
    pointers = {"images": "*fp32", "cams": "*fp32", "maps": "*fp32", "output": "*fp32", "affinity": "*fp32"}
    pointers |= {"place": "*fp32", "dilations": "*i32", "live": "*i1", "classes": "*i64", "labels": "*u8"}
    integers = dict.fromkeys(("h", "w", "H", "W", "M", "COUNT", "GROUPS", "pixels", "ignore_index"), "i32")
    floats = ("colour_scale", "epsilon", "high", "low", "total", "rounding", "scale_y", "scale_x")
    types = pointers | integers | dict.fromkeys(floats, "fp32")

    def case(name: str, kernel: Any, main: bool = False, kind: str = "fp32", **constants: int) -> CompileCase:
        constants["BLOCK"] = block
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        signature |= {argument: f"*{kind}" for argument in ("cams",) if argument in signature}
        return CompileCase(name, kernel, signature, constants, num_warps=warps, main=main)

    yield case("affinity", _affinity, main=True)
    for group in (2, 4):
        yield case(f"refine {group} maps", _refine, main=group == 4, GROUP=group, SHARE=2)
    yield case("softmax fp32", _foreground_softmax, main=True, GROUP=4)
    yield case("softmax bf16", _foreground_softmax, kind="bf16", GROUP=4)
    yield case("label", _label, main=True, GROUP=4)
