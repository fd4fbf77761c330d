"""Regions of large pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.dataloading.arrays import Pixels

BAND = 256
"""Rows that are read at a time."""


def read_scaled(
    pixels: Pixels,
    rows: slice,
    columns: slice,
    size: tuple[int, int],
    filter: Image.Resampling = Image.Resampling.LANCZOS,
) -> NDArray[np.uint8]:
    """Read a region at another size, without holding all of it where it is much larger.

    Args:
        pixels: (H, W, channels) uint8.
        rows: of the region.
        columns: of the region.
        size: height and width that are wanted.
        filter: that resizes; what is four times as large or more is averaged first.

    Returns:
        (*size, channels).
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) == size:
        return pixels[rows, columns]
    times = max(1, min(height // size[0], width // size[1]) // 2)
    step = max(1, BAND // times) * times
    parts = []
    for top in range(rows.start, rows.stop, step):
        part = pixels[top : min(top + step, rows.stop), columns]
        parts.append(apply_to_bands(part, lambda band: band.reduce(times)) if times > 1 else part)
    return apply_to_bands(np.concatenate(parts), lambda band: band.resize((size[1], size[0]), filter))


def apply_to_bands(pixels: NDArray[np.uint8], change: Callable[[Image.Image], Image.Image]) -> NDArray[np.uint8]:
    """Let Pillow change a picture (H, W, channels): colours at once, of other channels each."""
    if pixels.shape[2] == 3:
        return np.asarray(change(Image.fromarray(pixels)))
    bands = (Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(pixels.shape[2]))
    return np.stack([np.asarray(change(band)) for band in bands], 2)
