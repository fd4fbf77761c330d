"""Pictures as arrays: of any depth and any number of channels, read by region where the format allows it.

`images.py` decides which formats are opened. NumPy's files, TIFF and DICOM are opened here, recognised by their
content; Pillow opens the rest, except 16-bit colour PNG, of which it keeps eight bits: imagecodecs opens that.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.dataloading import images, tiff
from fsr_fast.dataloading.images import MAX_PIXELS, DamagedFileError, Source, explained, open_picture

NUMPY, DICOM = b"\x93NUMPY", b"DICM"
DICOM_PLACE = 128  # bytes before the DICOM mark
DEEP_PNG = 16  # bits
COLOUR_PNG = (2, 4, 6)  # colour types: RGB, grey with alpha, RGBA


class Pixels(Protocol):
    """The stored pixels of a picture: an array (H, W, C), or a reader of one region after another."""

    @property
    def shape(self) -> tuple[int, ...]:
        """H, W and C."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the regions."""

    def __getitem__(self, key: tuple[slice, slice], /) -> NDArray[Any]:
        """Read the region `[y0:y1, x0:x1]`, (h, w, C)."""
        ...


def open_array(source: Source, name: str = "", *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Open a picture, upright, with the values and channels that are stored.

    Upright TIFF and `.npy` files are read by region; all others are decoded here, once.

    Args:
        source: file, or its content.
        name: its name in messages; by default the path.
        max_pixels: largest picture that is opened.

    Raises:
        DamagedFileError: missing, empty, damaged, of a format that is not read, or of more than `max_pixels` pixels.
            Slicing a TIFF may raise it, too.
    """
    where = name or (str(source) if isinstance(source, Path) else "image")
    with explained(source, where, max_pixels):
        start = start_of(source)
        if start.startswith(NUMPY):
            return _open_numpy(source, max_pixels)
        if is_dicom(start):
            return _open_dicom(source, where, max_pixels)
        if start.startswith(tiff.MAGIC):
            try:
                return _open_tiff(source, where, max_pixels)
            except NotImplementedError:
                pass
    return _decode(source, where, max_pixels)


def start_of(source: Source) -> bytes:
    """Return the first bytes of a file, by which its format is recognised."""
    if isinstance(source, bytes):
        return source[: DICOM_PLACE + len(DICOM)]
    with source.open("rb") as file:
        return file.read(DICOM_PLACE + len(DICOM))


def is_dicom(start: bytes) -> bool:
    """Return whether these first bytes are DICOM's."""
    return start[DICOM_PLACE : DICOM_PLACE + len(DICOM)] == DICOM


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"it has {width} x {height} pixels")
    if height * width > max_pixels:
        raise Image.DecompressionBombError


def _open_numpy(source: Source, max_pixels: int) -> Pixels:
    """Map an array (H, W, C) or (H, W); objects, which would be unpickled, are refused by NumPy."""
    if isinstance(source, bytes):
        file = io.BytesIO(source)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("an array of objects")
        flat = np.frombuffer(source, dtype, offset=file.tell())
        if flat.size != np.prod(shape, dtype=object):
            raise ValueError(f"{flat.size} values, but its header says {shape}")
        array: Any = flat.reshape(shape, order="F" if fortran else "C")
    else:
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of the shape {array.shape}; expected (H, W) or (H, W, C)")
    if array.dtype.kind not in "uif":
        raise ValueError(f"an array of {array.dtype}; expected whole numbers or floating point")
    _check_size(array.shape[0], array.shape[1], max_pixels)
    return array if array.ndim == 3 else array[..., None]


def _open_tiff(source: Source, where: str, max_pixels: int) -> Pixels:
    opened = tiff.Tiff(source)
    height, width, _ = opened.shape
    _check_size(height, width, max_pixels)
    if opened.orientation != 1:
        with explained(source, where, max_pixels):
            return turn_upright(opened[:, :], opened.orientation)
    if opened.segment_pixels > max(max_pixels, 2**24):
        raise ValueError(f"a tile or strip of {opened.segment_pixels:,} pixels, more than the picture may have")
    return _Explained(opened, source, where, max_pixels)


class _Explained:
    """A TIFF that raises `DamagedFileError` where it is damaged."""

    def __init__(self, pixels: tiff.Tiff, source: Source, where: str, max_pixels: int) -> None:
        self.shape, self.dtype, self.pages = pixels.shape, pixels.dtype, pixels.pages
        self._pixels, self._where, self._max_pixels = pixels, where, max_pixels
        self._source = source if isinstance(source, Path) else b"II*\0"

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[Any]:
        with explained(self._source, self._where, self._max_pixels):
            return self._pixels[key]


def _open_dicom(source: Source, where: str, max_pixels: int) -> Pixels:
    """Decode a DICOM picture of one frame; its values are those of the modality, e.g. Hounsfield units."""
    try:
        import pydicom
        from pydicom.pixels import apply_rescale
    except ImportError:
        raise ValueError("DICOM needs the package pydicom: `pip install 'fsr_fast[scientific]'`") from None
    data = pydicom.dcmread(io.BytesIO(source) if isinstance(source, bytes) else source)
    _check_size(int(data.Rows), int(data.Columns), max_pixels)
    if int(data.get("NumberOfFrames", 1) or 1) > 1:
        raise DamagedFileError(
            f"{where}: a DICOM file of {data.NumberOfFrames} frames; expected one picture per file: write each frame "
            "as a picture with labels of its own, or all as the channels of one .npy file (docs/scientific.md shows "
            "how), or take its id off the list"
        )
    if data.PhotometricInterpretation == "PALETTE COLOR":
        raise ValueError("a DICOM picture with a palette; save it as PNG")
    array = data.pixel_array
    if data.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
        array = (
            np.invert(array) & np.asarray(2 ** int(data.BitsStored) - 1, array.dtype)
            if array.dtype.kind == "u"
            else ~array
        )
    values = apply_rescale(array, data)
    whole = np.rint(values).astype(np.int32) if values.dtype.kind == "f" else values
    values = whole if np.array_equal(whole, values) else values.astype(np.float32)
    return values if values.ndim == 3 else values[..., None]


def _decode(source: Source, where: str, max_pixels: int) -> NDArray[Any]:
    """Decode by Pillow: (H, W, C) of 8 bits; of 16 or 32 bits or floating point with one channel."""
    with open_picture(source, where, max_pixels=max_pixels) as image:
        turn = images.orientation(image)
        if image.format == "PNG" and (deep := _deep_png(source)) is not None:
            return turn_upright(deep, turn)
        if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8 and len(image.getbands()) > 1:  # type: ignore[attr-defined]
            raise ValueError("a TIFF of more than 8 bits per channel in an unsupported colour space; save it as RGB")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA").convert("RGB")
        elif image.mode not in ("L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        array = np.asarray(image)
        return turn_upright(array if array.ndim == 3 else array[..., None], turn)


def _deep_png(source: Source) -> NDArray[Any] | None:
    """Decode a PNG of 16 bits in colour, (H, W, C) uint16; None: a different kind of PNG."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    if content[24] != DEEP_PNG or content[25] not in COLOUR_PNG:
        return None
    return imagecodecs.png_decode(content)


TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: array.swapaxes(0, 1)[:, ::-1],
    7: lambda array: array.swapaxes(0, 1)[::-1, ::-1],
    8: lambda array: array.swapaxes(0, 1)[::-1],
}
"""Functions that undo an EXIF orientation, for arrays (H, W, C)."""


def turn_upright(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array (H, W, C) upright by its EXIF orientation."""
    return np.ascontiguousarray(TURNS[orientation](array)) if orientation in TURNS else array
