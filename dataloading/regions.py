"""Regions of large pictures."""

from __future__ import annotations

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
        pixels: (H, W, 3) uint8.
        rows: of the region.
        columns: of the region.
        size: height and width that are wanted.
        filter: that resizes; what is four times as large or more is averaged first.

    Returns:
        (*size, 3).
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) == size:
        return pixels[rows, columns]
    times = max(1, min(height // size[0], width // size[1]) // 2)
    step = max(1, BAND // times) * times
    parts = []
    for top in range(rows.start, rows.stop, step):
        part = Image.fromarray(pixels[top : min(top + step, rows.stop), columns])
        parts.append(np.asarray(part.reduce(times) if times > 1 else part))
    whole = Image.fromarray(np.concatenate(parts))
    return np.asarray(whole.resize((size[1], size[0]), filter))
