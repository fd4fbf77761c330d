"""The interface of the loaders, whichever library decodes and augments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fsr_fast.dataloading.fingerprint import Parts
from fsr_fast.dataloading.reading import Reading


class EncodedImage(NamedTuple):
    """An image as stored.

    Args:
        data: content of the file.
        labels: (C,) float32, 1 where the image shows the class, else 0.
        name: its name in messages.
    """

    data: bytes
    labels: NDArray[np.float32]
    name: str


class Order(Protocol):
    """The order of one epoch."""

    def __getitem__(self, offset: int, /) -> int:
        """Return the number of the image at an offset."""
        ...


class TrainSource(Protocol):
    """Where the images of training come from: files, or shards."""

    @property
    def reading(self) -> Reading:
        """How images are read."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def encoded(self, index: int) -> EncodedImage:
        """Read an image by its number, undecoded.

        Raises:
            DamagedFileError: it is missing or cannot be read.
        """
        ...

    def order(self, seed: int, epoch: int) -> Order:
        """Return the order of an epoch: every number once; a function of seed and epoch."""
        ...


Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    """A property of each image, by its number."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Return the property of an image."""
        ...


class ImageSet(TrainSource, Parts, Protocol):
    """A list of images to train on or to evaluate, such as `SegmentationDataset` and `ShardDataset`."""

    @property
    def ids(self) -> Items[str]:
        """Names of the images."""

    @property
    def labels(self) -> Items[NDArray[np.float32]]:
        """For each image (C,), 1 where it shows the class, else 0."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C foreground classes."""

    @property
    def max_labels(self) -> int:
        """Largest number of labels of an image."""

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as the network takes it, (H, W, channels), upright.

        Raises:
            DamagedFileError: it is missing or cannot be decoded.
        """
        ...

    def image(self, index: int) -> Image.Image:
        """Read an image for display, in colours, upright; raises like `pixels`."""
        ...

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """Return the file of an image, or its content, and its name in messages.

        Raises:
            DamagedFileError: it is missing or cannot be read.
        """
        ...

    def read_as(self, reading: Reading) -> Self:
        """Return the same list with a different reading."""
        ...

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """Read a mask, (H, W): 0 background, 1…C the classes, 255 ignored; None if there is none.

        Raises:
            DamagedFileError: it is damaged.
        """
        ...


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a training batch.

    Args:
        views: V tensors (B, channels, H, W) float32, normalised; independently augmented views of the same images.
        labels: (B, C) float32, 1 where the image shows the class, else 0.
        indices: (B,) int64, numbers of the images in the data set.
        bad: damaged images so far, each replaced by another: number, and what is wrong.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor
    bad: Mapping[int, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return replace(
            self,
            views=tuple(view.pin_memory() for view in self.views),
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
        )


class TrainLoader(Protocol):
    """An endless stream of training batches.

    The images come in the order of one permutation per epoch, epoch after epoch without a gap. Position p of that
    stream, counted over all ranks, goes to rank p % world_size. Order and augmentation at a position are functions of
    the seed and the position alone: neither the number of workers nor an interruption changes them. An image that
    cannot be decoded is replaced by the one at the next position.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Continue from the present position."""
        ...

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: more images are damaged than `data.max_bad_fraction` allows.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch returned, in samples over all ranks."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the sample after those returned when the state was taken.

        Raises:
            UserError: the state belongs to another training list or another seed.
        """
        ...

    def close(self) -> None:
        """Stop the workers. The next batch would restart them."""
        ...
