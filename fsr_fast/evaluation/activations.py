"""Class activation maps of a picture too large to be held whole."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fsr_fast.kernels import MergedCams
from fsr_fast.runtime.files import naming

PREVIEW = 2048
"""Longest side, in pixels, of the activation maps that are kept for display."""
SPOOL_BYTES = 2**27
"""Activation maps of more bytes are kept in a file."""


class Activations:
    """CAMs of a picture before they are normalised: written band by band, read back once their extremes are known.

    Args:
        size: height and width of the picture.
        classes: (M,), int64, numbers of the classes.
        live: (M,), bool, which of them are present.
        keep: the maps will be read back, not only their preview.
    """

    def __init__(self, size: tuple[int, int], classes: Tensor, live: Tensor, *, keep: bool) -> None:
        self.classes, self.live = classes, live
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) if keep else None  # noqa: SIM115 closed by itself
        self._rows: list[slice] = []
        self._width, self.step = size[1], -(-max(size) // PREVIEW)
        self._preview = torch.zeros(len(classes), *(-(-length // self.step) for length in size))
        self._low, self._high = (torch.full((len(classes),), value) for value in (math.inf, -math.inf))

    def add(self, rows: slice, values: Tensor) -> None:
        """Add the next rows, (M, h, W)."""
        values = values.cpu()
        self._low, self._high = values.amin((1, 2)).minimum(self._low), values.amax((1, 2)).maximum(self._high)
        first, step = -rows.start % self.step, self.step
        sampled = values[:, first::step, ::step]
        place = (rows.start + first) // step
        self._preview[:, place : place + sampled.shape[1]] = sampled
        if self._file is not None:
            self._rows.append(rows)
            with naming(Path(tempfile.gettempdir())):
                self._file.write(values.contiguous().numpy().data)

    def bands(self) -> Iterator[tuple[slice, MergedCams]]:
        """Return the normalised CAMs, values (1, M, h, W), band by band."""
        assert self._file is not None
        self._file.seek(0)
        for rows in self._rows:
            values = torch.empty(len(self.classes), rows.stop - rows.start, self._width, dtype=self._low.dtype)
            self._file.readinto(values.numpy().data)
            yield rows, MergedCams(self._normalise(values)[None], self.classes[None], self.live[None])

    def preview(self) -> Tensor:
        """Return the normalised CAMs at every n-th pixel, (M, h, w), no side longer than `PREVIEW`."""
        return self._normalise(self._preview)

    def _normalise(self, values: Tensor) -> Tensor:
        low, high = self._low.view(-1, 1, 1), self._high.view(-1, 1, 1)
        return (values - low) * (self.live.view(-1, 1, 1) / (high - low + 1e-5))
