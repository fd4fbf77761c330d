"""How many channels the pictures of a data set have, and whether one network takes them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from fsr_fast.dataloading.reading import choose_channels

COLOURS = 3


class Channels:
    """The channels of the pictures of a data set.

    Args:
        lists: by name of the list and of the picture, the number of its channels.
    """

    def __init__(self, lists: Mapping[str, Mapping[str, int]]) -> None:
        self._lists = lists
        counts = Counter(found for pictures in lists.values() for found in pictures.values())
        networks = Counter[int]()
        for found, count in counts.items():
            networks[network_of(found)] += count
        self._counts, self._networks = counts, networks

    @property
    def usual(self) -> int:
        """Channels of the network (`model.in_chans`) that takes most pictures."""
        return self._networks.most_common(1)[0][0] if self._networks else COLOURS

    @property
    def notes(self) -> list[str]:
        """A remark on pictures that are all read as colours, though not all of them are."""
        if len(self._counts) < 2 or len(self._networks) > 1:
            return []
        return [f"three colours (model.in_chans 3) from {self._listed()}; no other number takes all of them"]

    @property
    def warnings(self) -> list[str]:
        """What keeps the pictures from passing through one network."""
        if len(self._networks) < 2:
            return []
        return [f"a network takes pictures of one kind (model.in_chans), but here are {self._listed()}"]

    def others(self) -> Iterator[tuple[str, str, str]]:
        """Return list, name and reproach of each picture that the network of most pictures does not take."""
        rest = f"most pictures are for model.in_chans {self.usual}; save it like those, or take it off the list"
        for part, pictures in self._lists.items():
            for name, found in pictures.items():
                if network_of(found) != self.usual:
                    yield part, name, f"{found} channel{'s' * (found != 1)}, but {rest}"

    def _listed(self) -> str:
        texts = []
        for found, count in sorted(self._counts.items()):
            first = next(name for pictures in self._lists.values() for name in pictures if pictures[name] == found)
            texts.append(f"{found} channel{'s' * (found != 1)} in {count} picture{'s' * (count != 1)} (first: {first})")
        return ", ".join(texts)


def network_of(found: int) -> int:
    """Return the channels of the network that takes a picture of `found` channels: three, if they can be colours."""
    return found if choose_channels(found, COLOURS) is None else COLOURS
