"""How much every pixel resembles its neighbours: the affinities of pixel-adaptive refinement.

The Triton kernel, and the constants that the torch path shares with it. Affinities are (B, n, h * w): neighbouring
threads hold neighbouring pixels.

Legend: B batch, h w pixels of the halved image, n neighbours.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, tl, triton

PLACE_WEIGHT = 0.01  # an affinity row is a softmax over colours plus this much of a softmax over places
COLOUR_SCALE = 0.3 * math.sqrt(3)  # mean over 3 channels of (Δ / σ / 0.3)² = Σ (Δ / (σ · 0.3 · √3))²
EPSILON = 1e-8
_PLACE_SCALE = 0.3
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


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


def compute_affinity(images: Tensor, dilations: Sequence[int]) -> Tensor:
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


@triton.jit
def neighbour(offsets, index, row, column, h, w):
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
        r, g, b = _colour(image, pixels, neighbour(offsets, index, row, column, h, w), inside)
        mean_r, mean_g, mean_b = mean_r + r, mean_g + g, mean_b + b
    mean_r, mean_g, mean_b = mean_r / N, mean_g / N, mean_b / N
    var_r, var_g, var_b = (tl.zeros([BLOCK], tl.float32),) * 3
    for index in range(N):
        r, g, b = _colour(image, pixels, neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = r - mean_r, g - mean_g, b - mean_b
        var_r, var_g, var_b = var_r + r * r, var_g + g * g, var_b + b * b
    scale_r = 1.0 / ((tl.sqrt(var_r / (N - 1)) + epsilon) * colour_scale)
    scale_g = 1.0 / ((tl.sqrt(var_g / (N - 1)) + epsilon) * colour_scale)
    scale_b = 1.0 / ((tl.sqrt(var_b / (N - 1)) + epsilon) * colour_scale)
    own_r, own_g, own_b = _colour(image, pixels, pixel, inside)
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(N):
        r, g, b = _colour(image, pixels, neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = (r - own_r) * scale_r, (g - own_g) * scale_g, (b - own_b) * scale_b
        distance = r * r + g * g + b * b
        closer = tl.minimum(nearest, distance)
        total = total * tl.exp(closer - nearest) + tl.exp(closer - distance)
        nearest = closer
    for index in range(N):
        r, g, b = _colour(image, pixels, neighbour(offsets, index, row, column, h, w), inside)
        r, g, b = (r - own_r) * scale_r, (g - own_g) * scale_g, (b - own_b) * scale_b
        weight = tl.exp(nearest - (r * r + g * g + b * b)) / total + tl.load(place + index)
        tl.store(target, weight, mask=inside)
        target += pixels


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernel, for the ahead-of-time compile test."""
    block, warps = pixel_config()
    for kind in ("fp32", "bf16"):
        yield CompileCase(
            f"affinity {kind}",
            _affinity,
            {"images": f"*{kind}", "offsets": "*i32", "place": "*fp32", "affinity": "*fp32"}
            | {"h": "i32", "w": "i32", "N": "i32:16", "colour_scale": "fp32", "epsilon": "fp32"},
            {"BLOCK": block},
            num_warps=warps,
            main=kind == "fp32",
        )
