"""Pseudo labels for segmentation: pixel-adaptive refinement and two thresholds (official code)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cam import present_classes
from .checks import require_shape

DILATIONS = (1, 2, 4, 8, 12, 24)
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@torch.no_grad()
def pixel_adaptive_refinement(
    images: Tensor, maps: Tensor, *, iterations: int = 10, dilations: Sequence[int] = DILATIONS
) -> Tensor:
    """Replace, in every iteration, each pixel of the maps by a mean of its neighbours; similar colours weigh more.

    Args:
        images: (B, 3, h, w) floating, any range.
        maps: (B, M, h, w) floating.
        iterations: their number.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, M, h, w), the refined maps.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, pixel-adaptive refinement.
    """
    require_shape("images", images, "B", 3, "h", "w")
    B, _, h, w = images.shape
    require_shape("maps", maps, B, "M", h, w)
    neighbours = unfold_neighbours(images, dilations)  # (B, 3, n, h, w)
    difference = (neighbours - images[:, :, None]).abs()
    std = neighbours.std(dim=2, keepdim=True)
    colour = -((difference / (std + 1e-8) / 0.3) ** 2).mean(dim=1)  # (B, n, h, w)
    distance = images.new_tensor([d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in DIRECTIONS])
    place = -((distance / (distance.std() + 1e-8) / 0.3) ** 2)  # (n)
    affinity = colour.softmax(dim=1) + 0.01 * place.softmax(dim=0)[:, None, None]
    for _ in range(iterations):
        maps = (affinity[:, None] * unfold_neighbours(maps, dilations)).sum(dim=2)
    return maps


def unfold_neighbours(maps: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the neighbours of every pixel side by side; beyond the border the border's pixel repeats.

    Args:
        maps: (B, M, h, w) floating.
        dilations: distances of the 8 neighbours, in pixels.

    Returns:
        (B, M, n, h, w), n = 8 * len(dilations), dilation by dilation.
    """
    _, _, h, w = maps.shape
    neighbours = []
    for d in dilations:
        padded = F.pad(maps, (d, d, d, d), mode="replicate")
        for dy, dx in DIRECTIONS:
            top, left = d + d * dy, d + d * dx
            neighbours.append(padded[:, :, top : top + h, left : left + w])
    return torch.stack(neighbours, dim=2)


@torch.no_grad()
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

    Args:
        images: (B, 3, h, w) floating, denormalised and halved.
        cams: (B, M, h, w) floating in [0, 1], normalised maps of the present classes, halved.
        classes: (B, M) int64, 0-based foreground class of each slot.
        live: (B, M) bool, slots that hold a class.
        high: background score that a class must beat to be labelled.
        low: background score that all classes must stay below to label background.
        size: (H, W) of the result.
        iterations: of the refinement.
        dilations: of the refinement.
        ignore_index: label of the pixels where the two disagree.

    Returns:
        (B, H, W) uint8: 0 background, class + 1, ignore_index.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, refinement with two background scores.
    """
    require_shape("images", images, "B", 3, "h", "w")
    B, _, h, w = images.shape
    require_shape("cams", cams, B, "M", h, w)
    require_shape("classes", classes, B, cams.shape[1])
    require_shape("live", live, *classes.shape)
    result = torch.empty(B, *size, dtype=torch.uint8, device=images.device)
    for b in range(B):
        keys = torch.cat([classes.new_zeros(1), classes[b, live[b]] + 1])  # label of each channel
        labels = []
        for background in (high, low):
            channels = torch.cat([cams.new_full((1, h, w), background), cams[b, live[b]]]).softmax(dim=0)
            refined = pixel_adaptive_refinement(
                images[b : b + 1], channels[None], iterations=iterations, dilations=dilations
            )
            upsampled = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
            labels.append(keys[upsampled[0].argmax(dim=0)])
        label_high, label_low = labels
        undecided = (label_high == 0) & (label_low != 0)
        result[b] = label_high.masked_fill(undecided, ignore_index).to(torch.uint8)
    return result


@torch.no_grad()
def grey_levels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation.

    Args:
        images: (B, 3, H, W) floating, normalised.
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].

    Returns:
        (B, 3, H, W), grey levels of 0..255, not rounded.

    Source: official code, denormalisation before the dense energy.
    """
    channels = [images[:, c] * (std[c] * 255) + mean[c] * 255 for c in range(3)]
    return torch.stack(channels, dim=1)


@torch.no_grad()
def denormalise_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation, rounded down to whole grey levels.

    Args:
        images: (B, 3, H, W) floating, normalised.
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].

    Returns:
        (B, 3, H, W) in 0..255, whole numbers of the dtype of images.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, denormalisation before the refinement.
    """
    require_shape("images", images, "B", 3, "H", "W")
    return grey_levels(images, mean, std).clamp(0, 255).floor()


def generate_pseudo_labels(
    images: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    high: float = 0.7,
    low: float = 0.25,
    iterations: int = 10,
    dilations: Sequence[int] = DILATIONS,
    ignore_index: int = 255,
) -> Tensor:
    """Compute the pseudo labels of a view from its normalised class activation maps.

    Args:
        images: (B, 3, H, W) floating, the normalised view.
        cam: (B, C, H, W) floating in [0, 1], normalised maps of all classes.
        labels: (B, C), a class is present where it is > 0.
        mean: of the view's normalisation, in [0, 1].
        std: of the view's normalisation, in [0, 1].
        high: background score that a class must beat to be labelled.
        low: background score that all classes must stay below to label background.
        iterations: of the refinement.
        dilations: of the refinement.
        ignore_index: label of the pixels where the two disagree.

    Returns:
        (B, H, W) uint8: 0 background, class + 1, ignore_index.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, refinement with two background scores.
    """
    require_shape("images", images, "B", 3, "H", "W")
    B, _, H, W = images.shape
    require_shape("cam", cam, B, "C", H, W)
    require_shape("labels", labels, *cam.shape[:2])
    half = (H // 2, W // 2)
    colours = denormalise_images(images, mean, std) / 255
    halved_images = F.interpolate(colours, size=half, mode="bilinear", align_corners=False)
    halved_cam = F.interpolate(cam, size=half, mode="bilinear", align_corners=False)
    classes, live = present_classes(labels, max_classes=cam.shape[1])
    max_classes = classes[:, :, None, None].expand(-1, -1, *half)
    return refine_pseudo_labels(
        halved_images,
        halved_cam.gather(1, max_classes),
        classes,
        live,
        high=high,
        low=low,
        size=(H, W),
        iterations=iterations,
        dilations=dilations,
        ignore_index=ignore_index,
    )
