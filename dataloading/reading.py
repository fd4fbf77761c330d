"""How the pictures of a data set become a network's input: 8 bits per channel, with the number of channels it takes.

Pictures of 8 bits stay as they are. For deeper ones a window, from the value that becomes 0 to the one that becomes
255, is measured once over the training pictures; it belongs to the trained network like its weights.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.dataloading import tiff
from fsr_fast.dataloading.arrays import DEEP_PNG, NUMPY, Pixels, is_dicom, open_array, start_of
from fsr_fast.dataloading.images import MAX_PIXELS, DamagedFileError, Source, image_header, image_size, read_image

Window = tuple[tuple[float, float], ...]
"""Lowest and highest value, of all channels or of each."""

FULL: Window = ((0, 2**16 - 1),)
"""Window of whole numbers if none is known."""
BAND = 256  # rows whose steps are computed at a time, in float64
LARGE_PIXELS = 2**22  # training reads larger pictures by region where their format allows it
DARK = 32  # of 255; a picture of whole numbers that nowhere reaches this was meant for another window

logger = logging.getLogger(__name__)
_warned: set[str] = set()


def picture_size(source: Source, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height of the upright picture, in pixels; pictures of 8 bits are not decoded.

    Raises:
        DamagedFileError: missing, damaged, of an unknown kind, or of more than `max_pixels` pixels.
    """
    try:
        start = start_of(source)
    except OSError:
        start = b""
    if start.startswith((NUMPY, *tiff.MAGIC)) or is_dicom(start):
        height, width, _ = open_array(source, name, max_pixels=max_pixels).shape
        return width, height
    return image_size(source, name, max_pixels)


@dataclass(frozen=True)
class Reading:
    """Reads pictures as a network takes them.

    Args:
        channels: number of channels C.
        window: of pictures deeper than 8 bits; None: the 16 bits of whole numbers, and no floating point.
        preview: channels, from 0, shown as red, green and blue; None: the first three, or only the first.
        max_pixels: largest picture that is read.
    """

    channels: int = 3
    window: Window | None = None
    preview: tuple[int, ...] | None = None
    max_pixels: int = MAX_PIXELS

    def pixels(self, source: Source, name: str = "") -> NDArray[np.uint8]:
        """Read a picture, (H, W, C), upright.

        Args:
            source: file, or its content.
            name: its name in messages; by default the path.

        Raises:
            DamagedFileError: missing, damaged, too large, of another number of channels, or not finite.
        """
        return np.asarray(self.picture(source, name))

    def picture(self, source: Source, name: str = "") -> Image.Image | NDArray[np.uint8]:
        """Read a picture as `pixels` does; with three channels as a Pillow picture."""
        if self.channels == 3 and not is_deep(source, name, self.max_pixels):
            return read_image(source, name, self.max_pixels)
        pixels = self.open(source, name)[:, :]
        return Image.fromarray(pixels) if self.channels == 3 else pixels

    def image(self, source: Source, name: str = "") -> Image.Image:
        """Read a picture for display, in colours, upright; raises like `pixels`."""
        return Image.fromarray(self.colours(self.pixels(source, name)))

    def open(self, source: Source, name: str = "") -> Pixels:
        """Open a picture to be read by region, `[y0:y1, x0:x1]`: (h, w, C) uint8; both may raise like `pixels`."""
        where = name or (str(source) if isinstance(source, Path) else "image")
        return _Windowed(open_array(source, where, max_pixels=self.max_pixels), self, where)

    def open_large(self, path: Path) -> Pixels | None:
        """Open a large picture to be read by region, if its format allows it; None: it is decoded whole.

        Raises:
            DamagedFileError: as `pixels`; slicing may raise it, too.
        """
        try:
            by_region = start_of(path).startswith((NUMPY, *tiff.MAGIC))
        except OSError:
            by_region = False  # reported when it is read
        opened = self.open(path) if by_region else None
        return opened if opened is not None and math.prod(opened.shape[:2]) > LARGE_PIXELS else None

    def colours(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the colours (H, W, 3) of the result of `pixels`, from the preview channels."""
        return pixels if self.channels == 3 and self.preview is None else pixels[..., list(self.shown)]

    def settings(self) -> dict[str, str]:
        """Return the settings that change results, for a journal's header; none if pictures are read as photographs."""
        found = {} if self.window is None else {"window": format_window(self.window)}
        return found if self.preview is None else {**found, "preview": str(self.preview)}

    @property
    def shown(self) -> tuple[int, int, int]:
        """Channels, from 0, shown as red, green and blue."""
        chosen = self.preview or ((0, 1, 2) if self.channels >= 3 else (0,))
        red, green, blue = chosen if len(chosen) == 3 else chosen * 3
        return red, green, blue


COLOURS = Reading()
"""Three colours of 8 bits."""


class Stored(NamedTuple):
    """A picture for a check."""

    values: NDArray[Any]
    """(H, W, 3) uint8 in colours if it has 8 bits, else the stored values, (H, W, C)."""
    channels: int
    """Number of stored channels; a palette has three."""
    network: int
    """Channels of the network (`model.in_chans`) that fits it: three, if they can be read as colours."""


def read_stored(source: Source, name: str = "", max_pixels: int = MAX_PIXELS) -> Stored:
    """Read a picture for a check.

    Raises:
        DamagedFileError: missing, damaged, too large, or not finite.
    """
    if not is_deep(source, name, max_pixels):
        mode = image_header(source, name, max_pixels).mode
        channels = {"1": 1, "L": 1, "LA": 2, "RGBA": 4}.get(mode, 3)
        return Stored(np.asarray(read_image(source, name, max_pixels)), channels, 3)
    opened = open_array(source, name, max_pixels=max_pixels)
    values, found = opened[:, :], opened.shape[2]
    check_finite(values, name or str(source))
    return Stored(values, found, found if choose_channels(opened, 3) is None else 3)


def is_deep(source: Source, name: str, max_pixels: int) -> bool:
    """Return whether Pillow would lose information of a picture."""
    try:
        start = start_of(source)
    except OSError:
        return False  # reported when it is read
    if start.startswith(b"\x89PNG"):
        return start[24:25] == bytes([DEEP_PNG])
    if start.startswith(tiff.MAGIC):
        opened = open_array(source, name, max_pixels=max_pixels)
        return opened.dtype != np.uint8 or opened.shape[2] > 4 or getattr(opened, "pages", 1) > 1
    return start.startswith(NUMPY) or is_dicom(start)


class _Windowed:
    """A picture by region, converted to 8 bits and the network's channels."""

    def __init__(self, stored: Pixels, reading: Reading, where: str) -> None:
        self._stored, self._reading, self._where = stored, reading, where
        found, wanted = stored.shape[2], reading.channels
        self._chosen = choose_channels(stored, wanted)
        if self._chosen is None:
            hint = "; they seem to be the first axis: store them last" if stored.shape[0] == wanted else ""
            raise DamagedFileError(
                f"{where}: {found} channels, but the network takes {wanted} (model.in_chans){hint}; if all have as "
                f"many, give --model.in_chans {found} to the training; else make all alike, or take its id off the list"
            )
        if stored.dtype.kind == "f" and reading.window is None:
            raise DamagedFileError(
                f"{where}: floating point, and no window is known; give --data.window LOW HIGH, or take its id off "
                "the list"
            )
        self.shape = (*stored.shape[:2], wanted)
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.uint8]:
        values = self._stored[key][..., self._chosen]
        if values.dtype == np.uint8:
            return np.ascontiguousarray(values)
        check_finite(values, self._where)
        window = self._reading.window
        bytes_ = to_bytes(values, window or FULL)
        if window is None and bytes_.size and bytes_.max() < DARK and self._where not in _warned:
            _warned.add(self._where)
            logger.warning(
                "%s: %d bits per channel, of which the highest value is %d: nearly black; give --data.window LOW HIGH",
                self._where,
                8 * values.dtype.itemsize,
                values.max(),
            )
        return bytes_


def choose_channels(stored: Pixels, wanted: int) -> list[int] | slice | None:
    """Return the channels of a picture to use; None: they do not fit.

    A network for three colours also takes grey pictures, and drops transparency; pages of a TIFF are not transparency.
    """
    found = stored.shape[2]
    if found == wanted:
        return slice(None)
    if wanted != 3 or getattr(stored, "pages", 1) > 1:
        return None
    return {1: [0, 0, 0], 2: [0, 0, 0], 4: [0, 1, 2]}.get(found)


def check_finite(values: NDArray[Any], where: str) -> None:
    """Refuse values that are not finite.

    Raises:
        DamagedFileError: NaN or infinite.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DamagedFileError(
            f"{where}: holds values that are not finite (NaN, or infinite); replace them by numbers, or take its "
            "id off the list"
        )


def to_bytes(values: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Map values to 0…255: 256 equal steps from the lowest to the highest value of the window, the end of the last.

    For 12 or 16 bits, with their whole range as the window, these are the upper eight bits.

    Args:
        values: (H, W, C), whole numbers or floating point.
        window: of all channels, or of each.

    Returns:
        (H, W, C).
    """
    low = np.array([ends[0] for ends in window])
    scale = 256 / (np.array([ends[1] for ends in window]) - low)
    steps = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), BAND):
        band = slice(top, top + BAND)
        steps[band] = np.floor((values[band] - low) * scale).clip(0, 255)
    return steps


def given_window(data: DataConfig) -> Window | None:
    """Return the window that a configuration gives in numbers; None: it is to be measured."""
    if data.window == "auto" or data.window[0] == "percentile":
        return None
    ends = [float(end) for end in data.window]
    return tuple(zip(ends[::2], ends[1::2], strict=True))


def check_window(window: Window | None, channels: int) -> None:
    """Refuse an invalid window.

    Raises:
        ValueError: not pairs, neither one for all channels nor one per channel, or ends that do not increase.
    """
    if window is not None and not (
        len(window) in (1, channels) and all(math.isfinite(high - low) and low < high for low, high in window)
    ):
        raise ValueError(f"window: {window}; expected a lowest and a highest value for all channels, or for each")


def format_window(window: Window) -> str:
    """Format a window as `data.window` takes it."""
    return " ".join(f"{end:.9g}" for ends in window for end in ends)
