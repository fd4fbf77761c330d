"""The identity of a training set, kept in checkpoints: resuming with another one would silently go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Part(NamedTuple):
    """Identity of an image or a shard."""

    name: str
    labels: bytes
    size: int
    """Size of its file, in bytes."""
    content: bytes
    """Digest of its file; empty if it is not compared."""


class Parts(Protocol):
    """A training set."""

    def parts(self, *, contents: bool) -> Iterator[Part]:
        """Return its parts, in the order of the list."""
        ...


PROPERTIES = ("name", "other labels", "a file of another size", "a file of other content")


def fingerprint(dataset: Parts, *, contents: bool) -> Tensor:
    """Digest a training set.

    Args:
        dataset: the set.
        contents: also read every file.

    Returns:
        (N, 3), with contents (N, 4), int64: digests of name, labels, size and content of each part.
    """
    rows = []
    for name, labels, size, content in dataset.parts(contents=contents):
        parts = [name.encode(errors="surrogateescape"), labels, str(size).encode(), *([content] if contents else [])]
        rows.append([int.from_bytes(blake2b(part, digest_size=8).digest(), "big", signed=True) for part in parts])
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), -1)


def first_difference(recorded: Tensor, present: Tensor, dataset: Parts) -> str | None:
    """Describe where a training set differs from an earlier one.

    Args:
        recorded: fingerprint of the earlier one.
        present: of this one; contents are compared if both have them.
        dataset: this one, for the names.

    Returns:
        The first difference; None if there is none.
    """
    rows, columns = min(len(recorded), len(present)), min(recorded.shape[1], present.shape[1])
    differs = recorded[:rows, :columns] != present[:rows, :columns]
    if differs.any():
        row, column = (int(number) for number in differs.nonzero()[0])
        name = next(part.name for number, part in enumerate(dataset.parts(contents=False)) if number == row)
        count = int(differs.any(1).sum())
        what = f"is now {name!r}" if column == 0 else f"{name!r} has {PROPERTIES[column]}"
        return f"number {row + 1} of its list {what} ({count} of {rows} differ)"
    return None if len(recorded) == len(present) else f"it had {len(recorded)} entries and has {len(present)}"
