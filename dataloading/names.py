"""Many names in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np


class Names:
    """Names of images, as one run of bytes and one array of where they end.

    There is no Python object per name: a list of 100,000 takes a few megabytes, and the loader's processes share
    the memory, since no reference counts are written there.

    Args:
        names: the names, in their order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        start, end = self._ends[index : index + 2].tolist()
        return self._bytes[start:end].decode("utf-8", "surrogatepass")

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return (self._bytes[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(ends))

    def take(self, indices: Iterable[int]) -> Names:
        """Return some of the names, in the order of their numbers."""
        return Names(map(self.__getitem__, indices))
