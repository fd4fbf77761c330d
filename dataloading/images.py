"""Read one image of any kind; every reader and check of the data sets uses these functions.

Pictures are untrusted, so `open_picture` is the only place in the package that hands a file to Pillow: only the formats
named there are ever tried, by content, not by name. Pillow knows forty more, some of which start other programs
(PostScript) or are parsed by little-reviewed code.

An image is always turned upright by its EXIF orientation.
"""

from __future__ import annotations

import io
import os
import re
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fsr_fast.errors import UserError

IGNORE = 255
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
STRANGERS = {  # first bytes of files that are often mistaken for pictures
    b"%PDF": "a PDF document",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"\xd7\xcd\xc6\x9a": "a Windows metafile (WMF)",
    b"\x01\x00\x00\x00": "a Windows metafile (EMF)",
    b"<svg": "a drawing (SVG)",
    b"<?xml": "an XML document or a drawing (SVG)",
    b"<!DOC": "a web page",
    b"<html": "a web page",
    b"GIF8": "a GIF",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself by `git lfs pull`",
}
PHONES = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif")
PLAIN = re.compile(r"[\w./-]*", re.ASCII).fullmatch  # such names need no closer look
LONGEST = 250  # bytes of a picture's name, and of each folder in it
SCANS = 100  # of a progressive JPEG; each costs a pass over all pixels, and cameras write about ten
MAX_PIXELS = 80_000_000  # of one image, unless more are allowed: 320 MB decoded; larger ones are refused undecoded
UPRIGHT = {  # operations that undo an EXIF orientation
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
_LIMIT = threading.Lock()


class DamagedFileError(UserError):
    """An image or a mask that is missing or cannot be decoded. The other files may still be good."""


class OutsideError(DamagedFileError):
    """A name that leads out of the data set, or is not a valid file name."""


def read_image(source: Source, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as RGB, upright.

    CMYK, greyscale and palette images are converted, the upper eight of 16 bits are kept, transparency is dropped.

    Args:
        source: file, or its content.
        name: its name in messages; by default the path.
        max_pixels: largest image that is read.

    Raises:
        DamagedFileError: missing, empty, truncated, of an unknown kind, or too large.
    """
    with open_picture(source, name, max_pixels=max_pixels) as image:
        turn = UPRIGHT.get(orientation(image))
        picture = _to_rgb(image)
        return picture.transpose(turn) if turn is not None else picture


class Header(NamedTuple):
    """Header of an image file."""

    width: int  # of the upright image, in pixels
    height: int
    format: str  # as Pillow names it: JPEG, PNG, …
    mode: str  # as Pillow names it: RGB, L, CMYK, …


def image_header(source: Source, name: str = "", max_pixels: int = MAX_PIXELS) -> Header:
    """Read the header of an image, without decoding it.

    Raises:
        DamagedFileError: missing, empty, of an unknown kind, or of more than `max_pixels` pixels.
    """
    with open_picture(source, name, decode=False, max_pixels=max_pixels) as image:
        width, height = image.size
        sideways = orientation(image) in SIDEWAYS
        return Header(*((height, width) if sideways else (width, height)), image.format or "", image.mode)


def image_size(source: Source, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height of the upright image, in pixels, without decoding it.

    Raises:
        DamagedFileError: as `image_header`.
    """
    return image_header(source, name, max_pixels)[:2]


def is_upright(source: Source) -> bool:
    """Return whether an image is stored upright.

    Raises:
        DamagedFileError: as `image_header`.
    """
    with open_picture(source, decode=False) as image:
        return orientation(image) not in UPRIGHT


def inside(folder: Path, name: str, links: Sequence[Path] = ()) -> Path:
    """Return the path of a file by its name in a folder, and refuse names that lead out of the folder.

    The folder itself may be a symbolic link; the file, and folders between, may be links to other places only if
    these are inside one of the roots that the user has named.

    Args:
        folder: where the file must lie.
        name: relative path, with `/` between its parts.
        links: roots into which links may lead (`data.allow_links`).

    Raises:
        OutsideError: an absolute path, a part `..`, or a symbolic link to a place outside.
    """
    check_name(name)
    path = folder / name
    linked = os.path.islink(path)
    if not linked and path.name == name:
        return path
    target = os.path.realpath(path) if linked else f"{_real(path.parent.absolute())}{path.name}"
    if not target.startswith(tuple(_real(root.absolute()) for root in (folder, *links))):
        raise OutsideError(
            f"{path}: a symbolic link that leads out of {folder}, to {target}; put the file itself there, or allow "
            f"links into its store: --data.allow_links '[{os.path.dirname(target)}]'"
        )
    return path


@lru_cache
def _real(folder: Path) -> str:
    return os.path.join(os.path.realpath(folder), "")


def check_name(name: str) -> None:
    """Refuse a name that leads out of its folder, or that result files could not have, by its text alone.

    Raises:
        OutsideError: an empty name, an absolute path, a part `..`; or as `check_spelling`.
    """
    drive = not PLAIN(name) and PureWindowsPath(name).drive
    if not name or name.startswith("/") or drive or ".." in name.split("/"):
        raise OutsideError(f"{name!r} leads out of the data set; expected a name within its folder")
    check_spelling(name)


def check_spelling(name: str) -> None:
    """Refuse a name that result files could not have, or that terminals and tables cannot show.

    Raises:
        OutsideError: a part of more than 250 bytes, control characters, or bytes that are not UTF-8.
    """
    if len(name) <= LONGEST and PLAIN(name):
        return
    if any(len(part.encode(errors="replace")) > LONGEST for part in name.split("/")):
        raise OutsideError(f"{name[:80]!r}…: too long for the files of its results ({LONGEST} bytes); rename it")
    if any(unicodedata.category(one) in ("Cc", "Cs") for one in name):
        raise OutsideError(f"{name!r}: holds control characters, or is not in UTF-8; rename it")


@contextmanager
def open_picture(
    source: Source, name: str = "", *, decode: bool = True, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open a picture of one of the `FORMATS`, recognised by its content.

    Errors that decoders raise inside the context also become this one error.

    Args:
        source: file, or its content.
        name: its name in messages; by default the path.
        decode: the pixels are needed, not only the header.
        max_pixels: largest picture that is opened.

    Raises:
        DamagedFileError: missing, empty, damaged, of another format, or of more than `max_pixels` pixels.
    """
    where = name or (str(source) if isinstance(source, Path) else "image")
    with explained(source, where, max_pixels):
        content = source.read_bytes() if decode and isinstance(source, Path) else source
        with _open(io.BytesIO(content) if isinstance(content, bytes) else content, max_pixels) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            scans = content.count(b"\xff\xda") if isinstance(content, bytes) else 0
            if image.format in ("JPEG", "MPO") and scans > SCANS:
                raise ValueError(f"a JPEG of more than {SCANS} scans, crafted to keep its reader busy")
            yield image


def _open(file: io.BytesIO | Path, max_pixels: int) -> Image.Image:
    """Open a file by Pillow; a higher limit of the user's replaces Pillow's own."""
    if Image.MAX_IMAGE_PIXELS is None or max_pixels <= Image.MAX_IMAGE_PIXELS:
        return Image.open(file, formats=FORMATS)
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextmanager
def explained(source: Source, where: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever decoders raise on damaged files into one error.

    Args:
        source: file, or its content.
        where: its name in messages.
        max_pixels: largest picture that is opened; a `DecompressionBombError` means that it is larger.

    Raises:
        DamagedFileError: in place of all errors except `UserError`, and `NotImplementedError`: another reader's turn.
    """
    try:
        yield
    except (UserError, NotImplementedError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DamagedFileError(
            f"{where}: more than {max_pixels:,} pixels; scale it down, take its id off the list, or raise "
            "--data.max_pixels"
        ) from None
    except FileNotFoundError:
        raise DamagedFileError(f"{where}: no such file; add it, or take its id off the list") from None
    except UnidentifiedImageError:
        raise DamagedFileError(
            f"{where}: cannot be decoded: {_describe(source)}; replace the file, or take its id off the list"
        ) from None
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        reason = " ".join((str(error) or type(error).__name__).split())
        raise DamagedFileError(
            f"{where}: cannot be decoded: {reason}; replace the file, or take its id off the list"
        ) from None


def _describe(source: Source) -> str:
    """Describe a file of an unknown format."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    if not content:
        return "the file is empty"
    start = content[:64].lstrip()
    kind = next((kind for magic, kind in STRANGERS.items() if start.startswith(magic)), None)
    if content[4:12] in PHONES:
        kind = "a phone's picture in HEIC or AVIF; save it as JPEG"
    known = f"supported formats are {', '.join(FORMATS)}"
    return f"it is {kind}; {known}" if kind else f"it is not a known picture format; {known}"


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 to 8."""
    try:
        # the base class's: PNG's own would decode the pixels, and its errors would be lost here
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data of all kinds, around pixels that may be intact
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, in a container of 16 or 32
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels of floating point; expected 8 or 16 bits per channel")
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")
