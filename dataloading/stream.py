"""The stream of training images: the image at each position, replacements for damaged ones, and the progress.

An image that cannot be decoded is skipped: it is replaced by the image of the next position, and the draws of the
augmentation stay those of the position. So a batch keeps its size, and the image at a position remains a function of
the seed, the position and the files.
"""

from __future__ import annotations

import fcntl
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fsr_fast.dataloading.batch import Batch, TrainSource
from fsr_fast.dataloading.images import DamagedFileError
from fsr_fast.errors import UserError

BAD_FILES = "bad_files.txt"
TAB = "\t"
SHOWN = 20  # names of damaged files in a message

Read = TypeVar("Read")

logger = logging.getLogger(__name__)


class Stream:
    """Images by position.

    Args:
        dataset: training set.
        seed: of the order, ≥ 0.
        bad: damaged images already known: number in the data set, and what is wrong.
    """

    def __init__(self, dataset: TrainSource, seed: int, bad: Mapping[int, str] | None = None) -> None:
        self.dataset, self.seed = dataset, seed
        self.bad = dict(bad or {})
        self._epoch, self._order = -1, dataset.order(seed, 0)

    def load(self, position: int, read: Callable[[int], Read]) -> tuple[int, Read]:
        """Read the image at a position, or the first intact one after it; record damaged ones in `bad`.

        Args:
            position: ≥ 0, counted over all ranks and epochs.
            read: reads an image by its number.

        Returns:
            Number of the image, and what was read.

        Raises:
            UserError: all images of the data set are damaged.
        """
        for place in range(position, position + 2 * len(self.dataset)):  # this range contains a whole epoch
            index = self._index(place)
            if index not in self.bad:
                try:
                    return index, read(index)
                except DamagedFileError as error:
                    self.bad[index] = str(error)
        raise UserError(f"no training image can be decoded; the last: {self.bad[index]}")

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.dataset.order(self.seed, epoch)
        return int(self._order[offset])


class BadFiles:
    """The damaged files that the ranks of a run have found since its start, each named once.

    More than `fraction` of the training list stops the run. One file is always allowed, unless the fraction is 0.

    Args:
        path: file that lists number and fault of each, shared by all ranks; None: nothing is written, and each rank
            counts its own.
        images: number of images in the training list.
        fraction: largest share of them that may be damaged, in the range 0 to 1.
    """

    def __init__(self, path: Path | None, images: int, fraction: float) -> None:
        self.path, self.images, self.fraction = path, images, fraction
        self.limit = max(1, int(fraction * images)) if fraction else 0
        self._known: set[int] = set()
        self._lines: list[str] = []

    def clear(self) -> None:
        """Forget the list of an earlier start of the run. One rank calls it, before any adds to the list."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, bad: Mapping[int, str]) -> None:
        """Add damaged files: number of the image, and what is wrong.

        Raises:
            UserError: there are too many now.
        """
        new = {index: " ".join(reason.split()) for index, reason in bad.items() if index not in self._known}
        if not new:
            return
        self._known.update(new)
        for reason in new.values():
            logger.warning("skipped a damaged training image: %s", reason)
        self._list(new)
        if len(self._lines) > self.limit:
            where = f" (all in {self.path})" if self.path else ""
            shown = "\n".join(f"  {line.partition(TAB)[2]}" for line in self._lines[:SHOWN])
            raise UserError(
                f"{len(self._lines)} of {self.images} training images are damaged; data.max_bad_fraction = "
                f"{self.fraction} allows {self.limit}; replace them, or raise it{where}:\n{shown}"
            )

    def _list(self, bad: Mapping[int, str]) -> None:
        """Merge images with the list that all ranks share. Images are identified by their numbers."""
        lines = [f"{index}{TAB}{reason}" for index, reason in bad.items()]
        if self.path is None:
            self._lines += lines
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self._lines = file.read().splitlines()
            listed = {line.partition(TAB)[0] for line in self._lines}
            new = [line for line in lines if line.partition(TAB)[0] not in listed]
            file.write("".join(f"{line}\n" for line in new))
            self._lines += new


class StreamLoader:
    """What the loaders of both pipelines share: the position, its state, and the damaged files.

    Args:
        dataset: training set.
        batch_size: images per batch of this rank, ≥ 1.
        rank: number of this process, 0 ≤ rank < world_size.
        world_size: number of processes.
        seed: of order and augmentation, ≥ 0; the same on all ranks.
        bad_files: the damaged files of the run.
    """

    def __init__(
        self, dataset: TrainSource, *, batch_size: int, rank: int, world_size: int, seed: int, bad_files: BadFiles
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: expected batch_size ≥ 1, 0 ≤ rank < world_size"
            )
        self._dataset, self._seed, self._bad_files = dataset, seed, bad_files
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._position = 0
        self._batches: Iterator[Batch | UserError] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            positions = Positions(self._position + self._rank, self._batch_size, self._world_size)
            self._batches = self._open(positions)
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        self._bad_files.add(batch.bad)
        self._position += self._batch_size * self._world_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch returned, in samples over all ranks."""
        return {"position": self._position, "seed": self._seed, "images": len(self._dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the sample after those returned when the state was taken.

        Raises:
            UserError: the state belongs to another training list or another seed.
        """
        present = self.state_dict()
        for key, remedy in (
            ("seed", "resume with the same run.seed"),
            ("images", "resume with the same training list"),
        ):
            if state[key] != present[key]:
                raise UserError(f"position of the data: {key} was {state[key]}, is {present[key]}; {remedy}")
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Stop the workers. The next batch would restart them."""
        self._batches = None

    def _open(self, positions: Positions) -> Iterator[Batch | UserError]:
        raise NotImplementedError


class Positions:
    """Endless positions of a rank's samples in the stream, batch by batch."""

    def __init__(self, start: int, batch_size: int, step: int) -> None:
        self.start, self.batch_size, self.step = start, batch_size, step

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch_size * self.step
        for start in itertools.count(self.start, stride):
            yield list(range(start, start + stride, self.step))

    def skip(self, batches: int) -> Positions:
        """Return the positions that follow a number of batches."""
        return Positions(self.start + batches * self.batch_size * self.step, self.batch_size, self.step)


def read_ahead(dataset: Dataset[Any], workers: int, **options: Any) -> Iterator[Any]:
    """Make items ahead of their use in worker processes; with 0 workers this process makes them.

    Args:
        dataset: makes the items.
        workers: number of processes.
        options: of torch's DataLoader.
    """
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else a seed is drawn from the global generator
        **options,
    )
    # A fork inherits uncollected garbage. Collected in the fork, a DALI pipeline would wait for threads that do not
    # exist there; frozen objects are never collected.
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _as_it_is(item: Any) -> Any:
    return item
