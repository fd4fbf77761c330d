"""Scores of a segmentation: one confusion matrix over the whole set (paper, evaluation protocol)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = 255


class ConfusionMatrix:
    """Counts of pixels by true class (rows) and predicted class (columns); 0 is the background.

    Args:
        classes: number C of foreground classes, 1 to 254.

    Attributes:
        counts: (C+1, C+1) int64 on the CPU, in pixels.
    """

    def __init__(self, classes: int) -> None:
        if not 1 <= classes < IGNORE_INDEX:
            raise ValueError(f"classes: {classes} foreground classes; expected 1 to {IGNORE_INDEX - 1}")
        self.classes = classes
        self.counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)

    def update(self, prediction: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> None:
        """Count one image, or several of the same size.

        Args:
            prediction: (H,W) or (B,H,W), any integer dtype, 0 to C.
            truth: same shape and device, any integer dtype, 0 to C; pixels of 255 are not counted.

        Raises:
            TypeError: labels that are not integers.
            ValueError: shapes that differ, or labels outside their range.
        """
        predicted, true = _labels(prediction, "prediction"), _labels(truth, "truth")
        if predicted.shape != true.shape:
            raise ValueError(f"prediction is {tuple(predicted.shape)} but truth is {tuple(true.shape)}; resize one")
        counted = true != IGNORE_INDEX
        true = true[counted]
        self._check_range(predicted, "prediction")
        self._check_range(true, f"truth (beside {IGNORE_INDEX}, ignore)")
        cells = true * (self.classes + 1) + predicted[counted]
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix over the same classes.

        Raises:
            ValueError: the other matrix is over another number of classes.
        """
        if other.classes != self.classes:
            raise ValueError(f"cannot merge counts over {other.classes} classes into counts over {self.classes}")
        self.counts += other.counts

    def all_reduce(self) -> None:
        """Add up the counts of all processes, in each of them. Nothing happens outside a process group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = self.counts.to(device)
        torch.distributed.all_reduce(total)
        self.counts = total.cpu()

    def iou(self) -> Tensor:
        """Return intersection over union: (C+1,) float64, percent; nan where the class is absent from the truth."""
        return self._share(self.counts.sum(0) + self._true - self._hit).masked_fill(self._true == 0, math.nan)

    def mean_iou(self) -> float:
        """Return the mean of `iou` over the classes present in the truth, percent; nan before anything was counted."""
        return self.iou().nanmean().item()

    def precision(self) -> Tensor:
        """Return the share of a class's predicted pixels that are right: (C+1,) float64, percent; nan without any."""
        return self._share(self.counts.sum(0))

    def recall(self) -> Tensor:
        """Return the share of a class's true pixels that are found: (C+1,) float64, percent; nan without any."""
        return self._share(self._true)

    def pixel_accuracy(self) -> float:
        """Return the share of all counted pixels that are right, percent; nan before anything was counted."""
        total = self.counts.sum().item()
        return 100.0 * self._hit.sum().item() / total if total else math.nan

    @property
    def _hit(self) -> Tensor:
        return self.counts.diagonal()

    @property
    def _true(self) -> Tensor:
        return self.counts.sum(1)

    def _share(self, whole: Tensor) -> Tensor:
        return 100.0 * self._hit.double() / whole.double()  # 0 / 0 is nan

    def _check_range(self, labels: Tensor, name: str) -> None:
        if labels.numel() == 0:
            return
        low, high = (value.item() for value in labels.aminmax())
        if low < 0 or high > self.classes:
            raise ValueError(f"{name} holds labels from {low} to {high}; expected 0 to {self.classes}")


def scores(matrix: ConfusionMatrix, class_names: Sequence[str]) -> dict[str, Any]:
    """Return all scores as plain values for JSON.

    Args:
        matrix: counts over C foreground classes.
        class_names: the C names of the foreground classes, without the background.

    Returns:
        `mean_iou`, `pixel_accuracy`, `mean_precision`, `mean_recall` and, by name under `classes` from `background`
        on, `iou`, `precision`, `recall`: percent, None where undefined. `pixels`: number of true pixels.

    Raises:
        ValueError: the number of names is not C.
    """
    if len(class_names) != matrix.classes:
        raise ValueError(f"class_names: {len(class_names)} names for {matrix.classes} foreground classes")
    columns = {"iou": matrix.iou(), "precision": matrix.precision(), "recall": matrix.recall()}
    table = {
        name: {key: plain(column[index].item()) for key, column in columns.items()}
        | {"pixels": int(matrix.counts[index].sum())}
        for index, name in enumerate(["background", *class_names])
    }
    return {
        "mean_iou": plain(matrix.mean_iou()),
        "pixel_accuracy": plain(matrix.pixel_accuracy()),
        "mean_precision": plain(matrix.precision().nanmean().item()),
        "mean_recall": plain(matrix.recall().nanmean().item()),
        "classes": table,
    }


def plain(value: float) -> float | None:
    """Return a number for JSON: None for nan."""
    return None if math.isnan(value) else value


def _labels(values: Tensor | np.ndarray, name: str) -> Tensor:
    labels = torch.as_tensor(values)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} is {labels.dtype}; expected integer labels")
    return labels.long()
