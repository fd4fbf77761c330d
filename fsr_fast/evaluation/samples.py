"""Images to evaluate: read ahead, each once, in batches of similar size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.stream import read_ahead
from fsr_fast.errors import UserError
from fsr_fast.runtime.loading import Deaths, deaths_raise

WINDOW = 64
"""Images that may wait for others of their size; bounds the memory for lists of any length."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image at its own resolution."""

    index: int
    """Its number in the data set."""
    name: str
    image: NDArray[np.uint8]
    """(H, W, 3), RGB, as displayed."""
    labels: NDArray[np.float32]
    """(C,), 1 where the image shows the class, else 0."""
    truth: NDArray[np.uint8] | None
    """(H, W): 0 background, 1…C the classes, 255 ignored; None without a mask."""
    channels: NDArray[np.uint8] | None = None
    """(H, W, channels), input of the network; None: it is `image`."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, channels), input of the network."""
        return self.image if self.channels is None else self.channels


@dataclass(frozen=True)
class Failure:
    """An image that could not be evaluated."""

    name: str
    message: str


def read_samples(dataset: ImageSet, indices: Sequence[int], workers: int) -> Iterator[Sample | Failure]:
    """Read images and masks.

    Args:
        dataset: the data set.
        indices: which ones, in this order.
        workers: processes that read ahead; 0: this one reads.

    Returns:
        A sample for each index, or why it could not be read. A process that dies is replaced.

    Raises:
        UserError: processes keep dying.
    """
    deaths = Deaths()
    done = 0
    while done < len(indices):
        stream: Iterator[Sample | Failure] | None = None
        while done < len(indices):
            try:
                with deaths_raise():
                    if stream is None:
                        stream = read_ahead(_Reader(dataset), workers, batch_size=None, sampler=indices[done:])
                    sample = next(stream)
            except RuntimeError as error:
                deaths.count(error)
                break
            done += 1
            yield sample


def batches_of_like_size(
    samples: Iterable[Sample | Failure], key: Callable[[tuple[int, int]], Hashable], pixels: int
) -> Iterator[list[Sample] | Failure]:
    """Gather samples that can pass through the network together.

    Args:
        samples: in any order.
        key: function of height and width that must be equal within a batch.
        pixels: largest sum over a batch; a larger image goes alone.

    Returns:
        Batches; failures are passed through.
    """
    waiting: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        if isinstance(sample, Failure):
            yield sample
            continue
        height, width = sample.image.shape[:2]
        batch = waiting.setdefault(key((height, width)), [])
        batch.append(sample)
        if (len(batch) + 1) * height * width > pixels:
            yield waiting.pop(key((height, width)))
        elif sum(map(len, waiting.values())) >= WINDOW:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


class _Reader(Dataset[Any]):
    def __init__(self, dataset: ImageSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.ids)

    def __getitem__(self, index: int) -> Sample | Failure:
        name = self.dataset.ids[index]
        try:
            pixels, labels = self.dataset.pixels(index), self.dataset.labels[index]
            image = self.dataset.reading.colours(pixels)
            channels = None if image is pixels else pixels
            return Sample(index, name, image, labels, self.dataset.mask(index), channels)
        except UserError as error:
            return Failure(name, str(error))
