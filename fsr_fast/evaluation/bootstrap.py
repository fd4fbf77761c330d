"""Is one evaluation better than another? Paired bootstrap over the images of both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CHUNK = 64
"""Resamples that are summed at a time."""


class Difference(NamedTuple):
    """Mean IoU of two evaluations of the same images, percent, and the bootstrap's interval of their difference."""

    first: float
    second: float
    change: float
    """second - first."""
    low: float
    """2.5 % of the resamples change by less."""
    high: float
    """2.5 % of the resamples change by more."""
    better: float
    """Share of the resamples in which the second is better, 0 to 1."""


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the classes that are present in the truth.

    Args:
        counts: (..., C+1, 3), pixels in both, in the truth, in the prediction.

    Returns:
        (...), float64, percent; nan where no class is present.
    """
    hit, there, found = np.moveaxis(counts.astype(np.float64), -1, 0)
    present = there > 0
    iou = np.divide(100 * hit, there + found - hit, out=np.zeros_like(hit), where=present)
    total = present.sum(-1)
    return np.divide(iou.sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)


def paired_bootstrap(first: np.ndarray, second: np.ndarray, *, draws: int = 2000, seed: int = 0) -> Difference:
    """Resample the images with replacement, the same for both evaluations, and compare the mean IoUs.

    Args:
        first: (n, C+1, 3), of each image: pixels in both, in the truth, in the prediction.
        second: like `first`, the same images in the same order.
        draws: number of resamples.
        seed: of the draws.
    """
    images = len(first)
    both = np.concatenate([first.reshape(images, -1), second.reshape(images, -1)], 1).astype(np.float64)
    generator = np.random.default_rng(seed)
    changes = []
    for start in range(0, draws, CHUNK):
        weights = generator.multinomial(images, np.full(images, 1 / images), size=min(CHUNK, draws - start))
        before, after = (weights @ both).reshape(len(weights), 2, *first.shape[1:]).swapaxes(0, 1)
        changes.append(mean_iou(after) - mean_iou(before))
    change = np.concatenate(changes)
    low, high = np.nanpercentile(change, [2.5, 97.5])
    one, other = float(mean_iou(first.sum(0))), float(mean_iou(second.sum(0)))
    return Difference(one, other, other - one, float(low), float(high), float((change > 0).mean()))
