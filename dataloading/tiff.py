"""TIFF of any depth and any number of channels, by region: only the tiles and strips in it are decoded."""

from __future__ import annotations

import io
import math
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CACHE_BYTES = 64 * 2**20  # of decoded tiles and strips; neighbouring regions share a row of them
MAX_CHANNELS = 1024
GREY, INVERTED, COLOUR, YCBCR = 1, 0, 2, 6  # photometric interpretations
JPEG = (6, 7)  # compressions, after which YCbCr is RGB
ASSOCIATED = 1  # extra sample: transparency, premultiplied into the colours
SEPARATE = 2  # planar configuration: one plane per channel
GeoTag = tuple[int, int, int, Any, bool]
"""One of `extratags` of tifffile: code, type, number of values, values, only once."""
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""Scale, tie points, transformation, and the three tags of the coordinate reference system (OGC GeoTIFF 1.1)."""


class _Place(NamedTuple):
    """Tile or strip: page, number on the page, and its rows, columns and channels."""

    page: int
    number: int
    top: int
    left: int
    channel: int


class Tiff:
    """The pixels of a TIFF, to be sliced as `tiff[y0:y1, x0:x1]`; only the requested region is decoded.

    Single-channel pages of one size are the channels of one picture; after a page of several channels all others
    (overviews, labels, further scans) are ignored. Other files that a TIFF may refer to are never opened.

    Args:
        source: file, or its content.

    Raises:
        NotImplementedError: palettes, bilevel pictures, volumes and colour spaces that Pillow reads.
        Exception: tifffile raises many kinds on damaged files.
    """

    def __init__(self, source: Path | bytes) -> None:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        self._file: Any = tifffile.TiffFile(file, _multifile=False)
        self._close = weakref.finalize(self, self._file.close)
        first: Any = self._file.pages[0]
        known = first.photometric in (GREY, INVERTED, COLOUR) or (
            first.photometric == YCBCR and first.compression in JPEG
        )
        if ASSOCIATED in first.extrasamples:
            raise NotImplementedError("a TIFF with premultiplied transparency")
        if not known or first.bitspersample < 8 or first.imagedepth > 1 or first.dtype is None:
            raise NotImplementedError("a TIFF for Pillow")
        self._pages = [first, *self._alike(first)] if first.samplesperpixel == 1 else [first]
        self.pages = len(self._pages)
        self.dtype = np.dtype(first.dtype).newbyteorder("=")
        self.shape = (first.imagelength, first.imagewidth, self.pages * first.samplesperpixel)
        tag = first.tags.get("Orientation")
        self.orientation = 1 if tag is None else int(tag.value)
        self._inverted = first.photometric == INVERTED
        self._tile = (first.tilelength, first.tilewidth) if first.is_tiled else (first.rowsperstrip, first.imagewidth)
        self._maps = [self._map(page) for page in self._pages] if isinstance(source, Path) else []
        self._cache: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._cached = 0

    @property
    def segment_pixels(self) -> int:
        """Number of pixels in a tile or strip, which are decoded together."""
        return math.prod(map(int, self._tile))

    def geo_tags(self) -> list[GeoTag]:
        """Return the georeference, as `extratags` of `tifffile.imwrite`; empty without one."""
        tags = (self._pages[0].tags.get(code) for code in GEO_TAGS)
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in tags if tag is not None]

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[Any]:
        (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(key, self.shape, strict=False))
        region = np.zeros((max(0, bottom - top), max(0, right - left), self.shape[2]), self.dtype)
        if not region.size:
            return region
        mapped = bool(self._maps) and self._maps[0] is not None
        for number, pixels in enumerate(self._maps if mapped else ()):
            assert pixels is not None
            region[..., number : number + pixels.shape[2]] = pixels[top:bottom, left:right]
        for place in () if mapped else self._places(top, bottom, left, right):
            segment = self._segment(place.page, place.number)
            if segment is None:  # omitted by its writer: all 0
                continue
            height, width, count = segment.shape
            y0, y1 = max(top, place.top), min(bottom, place.top + height)
            x0, x1 = max(left, place.left), min(right, place.left + width)
            channels = slice(place.channel, place.channel + count)
            part = segment[y0 - place.top : y1 - place.top, x0 - place.left : x1 - place.left]
            region[y0 - top : y1 - top, x0 - left : x1 - left, channels] = part
        if self._inverted:
            region = np.iinfo(self.dtype).max - region if self.dtype.kind == "u" else -region
        return region

    def _alike(self, first: Any) -> Iterator[Any]:
        for number in range(1, MAX_CHANNELS + 1):
            try:
                page = self._file.pages[number]
            except IndexError:
                return
            if page.shape == first.shape and page.dtype == first.dtype and not page.is_reduced and not page.is_mask:
                yield page
        raise ValueError(f"more than {MAX_CHANNELS} pages")

    def _map(self, page: Any) -> NDArray[Any] | None:
        """Memory-map the pixels of a page, (H, W, C), if they are stored uncompressed; None: they are not."""
        if not page.is_memmappable:
            return None
        stored = page.dtype.newbyteorder(self._file.byteorder)
        offset = page.dataoffsets[0]
        array = np.memmap(self._file.filehandle.path, stored, "r", offset, page.shape)
        if array.ndim == 2:
            return array[..., None]
        return array.transpose(1, 2, 0) if page.planarconfig == SEPARATE else array

    def _places(self, top: int, bottom: int, left: int, right: int) -> Iterator[_Place]:
        """Return the tiles or strips that a region touches."""
        height, width = self._tile
        rows, columns = (math.ceil(size / side) for size, side in zip(self.shape, (height, width), strict=False))
        planes = self.shape[2] if self._pages[0].planarconfig == SEPARATE and self.pages == 1 else 1
        for page in range(self.pages):
            for plane in range(planes):
                for row in range(top // height, -(-bottom // height)):
                    for column in range(left // width, -(-right // width)):
                        index = (plane * rows + row) * columns + column
                        yield _Place(page, index, row * height, column * width, page + plane)

    def _segment(self, number: int, index: int) -> NDArray[Any] | None:
        """Decode a tile or strip, (h, w, c), or take it from the cache."""
        known = self._cache.pop((number, index), None)
        if known is None:
            known = self._decode(self._pages[number], index)
            if known is None:
                return None
            self._cached += known.nbytes
        self._cache[number, index] = known
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return known

    def _decode(self, page: Any, index: int) -> NDArray[Any] | None:
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        if not size:
            return None
        file = self._file.filehandle
        file.seek(offset)
        content = file.read(size)
        if len(content) < size:
            raise ValueError(f"the file ends within its tile or strip {index}")
        segment, _, shape = page.decode(content, index, **tables)
        _, height, width, _ = shape
        return segment.reshape(segment.shape[-3:])[:height, :width]


def geo_tags(path: Path) -> list[GeoTag]:
    """Return a picture's georeference, for `write_rows`; empty: it is not a GeoTIFF."""
    with path.open("rb") as file:
        if file.read(4) not in MAGIC:
            return []
    try:
        return Tiff(path).geo_tags()
    except Exception:  # unreadable files are reported with their pixels
        return []
