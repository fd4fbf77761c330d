"""Read one image or one mask, whatever its kind; every reader and check of the data sets uses these functions.

An image is turned upright as its EXIF orientation says, always. A mask belongs to the upright image, and its own
orientation tag, if any, is not looked at.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from fsr_fast.errors import UserError

IGNORE = 255
MAX_PIXELS = 80_000_000  # of one image: 320 MB decoded; what is larger is refused before it is decoded
UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height

Source = Path | bytes


class DamagedFileError(UserError):
    """An image or a mask that is missing or cannot be decoded. The other files may still be good."""


class OutsideError(DamagedFileError):
    """A name that leads out of the data set."""


def read_image(source: Source, name: str = "") -> Image.Image:
    """Read an image as RGB, upright.

    CMYK, greyscale and palette images are converted, the upper eight of 16 bits are kept, transparency is dropped.

    Args:
        source: file, or its content.
        name: what messages call it; by default the path.

    Raises:
        DamagedFileError: missing, empty, truncated, of an unknown kind, or of more than `MAX_PIXELS` pixels.
    """
    with _opened(source, name) as image:
        turn = UPRIGHT.get(_orientation(image))
        picture = _to_rgb(image)
        return picture.transpose(turn) if turn is not None else picture


class Header(NamedTuple):
    """What the head of an image file says."""

    width: int  # of the upright image, in pixels
    height: int
    format: str  # in Pillow's words: JPEG, PNG, …
    mode: str  # in Pillow's words: RGB, L, CMYK, …


def image_header(source: Source, name: str = "") -> Header:
    """Read the head of an image, without decoding it.

    Raises:
        DamagedFileError: missing, empty, of an unknown kind, or of more than `MAX_PIXELS` pixels.
    """
    with _opened(source, name) as image:
        width, height = image.size
        sideways = _orientation(image) in SIDEWAYS
        return Header(*((height, width) if sideways else (width, height)), image.format or "", image.mode)


def image_size(source: Source, name: str = "") -> tuple[int, int]:
    """Return width and height of the upright image, in pixels, without decoding it.

    Raises:
        DamagedFileError: as `image_header`.
    """
    return image_header(source, name)[:2]


def read_mask(source: Source, limit: int, name: str = "") -> NDArray[np.uint8]:
    """Read the values of a mask, never the colours of its palette.

    Args:
        source: palette or 8-bit greyscale PNG, or its content.
        limit: highest class value; 255 is allowed besides.
        name: what messages call it; by default the path.

    Returns:
        (H, W) uint8, as in the file.

    Raises:
        DamagedFileError: cannot be decoded, is of another kind, or holds a value above the limit.
    """
    with _opened(source, name) as image:
        mode, mask = image.mode, np.asarray(image)
    where = name or str(source)
    if mode not in ("P", "L"):
        raise DamagedFileError(
            f"{where}: a mask of mode {mode}; expected one 8-bit value a pixel (palette or greyscale PNG): "
            f"0 background, 1… classes, 255 ignored; {_conversion(mode, mask)}"
        )
    highest = int(mask[mask != IGNORE].max(initial=0))
    if highest > limit:
        raise DamagedFileError(
            f"{where}: holds the value {highest}, but there are {limit} classes; expected 0 to {limit}, or 255; "
            "mend the mask, or name every class in data.classes"
        )
    return mask


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file by its name in a folder, and refuse names that lead out of the folder.

    The folder itself may be a symbolic link; the file, and folders between, may not be links to another place.

    Args:
        folder: where the file must lie.
        name: relative path, with `/` between its parts.

    Raises:
        OutsideError: an absolute path, a part `..`, or a symbolic link to a place outside.
    """
    check_name(name)
    path = folder / name
    if not os.path.realpath(path).startswith(_real(folder.absolute())):
        raise OutsideError(
            f"{path}: a symbolic link that leads out of {folder}; put the file itself there, or let data.root be the "
            "folder that holds it"
        )
    return path


@lru_cache
def _real(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")


def check_name(name: str) -> None:
    """Refuse a name that leads out of its folder, by its text alone.

    Raises:
        OutsideError: an empty name, an absolute path, or a part `..`.
    """
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    if not name or "\0" in name or absolute or ".." in PurePosixPath(name).parts:
        raise OutsideError(f"{name!r} leads out of the data set; expected a name within its folder")


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    where = name or (str(source) if isinstance(source, Path) else "image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DamagedFileError(
            f"{where}: more than {MAX_PIXELS:,} pixels; scale it down, or take its id off the list"
        ) from None
    except FileNotFoundError:
        raise DamagedFileError(f"{where}: no such file; add it, or take its id off the list") from None
    except Exception as error:  # Pillow's decoders raise all kinds of errors on damaged files
        empty = not source if isinstance(source, bytes) else source.is_file() and not source.stat().st_size
        reason = "the file is empty" if empty else str(error) or type(error).__name__
        raise DamagedFileError(
            f"{where}: cannot be decoded: {reason}; replace the file, or take its id off the list"
        ) from None


def _orientation(image: Image.Image) -> int:
    try:
        # the base class's: PNG's own would decode the pixels, and its errors would be lost here
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data of all kinds, around pixels that may be sound
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, in a container of 16 or 32
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels of floating point; expected 8 or 16 bits a channel")
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def _conversion(mode: str, mask: NDArray[np.generic]) -> str:
    if mask.ndim == 3 and mode.startswith(("RGB", "LA")):
        channels = mask[..., : 1 if mode == "LA" else 3]
        if (channels == channels[..., :1]).all() and channels.max(initial=0) <= IGNORE:
            return "its channels are equal, so keep one: Image.open(path).getchannel(0).save(path)"
        return "replace each of its colours by the number of the class, and save that as greyscale PNG"
    return "save it anew, as 8-bit greyscale PNG"
