"""What is measured once over the training pictures and belongs to a network like its weights: window, mean, std."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.arrays import Pixels, open_array
from fsr_fast.dataloading.images import DamagedFileError, Source
from fsr_fast.dataloading.reading import (
    Reading,
    Window,
    check_finite,
    check_window,
    choose_channels,
    format_window,
    given_window,
    is_deep,
)
from fsr_fast.errors import UserError

SAMPLE = 64  # pictures in the sample
BLOCK, BLOCKS = 512, 4  # of a picture too large to be read whole: side, and number per axis, of the parts read
VALUES = 4096  # per channel and picture, for percentiles

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """Results of measuring the training pictures."""

    window: Window | None
    """None: all sampled pictures have 8 bits."""
    mean: tuple[float, ...]
    """Mean of each channel, for values in 0…1."""
    std: tuple[float, ...]
    """Likewise."""


def read_measured(value: Any, channels: int, origin: str) -> Measured | None:
    """Check the entry `input` of a checkpoint; None: it is older than the entry.

    Raises:
        UserError: anything other than `Measured` as a dictionary.
    """
    if value is None:
        return None
    try:
        pairs = value["window"]
        window = None if pairs is None else tuple((float(low), float(high)) for low, high in pairs)
        mean, std = (tuple(map(float, value[key])) for key in ("mean", "std"))
        check_window(window, channels)
        if not (len(mean) == len(std) == channels and all(map(math.isfinite, mean)) and all(one > 0 for one in std)):
            raise ValueError("mean, std: expected a number for each channel")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{origin}: its entry input is damaged ({error}); give another checkpoint") from None
    return Measured(window, mean, std)


class Sources(Protocol):
    """A list of pictures."""

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def source(self, index: int) -> tuple[Source, str]:
        """Return the file of a picture, or its content, and its name in messages."""
        ...


def measure(pictures: Sources, data: DataConfig, reading: Reading, *, normalisation: bool) -> Measured:
    """Measure what belongs to a network besides its weights, over a fixed sample of the training list.

    Args:
        pictures: the training list.
        data: `window`.
        reading: number of channels, and the largest picture.
        normalisation: also measure mean and standard deviation; else they are empty.

    Raises:
        DamagedFileError: no sampled picture can be read.
    """
    window = given_window(data) or _find_window(pictures, data, reading)
    mean, std = _find_normalisation(pictures, replace(reading, window=window)) if normalisation else ((), ())
    return Measured(window, mean, std)


def _find_window(pictures: Sources, data: DataConfig, reading: Reading) -> Window | None:
    """Find the window of the pictures deeper than 8 bits; None: all sampled pictures have 8.

    One channel has one window, and so have three together, so that colours keep their balance; with any other number
    each channel has its own.
    """
    ends, values = [], []
    for number in _sampled(len(pictures)):
        try:
            source, name = pictures.source(number)
            if not is_deep(source, name, reading.max_pixels):
                continue
            stored = open_array(source, name, max_pixels=reading.max_pixels)
            chosen = choose_channels(stored, reading.channels)
            if stored.dtype == np.uint8 or chosen is None:
                continue
            part = _sample(stored)[:, chosen]
            check_finite(part, name)
        except DamagedFileError:  # reported when it is trained on
            continue
        part = part.reshape(-1, 1) if reading.channels in (1, 3) else part
        ends.append((part.min(0), part.max(0)))
        values.append(part[:: max(1, len(part) // VALUES)].astype(np.float64))
    if not ends:
        return None
    pooled = np.concatenate(values)
    if data.window == "auto":
        low = np.min([least for least, _ in ends], axis=0).astype(np.float64)
        high = np.max([most for _, most in ends], axis=0).astype(np.float64)
    else:
        low, high = np.percentile(pooled, [float(share) for share in data.window[1:]], axis=0)
    high = np.where(high > low, high, low + 1)
    found = tuple(zip(low.tolist(), high.tolist(), strict=True))
    logger.info("data.window: %s, found in %d training pictures", format_window(found), len(ends))
    nearly_all = np.percentile(pooled, 99.9, axis=0)
    if data.window == "auto" and (nearly_all - low < (high - low) / 16).any():
        logger.warning(
            "data.window: nearly all values lie in the lowest sixteenth of %s, so pictures will be dark; "
            "try --data.window percentile 0.1 99.9",
            format_window(found),
        )
    return found


def _find_normalisation(pictures: Sources, reading: Reading) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation of each channel, for values in 0…1."""
    sums = np.zeros((2, reading.channels))
    count, first = 0, None
    for number in _sampled(len(pictures)):
        try:
            part = _sample(reading.open(*pictures.source(number))).astype(np.float64) / 255
        except DamagedFileError as error:
            first = first or error
            continue
        sums += part.sum(0), (part**2).sum(0)
        count += len(part)
    if not count:
        raise first or DamagedFileError("the training list is empty")
    mean, square = sums / count
    std = np.sqrt(np.maximum(square - mean**2, 1 / 255**2))  # for a constant channel, one grey level
    return tuple(mean.tolist()), tuple(std.tolist())


def _sampled(count: int) -> Iterator[int]:
    """Return the numbers of the sampled pictures, spread over the list."""
    return iter(range(0, count, -(-count // SAMPLE)) if count else ())


def _sample(pixels: Pixels) -> NDArray[Any]:
    """Return values (n, C) of a picture: all, or for a large one those in blocks spread over it."""
    height, width, channels = pixels.shape
    if height * width <= (BLOCK * BLOCKS) ** 2:
        return pixels[:, :].reshape(-1, channels)
    tops, lefts = (np.linspace(0, max(0, side - BLOCK), BLOCKS, dtype=int).tolist() for side in (height, width))
    blocks = (pixels[top : top + BLOCK, left : left + BLOCK].reshape(-1, channels) for top in tops for left in lefts)
    return np.concatenate(list(blocks))
