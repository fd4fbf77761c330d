"""What is kept of an evaluated image, and the sums over all of them: only counts, whatever the images' size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsr_fast.evaluation.boundary import boundary_counts, boundary_iou
from fsr_fast.evaluation.metrics import ConfusionMatrix, plain, scores

ROWS = 512
"""Rows of an image that are counted at a time."""
Counts = dict[str, list[list[int]]]
"""Counts of one image and one kind of result. `cells`: true class, predicted class, pixels; `bands`: class, pixels in
both bands, in the band of the truth, in that of the prediction. Entries of 0 pixels are left out."""


def count_image(prediction: np.ndarray, truth: np.ndarray, classes: int, device: torch.device) -> Counts:
    """Compare the result for one image with the truth.

    Args:
        prediction: (H, W), uint8, 0 to C.
        truth: (H, W), uint8, 0 to C or 255, which is not counted.
        classes: C.
        device: where to count.

    Raises:
        ValueError: shapes that differ, or labels outside their range.
    """
    found, there = (torch.tensor(labels, device=device) for labels in (prediction, truth))
    if found.shape != there.shape:
        raise ValueError(f"prediction is {tuple(found.shape)} but truth is {tuple(there.shape)}; resize one")
    matrix = ConfusionMatrix(classes)
    for parts in zip(found.split(ROWS), there.split(ROWS), strict=True):
        matrix.update(*parts)
    return {
        "cells": _entries(matrix.counts),
        "bands": _entries(boundary_counts(found, there, classes).cpu(), rows=True),
    }


class Tally:
    """Sums over images of one kind of result.

    Args:
        classes: number C of foreground classes.

    Attributes:
        matrix: pixels by true and predicted class.
        bands: (C+1, 3), int64, sums of `boundary_counts`.
    """

    def __init__(self, classes: int) -> None:
        self.matrix = ConfusionMatrix(classes)
        self.bands = torch.zeros(classes + 1, 3, dtype=torch.int64)

    def add(self, counts: Counts) -> None:
        """Add one image."""
        for true, predicted, pixels in counts["cells"]:
            self.matrix.counts[true, predicted] += pixels
        for label, *band in counts["bands"]:
            self.bands[label] += torch.tensor(band)

    def all_reduce(self) -> None:
        """Add up over all processes, in each of them."""
        self.matrix.all_reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            total = self.bands.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
            torch.distributed.all_reduce(total)
            self.bands = total.cpu()

    def scores(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return all scores as plain values: `metrics.scores`, and boundary IoU of each class and on average."""
        result = scores(self.matrix, class_names)
        boundary = boundary_iou(self.bands)
        for row, value in zip(result["classes"].values(), boundary.tolist(), strict=True):
            row["boundary_iou"] = plain(value)
        return {
            "mean_iou": result.pop("mean_iou"),
            "mean_boundary_iou": plain(boundary.nanmean().item()),
            **result,
        }


def class_counts(counts: Mapping[str, list[list[int]]], classes: int) -> np.ndarray:
    """Return the counts behind both IoUs of an image.

    Returns:
        (2, C+1, 3), int64: pixels (first) and band pixels (second) in both, in the truth, in the prediction.
    """
    both = np.zeros((2, classes + 1, 3), np.int64)
    for true, predicted, pixels in counts["cells"]:
        both[0, true, 0] += pixels if true == predicted else 0
        both[0, true, 1] += pixels
        both[0, predicted, 2] += pixels
    for label, *band in counts["bands"]:
        both[1, label] += band
    return both


def _entries(counts: Tensor, *, rows: bool = False) -> list[list[int]]:
    """Return the nonzero counts: indices and count, or index and whole row."""
    if rows:
        return [[label, *row] for label, row in enumerate(counts.tolist()) if any(row)]
    places = counts.nonzero()
    return torch.cat([places, counts[tuple(places.T)][:, None]], 1).tolist()
