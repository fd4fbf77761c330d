"""The pipeline on torchvision: two augmented views an image for training, whole images for evaluation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.augment import apply_view, build_erasing, build_policy, draw_view
from fsr_fast.dataloading.batch import Batch, EvaluationSample, TrainLoader
from fsr_fast.dataloading.datasets import SegmentationDataset
from fsr_fast.errors import UserError

VIEWS = 2
CACHE_BYTES = 256 * 2**20  # decoded images that the workers of a rank keep


def build_train_loader(
    dataset: SegmentationDataset,
    data: DataConfig,
    augment: AugmentConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> TrainLoader:
    """Build the endless loader of training batches.

    Args:
        dataset: training set.
        data: size of the views and number of workers.
        augment: how views are drawn.
        batch_size: images a batch of this rank, ≥ 1.
        rank: number of this process, 0 ≤ rank < world_size.
        world_size: number of processes.
        seed: of order and augmentation, ≥ 0; the same on all ranks.
        mean: of the normalisation, three values in the range 0 to 1.
        std: of the normalisation, three values > 0.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size {batch_size}, rank {rank} of {world_size}: expected batch_size ≥ 1, 0 ≤ rank < world_size"
        )
    views = _Views(dataset, data, augment, seed, mean, std)
    return _TorchTrainLoader(views, workers=data.workers, batch_size=batch_size, rank=rank, world_size=world_size)


def evaluation_samples(
    dataset: SegmentationDataset,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: int | None = None,
) -> Iterator[EvaluationSample]:
    """Give the images rank, rank + world_size, … of a data set, each once, in order.

    Args:
        dataset: validation set.
        mean: of the normalisation, three values in the range 0 to 1.
        std: of the normalisation, three values > 0.
        rank: number of this process.
        world_size: number of processes.
        workers: processes that read ahead; 0: this one reads.
        limit: only the first images of the data set.

    Raises:
        UserError: an image or a mask cannot be read.
    """
    stop = len(dataset) if limit is None else min(limit, len(dataset))
    numbers = range(rank, stop, world_size)
    for item in _loader(_Images(dataset, mean, std), workers, sampler=numbers, batch_size=None):
        if isinstance(item, UserError):
            raise item
        yield item


class _TorchTrainLoader:
    def __init__(self, views: _Views, *, workers: int, batch_size: int, rank: int, world_size: int) -> None:
        self._views = views
        self._workers = workers
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._position = 0
        self._batches: Iterator[Batch | UserError] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            pin = torch.cuda.is_available()
            sampler = _Positions(self._position + self._rank, self._batch_size, self._world_size)
            self._batches = iter(_loader(self._views, self._workers, batch_sampler=sampler, pin_memory=pin))
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        self._position += self._batch_size * self._world_size
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position, "seed": self._views.seed, "images": len(self._views)}

    def load_state_dict(self, state: dict[str, int]) -> None:
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
        self._batches = None


class _Positions:
    """Positions of a rank's samples in the stream, batch by batch, without an end."""

    def __init__(self, start: int, batch_size: int, step: int) -> None:
        self.start, self.batch_size, self.step = start, batch_size, step

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch_size * self.step
        for start in itertools.count(self.start, stride):
            yield list(range(start, start + stride, self.step))


class _Views(Dataset[Any]):
    """Batches by the positions of their samples."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.dataset, self.augment, self.seed, self.size = dataset, augment, seed, data.image_size
        self.policy, self.erase = build_policy(augment, data.image_size, mean), build_erasing(augment)
        self.normalise = _Normalise(mean, std)
        self.epoch, self.order = -1, np.empty(0, np.int64)
        self.cache: dict[int, Image.Image] = {}
        self.cache_bytes = self.cache_room = CACHE_BYTES // max(data.workers, 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: list[int]) -> Batch | UserError:
        try:
            return self._batch(positions)
        except UserError as error:  # as a value: raised in a worker, it would come with the worker's traceback
            return error

    def _batch(self, positions: list[int]) -> Batch:
        indices = [self._index(position) for position in positions]
        pixels = np.empty((VIEWS, len(positions), self.size, self.size, 3), np.uint8)
        seeds = np.empty((VIEWS, len(positions)), np.int64)
        for item, (position, index) in enumerate(zip(positions, indices, strict=True)):
            image = self._image(index)
            for number in range(VIEWS):
                draws = random.Random((self.seed << 72) + (position << 8) + number)
                view = draw_view(draws, self.augment, image.height, image.width)
                pixels[number, item] = np.asarray(apply_view(image, view, self.size, self.policy))
                seeds[number, item] = view.seed
        views = tuple(self.normalise(part) for part in pixels)
        if self.erase is not None:
            for number, item in np.ndindex(*seeds.shape):
                self.erase(views[number][item], int(seeds[number, item]) + 1)
        return Batch(views, torch.from_numpy(self.dataset.labels[indices]), torch.tensor(indices))

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return int(self.order[offset])

    def _image(self, index: int) -> Image.Image:
        image = self.cache.get(index)
        if image is None:
            image = self.dataset.image(index)
            size = 4 * image.width * image.height  # bytes: Pillow pads RGB to four a pixel
            # A part of a data set would seldom be hit, so images are kept only where the whole set fits.
            if size * len(self) <= self.cache_bytes and size <= self.cache_room:
                self.cache_room -= size
                self.cache[index] = image
        return image


class _Images(Dataset[Any]):
    """Whole images by number."""

    def __init__(self, dataset: SegmentationDataset, mean: Sequence[float], std: Sequence[float]) -> None:
        self.dataset, self.normalise = dataset, _Normalise(mean, std)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvaluationSample | UserError:
        try:
            image, mask = self.dataset.image(index), self.dataset.mask(index)
        except UserError as error:
            return error
        return EvaluationSample(
            index,
            self.normalise(np.array(image)[None])[0],
            torch.from_numpy(self.dataset.labels[index]),
            None if mask is None else torch.from_numpy(mask),
            self.dataset.ids[index],
        )


class _Normalise:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32, (value / 255 − mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.factor = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.shift = -torch.tensor(mean).view(3, 1, 1) / torch.tensor(std).view(3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self.factor).add_(self.shift)


def _loader(dataset: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else a seed is drawn from the global generator
        **options,
    )


def _as_it_is(item: Any) -> Any:
    return item
