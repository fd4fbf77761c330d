"""The number of channels of a data set's pictures, and whether one network fits them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from fsr_fast.dataloading.reading import COLOURS


class Channels:
    """The channels of the pictures of a data set.

    Args:
        lists: by name of the list and of the picture, the number of its channels, and that of the network
            (`model.in_chans`) that fits it, from `read_stored`.
    """

    def __init__(self, lists: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
        self._lists = lists
        self._counts = Counter(kind for pictures in lists.values() for kind in pictures.values())
        self._networks = Counter(network for pictures in lists.values() for _, network in pictures.values())

    @property
    def usual(self) -> int:
        """Channels of the network that fits most pictures."""
        return self._networks.most_common(1)[0][0] if self._networks else COLOURS.channels

    @property
    def notes(self) -> list[str]:
        """Return a remark if all pictures are read as colours, though not all of them are."""
        found = {channels for channels, _ in self._counts}
        if set(self._networks) != {COLOURS.channels} or found in ({1}, {COLOURS.channels}):
            return []
        clear = "; the last of 2 or 4 channels is taken for transparency, and left out" if found & {2, 4} else ""
        return [f"three colours (model.in_chans 3), from {self._listed()}{clear}"]

    @property
    def warnings(self) -> list[str]:
        """Return why one network does not fit all pictures."""
        if len(self._networks) < 2:
            return []
        return [f"a network takes pictures of one kind (model.in_chans), but here are {self._listed()}"]

    def others(self) -> Iterator[tuple[str, str, str]]:
        """Return list, name and finding of each picture that does not fit the network for most pictures."""
        rest = f"most pictures are for model.in_chans {self.usual}; save it like those, or take it off the list"
        for part, pictures in self._lists.items():
            for name, (found, network) in pictures.items():
                if network != self.usual:
                    yield part, name, f"{found} channel{'s' * (found != 1)}, but {rest}"

    def _listed(self) -> str:
        texts = []
        for kind, count in sorted(self._counts.items()):
            first = next(name for pictures in self._lists.values() for name in pictures if pictures[name] == kind)
            channels, plural = f"{kind[0]} channel{'s' * (kind[0] != 1)}", "s" * (count != 1)
            texts.append(f"{channels} in {count} picture{plural} (first: {first})")
        return ", ".join(texts)
