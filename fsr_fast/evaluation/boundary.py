"""Boundary IoU (Cheng et al., CVPR 2021): overlap of the bands along the contours, class by class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DILATION_RATIO = 0.02
"""Width of the band, as a share of the image's diagonal."""
IGNORE_INDEX = 255
PIXELS = 2**22
"""Larger images are processed in parts of this many pixels, with the rows around that affect them."""


def band_width(height: int, width: int) -> int:
    """Return the width of the band for an image of this size: 2 % of its diagonal, at least one pixel."""
    return max(1, round(DILATION_RATIO * math.hypot(height, width)))


def contour_band(labels: Tensor, width: int) -> Tensor:
    """Find the pixels that lose their class when every class is eroded.

    Args:
        labels: (H, W), integers.
        width: number of erosions by a square of 3 by 3 pixels, at least 1; classes end at the image's border.

    Returns:
        (H, W), bool. Source: Boundary IoU, "mask to boundary", for all classes at once.
    """
    outside = F.pad(labels.to(torch.int16), (width,) * 4, value=-1)
    return _largest_around(outside, width) != -_largest_around(-outside, width)


def boundary_counts(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Count the pixels of the bands of one image.

    Args:
        prediction: (H, W), integers, 0 to C.
        truth: (H, W), integers, 0 to C, or 255 where it is unknown; predictions there are ignored, too.
        classes: C.

    Returns:
        (C+1, 3), int64: pixels in both bands of the class, in that of the truth, in that of the prediction.
    """
    height, width = truth.shape
    band, total = band_width(height, width), torch.zeros(classes + 1, 3, dtype=torch.int64, device=truth.device)
    step = max(4 * band, PIXELS // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = max(0, top - band), min(height, bottom + band)  # the rows that affect top to bottom
        inner = slice(top - first, bottom - first)
        there = truth[first:last]
        found = torch.where(there == IGNORE_INDEX, there, prediction[first:last].to(truth.dtype))
        bands = [contour_band(labels, band)[inner] for labels in (there, found)]
        there, found = there[inner], found[inner]
        hit = bands[0] & bands[1] & (found == there)
        parts = (there[hit], there[bands[0]], found[bands[1]])
        counts = [part.long().bincount(minlength=IGNORE_INDEX + 1)[: classes + 1] for part in parts]
        total += torch.stack(counts, 1)
    return total


def boundary_iou(counts: Tensor) -> Tensor:
    """Return intersection over union of the bands.

    Args:
        counts: (..., 3), sums of `boundary_counts`.

    Returns:
        (...), float64, percent; nan where the truth has no band.
    """
    hit, there, found = counts.double().unbind(-1)
    return (100 * hit / (there + found - hit)).masked_fill(there == 0, math.nan)


def _largest_around(labels: Tensor, width: int) -> Tensor:
    """Largest label within `width` pixels along both axes, by doubling; padding of that width is cropped."""
    for axis in (0, 1):
        reach = 1
        while reach < 2 * width + 1:
            step = min(reach, 2 * width + 1 - reach)
            rest = labels.shape[axis] - step
            labels = torch.maximum(labels.narrow(axis, 0, rest), labels.narrow(axis, step, rest))
            reach += step
    return labels
