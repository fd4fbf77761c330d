"""Pixel-adaptive refinement and the pseudo labels from it (official code).

In every iteration each pixel of a map becomes the weighted mean of 48 neighbours (8 directions at 6 dilations);
similar colours weigh more. The weights (*affinity*) depend on the image alone: they are computed once per image and
shared by the maps of both background scores.

Two facts save work. The affinities of a pixel sum to 1.01, softmax channels sum to 1, and refining and resizing are
linear: so the channels still sum to 1.01 ** iterations afterwards, and the background channel is what the foreground
leaves. Only the foreground is refined. Maps of dead slots are neither refined nor compared.

Legend: B batch, M class slots, H W pixels, h w pixels of the halved image, n neighbours.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton
from .refinement_kernels import (
    COLOUR_SCALE,
    EPSILON,
    PLACE_WEIGHT,
    ROUNDING,
    launch_labels,
    launch_maps,
    neighbour_offsets,
    place_weights,
)

DILATIONS = (1, 2, 4, 8, 12, 24)


# --- torch path, on planes (P, h, w, B): with the batch innermost a shifted view is one run of w * B numbers, so that
# small images are as fast as large ones


def _to_planes(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, P, h, w) to a new contiguous (P, h, w, B)."""
    return maps.permute(1, 2, 3, 0).to(dtype, memory_format=torch.contiguous_format, copy=True).contiguous()


def _pad_planes(planes: Tensor, border: int) -> Tensor:
    """Repeat the border's pixels outwards: (P, h + 2 border, w + 2 border, B)."""
    P, h, w, B = planes.shape
    padded = planes.new_empty(P, h + 2 * border, w + 2 * border, B)
    padded[:, border : border + h, border : border + w] = planes
    return _fill_border(padded, border)


def _fill_border(padded: Tensor, border: int) -> Tensor:
    inside = padded[:, border:-border]
    inside[:, :, :border] = inside[:, :, border : border + 1]
    inside[:, :, -border:] = inside[:, :, -border - 1 : -border]
    padded[:, :border] = padded[:, border : border + 1]
    padded[:, -border:] = padded[:, -border - 1 : -border]
    return padded


def _neighbour_views(padded: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """Each neighbour's (P, h, w, B) view of the padded planes."""
    border = max(dilations)
    h, w = padded.shape[1] - 2 * border, padded.shape[2] - 2 * border
    return [
        padded[:, border + dy : border + dy + h, border + dx : border + dx + w]
        for dy, dx in neighbour_offsets(dilations)
    ]


def _affinity_planes(colours: Tensor, dilations: Sequence[int]) -> Tensor:
    """Affinity of every pixel to its neighbours, (n, h, w, B), from colours (3, h, w, B)."""
    views = _neighbour_views(_pad_planes(colours, max(dilations)), dilations)
    mean = torch.zeros_like(colours)
    for view in views:
        mean += view
    mean /= len(views)
    variance, difference = torch.zeros_like(colours), torch.empty_like(colours)
    for view in views:
        torch.sub(view, mean, out=difference)
        variance.addcmul_(difference, difference)
    scale = (variance.div_(len(views) - 1).sqrt_().add_(EPSILON).mul_(COLOUR_SCALE)).reciprocal_()
    logits = colours.new_empty(len(views), *colours.shape[1:])
    for view, logit in zip(views, logits, strict=True):
        torch.sub(view, colours, out=difference).mul_(scale)
        torch.mul(difference[0], difference[0], out=logit)
        logit.addcmul_(difference[1], difference[1]).addcmul_(difference[2], difference[2])
    place = logits.new_tensor(place_weights(dilations))
    return logits.neg_().softmax(dim=0).add_(place[:, None, None, None])


def _refine_planes(affinity: Tensor, maps: Tensor, iterations: int, dilations: Sequence[int]) -> Tensor:
    """Refined planes (P, h, w, B) from affinity (n, h, w, B) and maps (P, h, w, B)."""
    border = max(dilations)
    _, h, w, _ = maps.shape
    current = _pad_planes(maps, border)
    following = torch.empty_like(current)
    for _ in range(iterations):
        inside = following[:, border : border + h, border : border + w].zero_()
        for weight, view in zip(affinity, _neighbour_views(current, dilations), strict=True):
            inside.addcmul_(weight, view)
        current, following = _fill_border(following, border), current
    return current[:, border : border + h, border : border + w]


def _label_planes(foreground: Tensor, classes: Tensor, total: float, size: Sequence[int]) -> Tensor:
    """Resize (2, M, h, w, B) foreground channels and return the winner's label, (2, B, H, W) uint8.

    The background is what the channels leave of `total`. Rounding could lift a class above a background that equals
    it, so a class must win by more than that.
    """
    _, M, h, w, B = foreground.shape
    rounding = ROUNDING * torch.finfo(foreground.dtype).eps * total
    best = label = background = foreground.new_empty(0)
    for slot in range(M):
        channel = foreground[:, slot].permute(0, 3, 1, 2).reshape(1, 2 * B, h, w)
        channel = F.interpolate(channel, size=tuple(size), mode="bilinear", align_corners=False).view(2, B, *size)
        value = (classes[:, slot] + 1).to(torch.uint8)[None, :, None, None].expand_as(channel)
        if slot == 0:
            best, label, background = channel, value, total - channel
        else:
            background -= channel
            label = torch.where(channel > best, value, label)
            best = torch.maximum(best, channel)
    return torch.where(best > background + rounding, label, 0)


def _working_dtype(images: Tensor, maps: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(images.dtype, maps.dtype), torch.float32)


def _require_single_precision(images: Tensor, maps: Tensor) -> None:
    require_dtype("images", images, FEATURE_DTYPES)
    require_dtype("maps", maps, FEATURE_DTYPES)


# --- registration


@torch.library.custom_op("fsr::pixel_adaptive_refinement", mutates_args=())
def pixel_adaptive_refinement_op(images: Tensor, maps: Tensor, iterations: int, dilations: list[int]) -> Tensor:
    """Refine checked maps; arguments as in :func:`pixel_adaptive_refinement`."""
    dtype = _working_dtype(images, maps)
    if maps.numel() == 0:
        return maps.new_empty(maps.shape, dtype=dtype)
    if use_triton(images):
        _require_single_precision(images, maps)
        return launch_maps(images, maps, iterations, dilations)
    affinity = _affinity_planes(_to_planes(images, dtype), dilations)
    refined = _refine_planes(affinity, _to_planes(maps, dtype), iterations, dilations)
    return refined.permute(3, 0, 1, 2).contiguous()


@pixel_adaptive_refinement_op.register_fake
def _(images, maps, iterations, dilations):
    return maps.new_empty(maps.shape, dtype=_working_dtype(images, maps))


@torch.library.custom_op("fsr::refine_pseudo_labels", mutates_args=())
def refine_pseudo_labels_op(
    images: Tensor,
    cams: Tensor,
    classes: Tensor,
    live: Tensor,
    backgrounds: list[float],
    size: list[int],
    iterations: int,
    dilations: list[int],
    ignore_index: int,
) -> Tensor:
    """Label checked maps; arguments as in :func:`refine_pseudo_labels`, `backgrounds` = [high, low]."""
    if use_triton(images):
        _require_single_precision(images, cams)
        return launch_labels(images, cams, classes, live, backgrounds, size, iterations, dilations, ignore_index)
    dtype = _working_dtype(images, cams)
    used = live.any(dim=0).nonzero().flatten()  # slots that are dead in every image cost nothing
    if len(used) == 0:
        return images.new_zeros((len(images), *size), dtype=torch.uint8)
    live = live[:, used]
    maps = _to_planes(cams[:, used], dtype).masked_fill_(~live.T[:, None, None, :], -math.inf)
    scores = maps.new_empty(2, len(used) + 1, *maps.shape[1:])  # (threshold, background + slots, h, w, B)
    scores[:, 1:] = maps
    scores[:, 0] = scores.new_tensor(backgrounds)[:, None, None, None]
    foreground = scores.softmax(dim=1)[:, 1:].reshape(-1, *maps.shape[1:])
    affinity = _affinity_planes(_to_planes(images, dtype), dilations)
    refined = _refine_planes(affinity, foreground, iterations, dilations)
    total = (1 + PLACE_WEIGHT) ** iterations
    high, low = _label_planes(refined.unflatten(0, (2, len(used))), classes[:, used], total, size)
    return torch.where((high == 0) & (low != 0), ignore_index, high)


@refine_pseudo_labels_op.register_fake
def _(images, cams, classes, live, backgrounds, size, iterations, dilations, ignore_index):
    return images.new_empty((images.shape[0], *size), dtype=torch.uint8)


# --- public functions


def pixel_adaptive_refinement(
    images: Tensor, maps: Tensor, *, iterations: int = 10, dilations: Sequence[int] = DILATIONS
) -> Tensor:
    """Replace, in every iteration, each pixel of the maps by a mean of its neighbours; similar colours weigh more.

    The weights of a pixel sum to 1.01, so the maps grow by 1 % per iteration. No gradient.

    Args:
        images: (B, 3, h, w) floating, any range, used as given.
        maps: (B, M, h, w) floating.
        iterations: their number, at least 0.
        dilations: distances of the 8 neighbours, in pixels, at least 1; beyond the border the border's pixel repeats.

    Returns:
        (B, M, h, w) float32, the refined maps (float64 where an input is float64, on the CPU only).

    Raises:
        ValueError: a shape, `iterations` or `dilations` does not fit, or devices differ.
        TypeError: a dtype is not floating.

    Source: official code, pixel-adaptive refinement.
    """
    _check_pixels(images, "maps", maps, iterations, dilations)
    return pixel_adaptive_refinement_op(images.detach(), maps.detach(), iterations, list(dilations))


def refine_pseudo_labels(
    images: Tensor,
    cams: Tensor,
    classes: Tensor,
    live: Tensor,
    *,
    high: float = 0.7,
    low: float = 0.25,
    size: tuple[int, int],
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
    ignore_index: int = 255,
) -> Tensor:
    """Refine the maps against a high and a low background and keep the labels on which both agree.

    Background and live classes pass a softmax, pixel-adaptive refinement, bilinear resizing (align_corners=False) and
    argmax (ties go to the lowest channel; channels within rounding of the background tie with it). A pixel
    that is foreground against `high` keeps that class; one that is background against both is background; the others
    are ignored.

    Args:
        images: (B, 3, h, w) floating, denormalised and halved, in any range.
        cams: (B, M, h, w) floating, normalised maps of the present classes, halved.
        classes: (B, M) int64, 0-based foreground class of each slot, in [0, 255) and below ignore_index - 1.
        live: (B, M) bool, slots that hold a class; the others are left out of the softmax and the argmax.
        high: background score that a class must beat to be labelled.
        low: background score that all classes must stay below to label background.
        size: (H, W) of the result, in pixels.
        iterations: of the refinement, at least 0.
        dilations: of the refinement, in pixels, at least 1.
        ignore_index: label of the pixels where the two disagree, in [0, 255].

    Returns:
        (B, H, W) uint8: 0 background, class + 1, ignore_index.

    Raises:
        ValueError: a shape, `size`, `iterations`, `dilations` or `ignore_index` does not fit, or devices differ.
        TypeError: a dtype does not fit.

    Source: official code, refinement with two background scores.
    """
    _check_pixels(images, "cams", cams, iterations, dilations)
    if classes.shape != cams.shape[:2] or live.shape != cams.shape[:2]:
        raise ValueError(
            f"classes {tuple(classes.shape)} and live {tuple(live.shape)} must be (B, M) = {tuple(cams.shape[:2])}"
        )
    require_dtype("classes", classes, (torch.int64,))
    require_dtype("live", live, (torch.bool,))
    require_same_device(images=images, classes=classes, live=live)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}; expected (H, W) of at least one pixel each")
    if not 0 <= ignore_index <= 255:
        raise ValueError(f"ignore_index is {ignore_index}; the labels are uint8, give one in [0, 255]")
    return refine_pseudo_labels_op(
        images.detach(),
        cams.detach(),
        classes,
        live,
        [float(high), float(low)],
        list(size),
        iterations,
        list(dilations),
        ignore_index,
    )


def _check_pixels(images: Tensor, name: str, maps: Tensor, iterations: int, dilations: Sequence[int]) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, h, w) with B, h, w >= 1")
    if maps.dim() != 4 or maps.shape[0] != images.shape[0] or maps.shape[2:] != images.shape[2:]:
        B, _, h, w = images.shape
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; expected (B, M, h, w) = ({B}, M, {h}, {w})")
    require_dtype("images", images, (*FEATURE_DTYPES, torch.float64))
    require_dtype(name, maps, (*FEATURE_DTYPES, torch.float64))
    require_same_device(images=images, maps=maps)
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; expected 0 or more")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations is {tuple(dilations)}; expected one or more distances of at least 1 pixel")
