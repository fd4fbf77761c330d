"""What a loader gives, whichever library decodes and augments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a training batch.

    Args:
        views: V tensors (B, 3, H, W) float32, normalised; independently augmented views of the same images.
        labels: (B, C) float32, 1 where the image shows the class, else 0.
        indices: (B,) int64, numbers of the images in the data set.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return Batch(
            tuple(view.pin_memory() for view in self.views), self.labels.pin_memory(), self.indices.pin_memory()
        )


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """One image to evaluate, at its own resolution.

    Args:
        index: its number in the data set.
        image: (3, H, W) float32, normalised.
        labels: (C,) float32, 1 where the image shows the class, else 0.
        mask: (H, W) uint8: 0 background, 1…C the classes, 255 ignored; none where there is no mask.
        name: its id.
    """

    index: int
    image: Tensor
    labels: Tensor
    mask: Tensor | None
    name: str


class TrainLoader(Protocol):
    """An endless stream of training batches.

    The images come in the order of one permutation an epoch, epoch after epoch without a gap. Position p of that
    stream, counted over all ranks, goes to rank p % world_size. Order and augmentation at a position are functions of
    the seed and the position alone: neither the number of workers nor an interruption changes them.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Go on from the present position."""
        ...

    def __next__(self) -> Batch:
        """Give the next batch.

        Raises:
            UserError: an image is missing or cannot be decoded.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """Give the position after the last batch given, in samples over all ranks."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the sample after those that were given when the state was taken.

        Raises:
            UserError: the state belongs to another training list or another seed.
        """
        ...

    def close(self) -> None:
        """Stop the workers. The next batch would start them anew."""
        ...
