"""PASCAL VOC's colours of the classes, and masks as palette PNGs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fsr_fast.runtime.files import write_png


@cache
def voc_palette() -> np.ndarray:
    """Return PASCAL VOC's colours.

    Returns:
        (256,3) uint8, RGB by label; 0 (background) is black, 255 (ignore) a light grey. Read-only.
    """
    labels = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):  # bits 0, 1, 2 of every octal digit of the label go to red, green, blue, highest bit first
        for channel in range(3):
            palette[:, channel] |= (((labels >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.flags.writeable = False
    return palette


def save_palette_png(mask: np.ndarray, path: Path | BinaryIO) -> None:
    """Save labels as a PNG with VOC's palette: the pixel values are the labels. A file is written atomically.

    Args:
        mask: (H,W) integer labels, 0 to 255.
        path: the file, or an open one.

    Raises:
        TypeError: labels that are not integers.
        ValueError: not two-dimensional, or labels outside 0 to 255.
    """
    picture = Image.fromarray(check_mask(mask))
    picture.putpalette(voc_palette().tobytes())
    if isinstance(path, Path):
        write_png(path, picture)
    else:
        picture.save(path, format="PNG")


def check_mask(mask: np.ndarray) -> np.ndarray:
    """Return labels as uint8.

    Args:
        mask: (H,W) integer labels, 0 to 255.

    Raises:
        TypeError: labels that are not integers.
        ValueError: not two-dimensional, or labels outside 0 to 255.
    """
    if not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(f"mask is {mask.dtype}; expected integer labels")
    if mask.ndim != 2:
        raise ValueError(f"mask is {mask.shape}; expected (H,W)")
    if mask.size and (mask.min() < 0 or mask.max() > 255):
        raise ValueError(f"mask holds labels from {mask.min()} to {mask.max()}; expected 0 to 255")
    return mask.astype(np.uint8)
