"""Tiles of a large picture: their places, their weight at every pixel, and their sum, band by band.

Rows and columns are planned separately, in the same way: a tile is one span of each. Tiles are weighted by Hann
windows, normalised so that the weights at every pixel sum to one and there are no seams.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BAND_VALUES = 2**23
"""Number of values in a band: 32 MiB of float32."""


@dataclass(frozen=True)
class Spans:
    """The rows, or the columns, of all tiles of a picture.

    Args:
        length: of the picture, in pixels.
        side: of a tile, in pixels, at most `length`.
        starts: first pixel of each span, in order.
    """

    length: int
    side: int
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def slice(self, number: int) -> slice:
        """Return the pixels of a span."""
        return slice(self.starts[number], self.starts[number] + self.side)

    def weights(self, number: int) -> Tensor:
        """Return the weight of a span at each of its pixels, (side,) float32; those of all spans sum to one."""
        window = _hann(self.side)
        total = torch.zeros(self.length, dtype=torch.float64)
        for other in range(len(self)):
            total[self.slice(other)] += window
        return (window / total[self.slice(number)]).float()


@dataclass(frozen=True)
class Plan:
    """The tiles of a picture: every span of rows with every span of columns, row by row."""

    rows: Spans
    columns: Spans

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.rows.length, self.columns.length

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def regions(self) -> Iterator[tuple[slice, slice]]:
        """Return rows and columns of each tile."""
        for row in range(len(self.rows)):
            for column in range(len(self.columns)):
                yield self.rows.slice(row), self.columns.slice(column)


def plan_spans(length: int, side: int, overlap: float, patch: int) -> Spans:
    """Cover a length by the fewest spans that overlap enough, spread evenly.

    Args:
        length: of the picture, in pixels.
        side: of a tile, in pixels; a shorter picture is one span.
        overlap: smallest share of a span that overlaps the next, 0 ≤ overlap < 1.
        patch: spans begin at multiples of this many pixels, except the last one, which ends with the picture.
    """
    if length <= side:
        return Spans(length, length, (0,))
    stride = max(patch, math.floor(side * (1 - overlap) / patch) * patch)
    steps = math.ceil((length - side) / stride)
    inner = (-(-number * (length - side) // (steps * patch)) * patch for number in range(steps))
    return Spans(length, side, (*inner, length - side))


def plan_tiles(size: tuple[int, int], side: int, overlap: float, patch: int = 1) -> Plan:
    """Cover a picture by tiles.

    Args:
        size: its height and width.
        side: of a tile, in pixels.
        overlap: smallest share of a tile that overlaps the next one.
        patch: as in `plan_spans`.
    """
    height, width = size
    return Plan(plan_spans(height, side, overlap, patch), plan_spans(width, side, overlap, patch))


class TileValues(Protocol):
    """The values of a tile, (K, height, width) in all."""

    def band(self, rows: slice) -> Tensor:
        """Return the values of some rows of the tile, (K, rows, width), float32."""
        ...


def blend(
    plan: Plan, tiles: Iterable[TileValues], channels: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Add up the tiles by their weights, from the top of the picture to its bottom.

    Only the tiles that the present band needs are drawn, and those above it are dropped: memory holds the values of
    the rows of tiles that overlap, and one band.

    Args:
        plan: where the tiles lie.
        tiles: in the order of the plan.
        channels: K, values per pixel.
        device: of the values.

    Returns:
        Rows of the picture, and their values (K, rows, W), float32.
    """
    height, width = plan.size
    step = max(1, min(256, BAND_VALUES // (channels * width)))
    source = iter(tiles)
    columns = [plan.columns.weights(column).to(device) for column in range(len(plan.columns))]
    rows: deque[tuple[slice, Tensor, list[TileValues]]] = deque()
    known = 0
    for top in range(0, height, step):
        band = slice(top, min(top + step, height))
        while rows and rows[0][0].stop <= band.start:
            rows.popleft()
        while known < len(plan.rows) and plan.rows.starts[known] < band.stop:
            tiles_of_row = [next(source) for _ in columns]
            rows.append((plan.rows.slice(known), plan.rows.weights(known).to(device), tiles_of_row))
            known += 1
        total = torch.zeros(channels, band.stop - band.start, width, device=device)
        for span, weights, found in rows:
            shared = slice(max(span.start, band.start), min(span.stop, band.stop))
            inside = slice(shared.start - span.start, shared.stop - span.start)
            there = slice(shared.start - band.start, shared.stop - band.start)
            for column, tile in enumerate(found):
                weight = weights[inside, None] * columns[column]
                total[:, there, plan.columns.slice(column)].addcmul_(tile.band(inside), weight)
        yield band, total


def _hann(side: int) -> Tensor:
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return (math.pi * place).sin().square()
