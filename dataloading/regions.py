"""Regions of large pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.dataloading.arrays import Pixels

BAND = 256
"""Rows read at a time."""
CROP_PIXELS = 2**24
"""Training crops of up to this many pixels are read pixel by pixel."""


def read_scaled(
    pixels: Pixels,
    rows: slice,
    columns: slice,
    size: tuple[int, int],
    filter: Image.Resampling = Image.Resampling.LANCZOS,
) -> NDArray[np.uint8]:
    """Read a region at another size, without holding all of it if it is much larger.

    Args:
        pixels: (H, W, channels) uint8.
        rows: of the region.
        columns: of the region.
        size: height and width of the result.
        filter: resizing filter; a region at least four times as large is averaged first.

    Returns:
        (*size, channels).
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    if (height, width) == size:
        return pixels[rows, columns]
    reduced = read_reduced(pixels, rows, columns, max(1, min(height // size[0], width // size[1]) // 2))
    return apply_to_bands(reduced, lambda band: band.resize((size[1], size[0]), filter))


def read_reduced(pixels: Pixels, rows: slice, columns: slice, times: int) -> NDArray[np.uint8]:
    """Read a region, and average squares of `times` pixels per side; some rows at a time."""
    if times == 1:
        return pixels[rows, columns]
    step = max(1, BAND // times) * times
    bands = (slice(top, min(top + step, rows.stop)) for top in range(rows.start, rows.stop, step))
    return np.concatenate([apply_to_bands(pixels[band, columns], lambda part: part.reduce(times)) for band in bands])


def read_crop(pixels: Pixels, rows: slice, columns: slice, size: int) -> NDArray[np.uint8]:
    """Read a crop that will be resized to `size` pixels per side; a large one is averaged, to twice that or more.

    Args:
        pixels: (H, W, channels) uint8.
        rows: of the crop.
        columns: of the crop.
        size: side of the view.

    Returns:
        (h, w, channels): every pixel, unless there are more than `CROP_PIXELS`.
    """
    height, width = rows.stop - rows.start, columns.stop - columns.start
    times = max(1, min(height, width) // (2 * size)) if height * width > CROP_PIXELS else 1
    return read_reduced(pixels, rows, columns, times)


def apply_to_bands(pixels: NDArray[np.uint8], change: Callable[[Image.Image], Image.Image]) -> NDArray[np.uint8]:
    """Apply a Pillow operation to a picture (H, W, channels): colours together, other channels one by one."""
    if pixels.shape[2] == 3:
        return np.asarray(change(Image.fromarray(pixels)))
    bands = (Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(pixels.shape[2]))
    return np.stack([np.asarray(change(band)) for band in bands], 2)
