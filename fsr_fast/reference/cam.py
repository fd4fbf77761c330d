"""Class activation maps, every class and every scale at full resolution (paper, Eq. 2; official code for scales)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import require_shape


class MergedCams(NamedTuple):
    """The normalised class activation maps of the classes that are present in each image."""

    values: Tensor
    """(B, M, H', W') in [0, 1]; dead slots are 0."""
    classes: Tensor
    """(B, M) int64, 0-based foreground class of each slot."""
    live: Tensor
    """(B, M) bool, False where the image has fewer than M classes."""


def class_activation_map(features: Tensor, weight: Tensor) -> Tensor:
    """Project feature maps on the classifier's weight and keep what is positive.

    Args:
        features: (B, D, h, w) floating, top or aux feature maps.
        weight: (C, D) floating, weight of the classifier that belongs to them.

    Returns:
        (B, C, h, w), not normalised.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Eq. 2.
    """
    require_shape("features", features, "B", "D", "h", "w")
    require_shape("weight", weight, "C", features.shape[1])
    return torch.relu(torch.einsum("bdhw,cd->bchw", features, weight))


def normalise_cam(cam: Tensor) -> Tensor:
    """Min-max normalise every map by itself.

    Args:
        cam: (..., H, W) floating, >= 0.

    Returns:
        (..., H, W) in [0, 1).

    Source: paper, Eq. 2; official code for the 1e-5.
    """
    cam = cam - cam.amin(dim=(-2, -1), keepdim=True)
    return cam / (cam.amax(dim=(-2, -1), keepdim=True) + 1e-5)


def present_classes(labels: Tensor, *, max_classes: int) -> tuple[Tensor, Tensor]:
    """List the first classes of every image in a fixed number of slots.

    Args:
        labels: (B, C), a class is present where it is > 0.
        max_classes: M >= 1; an image with more classes loses the highest ones.

    Returns:
        (B, M) int64 classes, ascending, 0 in dead slots, and (B, M) bool, True where the slot holds a present class.

    Raises:
        ValueError: if a shape does not fit or max_classes < 1.
    """
    require_shape("labels", labels, "B", "C")
    if max_classes < 1:
        raise ValueError(
            f"max_classes is {max_classes}, expected at least 1; give the largest number of classes in an image"
        )
    index = torch.zeros(len(labels), max_classes, dtype=torch.int64, device=labels.device)
    live = torch.zeros(len(labels), max_classes, dtype=torch.bool, device=labels.device)
    for b, row in enumerate(labels):
        present = torch.nonzero(row > 0).flatten()[:max_classes]
        index[b, : len(present)] = present
        live[b, : len(present)] = True
    return index, live


@torch.no_grad()
def merge_scales(cams: Sequence[Tensor], flipped: Sequence[Tensor], *, size: tuple[int, int]) -> Tensor:
    """Merge the maps of several scales and of the mirrored image into one normalised map per class.

    Args:
        cams: one entry per scale, (B, C, h_s, w_s) floating, class activation maps before or after their ReLU.
        flipped: the same for the mirrored image, still mirrored.
        size: (H, W), the resolution at which maps are merged and normalised.

    Returns:
        (B, C, H, W) in [0, 1).

    Source: official code, multi-scale class activation maps.
    """
    merged = cams[0].new_zeros(*cams[0].shape[:2], *size)
    for cam, mirrored in zip(cams, flipped, strict=True):
        original = F.interpolate(torch.relu(cam), size=size, mode="bilinear", align_corners=False)
        mirrored = F.interpolate(torch.relu(mirrored), size=size, mode="bilinear", align_corners=False)
        merged = merged + torch.maximum(original, mirrored.flip(3))
    return normalise_cam(merged)


@torch.no_grad()
def merge_cams(
    cams: Sequence[Tensor],
    flipped: Sequence[Tensor],
    labels: Tensor,
    *,
    max_classes: int,
    size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
) -> MergedCams:
    """Merge the maps of several scales, see merge_scales, and keep the classes that are present.

    Args:
        cams: one entry per scale, (B, C, h_s, w_s) floating, class activation maps before or after their ReLU.
        flipped: the same for the mirrored image, still mirrored.
        labels: (B, C), a class is present where it is > 0.
        max_classes: M, the number of class slots.
        size: (H, W), the resolution at which maps are merged and normalised.
        output_size: (h, w) of the result, or None for size.

    Returns:
        The merged maps in M slots.

    Raises:
        ValueError: if a shape does not fit or there is no scale.

    Source: official code, multi-scale class activation maps.
    """
    require_shape("labels", labels, "B", "C")
    if not cams or len(cams) != len(flipped):
        raise ValueError(
            f"got {len(cams)} cams and {len(flipped)} flipped, expected one of each per scale; pair them up"
        )
    for scale, (cam, mirrored) in enumerate(zip(cams, flipped, strict=True)):
        require_shape(f"cams[{scale}]", cam, *labels.shape, "h", "w")
        require_shape(f"flipped[{scale}]", mirrored, *cam.shape)
    normalised = merge_scales(cams, flipped, size=size)  # (B, C, H, W)
    if output_size is not None:
        normalised = F.interpolate(normalised, size=output_size, mode="bilinear", align_corners=False)
    classes, live = present_classes(labels, max_classes=max_classes)
    values = normalised.new_zeros(*classes.shape, *normalised.shape[2:])
    for b, m in torch.nonzero(live).tolist():
        values[b, m] = normalised[b, classes[b, m]]
    return MergedCams(values, classes, live)


@torch.no_grad()
def cam_to_labels(
    cam: Tensor, labels: Tensor, *, high: float = 0.7, low: float = 0.25, ignore_index: int = 255
) -> Tensor:
    """Threshold a normalised class activation map into labels for the affinity loss.

    Args:
        cam: (B, C, h, w) floating in [0, 1].
        labels: (B, C), a class is present where it is > 0.
        high: above it the pixel is its strongest class.
        low: at or below it the pixel is background.
        ignore_index: label of the pixels between.

    Returns:
        (B, h, w) int64: 0 background, class + 1, ignore_index.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, labels of the affinity loss.
    """
    require_shape("cam", cam, "B", "C", "h", "w")
    require_shape("labels", labels, *cam.shape[:2])
    value, strongest = (cam * (labels > 0)[:, :, None, None]).max(dim=1)
    result = strongest + 1
    result[value <= high] = ignore_index
    result[value <= low] = 0
    return result
