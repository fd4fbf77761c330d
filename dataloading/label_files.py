"""Label maps that are written as their rows are computed: small ones as PNG, large ones as tiled TIFF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.dataloading.tiff import GeoTag
from fsr_fast.runtime.files import atomic_path, write_png

LARGE_PIXELS = 2**24
"""Maps of more pixels, 4,096 by 4,096, are TIFF."""
TILE = 256
BIG_TIFF = 2**31
"""Bytes above which a TIFF needs 64-bit offsets."""


def write_rows(
    place: Path, size: tuple[int, int], bands: Iterable[np.ndarray], *, colours: bool, tags: Sequence[GeoTag] = ()
) -> Path:
    """Write a map of labels, or of another 8-bit quantity, atomically.

    Args:
        place: path of the file, without extension.
        size: height and width.
        bands: (h, W) uint8, from the top to the bottom, of any heights; drawn while writing.
        colours: with VOC's palette, else greyscale.
        tags: the picture's georeference, from `tiff.geo_tags`; with them NAME.tif is always written.

    Returns:
        The file: NAME.png, or NAME.tif if the map has more than `LARGE_PIXELS` pixels: in compressed tiles of 256
        pixels, which programs for large pictures read by region.
    """
    height, width = size
    if height * width <= LARGE_PIXELS:
        whole = np.concatenate(list(bands))
        if tags:
            _write_tiff(place, size, [whole], colours, tags)
        picture = Image.fromarray(whole)
        if colours:
            picture.putpalette(voc_palette().tobytes())
        return write_png(place.with_name(f"{place.name}.png"), picture)
    return _write_tiff(place, size, bands, colours, tags)


def _write_tiff(
    place: Path, size: tuple[int, int], bands: Iterable[np.ndarray], colours: bool, tags: Sequence[GeoTag]
) -> Path:
    height, width = size
    path = place.with_name(f"{place.name}.tif")
    with atomic_path(path, sync=False) as partial:
        tifffile.imwrite(
            partial,
            _tiles(bands, width),
            shape=size,
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric="palette" if colours else "minisblack",
            colormap=voc_palette().T.astype(np.uint16) * 257 if colours else None,
            compression="zlib",
            metadata=None,
            extratags=tags,
            bigtiff=height * width > BIG_TIFF,
        )
    return path


def _tiles(bands: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Cut bands into tiles, row by row; those at the edges are padded with 0."""
    for band in _of_height(bands, TILE):
        padded = np.pad(band, ((0, TILE - len(band)), (0, -width % TILE)))
        yield from (np.ascontiguousarray(padded[:, left : left + TILE]) for left in range(0, width, TILE))


def _of_height(bands: Iterable[np.ndarray], height: int) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    count = 0
    for band in bands:
        held.append(band)
        count += len(band)
        if count >= height:
            joined = np.concatenate(held)
            whole = count // height * height
            yield from (joined[top : top + height] for top in range(0, whole, height))
            held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)
