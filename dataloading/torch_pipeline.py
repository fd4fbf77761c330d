"""The pipeline on torchvision: two augmented views per image for training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.arrays import Pixels
from fsr_fast.dataloading.augment import (
    View,
    apply_view,
    apply_view_to_channels,
    build_erasing,
    build_policy,
    draw_view_at,
)
from fsr_fast.dataloading.batch import Batch, TrainSource
from fsr_fast.dataloading.datasets import SegmentationDataset
from fsr_fast.dataloading.pixels import normalise
from fsr_fast.dataloading.regions import read_crop
from fsr_fast.dataloading.stream import Positions, Stream, StreamLoader, read_ahead
from fsr_fast.errors import UserError

VIEWS = 2
AHEAD = 2  # batches that torch lets each worker hold
SHARED_MEMORY = Path("/dev/shm")
CACHE_BYTES = 256 * 2**20  # decoded images that the workers of a rank keep


class TorchLoader(StreamLoader):
    """Training batches made by Pillow and torchvision, in worker processes.

    Args:
        dataset: training set.
        data: size of the views and number of workers.
        augment: how views are drawn.
        mean: of the normalisation, one value in 0 to 1 per channel.
        std: of the normalisation, one value > 0 per channel.
        options: see `StreamLoader`.
    """

    def __init__(
        self,
        dataset: TrainSource,
        data: DataConfig,
        augment: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._workers = data.workers
        if data.workers:
            channels = dataset.reading.channels
            _check_shared_memory(data, VIEWS * self._batch_size * channels * data.image_size**2 * 4)
        self._views = _Views(Stream(dataset, self._seed), data, augment, mean, std)

    def _open(self, positions: Positions) -> Iterator[Batch | UserError]:
        pin = torch.cuda.is_available()
        return read_ahead(self._views, self._workers, batch_sampler=positions, pin_memory=pin)


def _check_shared_memory(data: DataConfig, batch_bytes: int) -> None:
    """Refuse to start if the workers' batches do not fit: without room for one, they would wait for ever."""
    if not SHARED_MEMORY.is_dir():
        return
    needed, free = data.workers * AHEAD * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"data.workers: {data.workers} hold {needed / 2**20:.0f} MiB of batches in {SHARED_MEMORY}, where "
            f"{free / 2**20:.0f} MiB are free; start the container with more (docker run --shm-size 2g or --ipc host), "
            "or give a lower --data.workers (0: no processes)"
        )


class _Views(Dataset[Any]):
    """Batches by the positions of their samples."""

    def __init__(
        self, stream: Stream, data: DataConfig, augment: AugmentConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.stream, self.augment, self.size = stream, augment, data.image_size
        self.reading = stream.dataset.reading
        self.policy, self.erase = build_policy(augment, data.image_size, mean), build_erasing(augment)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.cache: dict[int, _Decoded] = {}
        self.cache_bytes = self.cache_room = CACHE_BYTES // max(data.workers, 1)

    def __len__(self) -> int:
        return len(self.stream.dataset)

    def __getitems__(self, positions: list[int]) -> Batch | UserError:
        try:
            return self._batch(positions)
        except UserError as error:  # as a value: raised in a worker, it would come with the worker's traceback
            return error

    def _batch(self, positions: list[int]) -> Batch:
        pixels = np.empty((VIEWS, len(positions), self.size, self.size, self.reading.channels), np.uint8)
        seeds = np.empty((VIEWS, len(positions)), np.int64)
        indices, labels = [], []
        for item, position in enumerate(positions):
            index, (image, height, width, shown) = self.stream.load(position, self._decoded)
            indices.append(index)
            labels.append(shown)
            for number in range(VIEWS):
                view = draw_view_at(self.stream.seed, position, number, self.augment, height, width)
                pixels[number, item] = self._make(image, view)
                seeds[number, item] = view.seed
        planes = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).contiguous()  # (V, B, C, H, W)
        views = tuple(normalise(view, self.mean, self.std) for view in planes)
        if self.erase is not None:
            for number, item in np.ndindex(*seeds.shape):
                self.erase(views[number][item], int(seeds[number, item]) + 1)
        return Batch(views, torch.from_numpy(np.stack(labels)), torch.tensor(indices), dict(self.stream.bad))

    def _make(self, image: Picture | Pixels, view: View) -> NDArray[np.uint8]:
        if not isinstance(image, Image.Image | np.ndarray):
            rows, columns = slice(view.top, view.top + view.height), slice(view.left, view.left + view.width)
            part = read_crop(image, rows, columns, self.size)
            view = view._replace(top=0, left=0, height=part.shape[0], width=part.shape[1])
            image = Image.fromarray(part) if part.shape[2] == 3 else part
        if isinstance(image, Image.Image):
            return np.asarray(apply_view(image, view, self.size, self.policy))
        return apply_view_to_channels(image, view, self.size)

    def _decoded(self, index: int) -> _Decoded:
        decoded = self.cache.get(index)
        if decoded is None:
            files = self.stream.dataset
            if isinstance(files, SegmentationDataset) and (large := files.open_large(index)) is not None:
                return _Decoded(large, large.shape[0], large.shape[1], files.labels[index])
            data, labels, name = files.encoded(index)
            image, channels = self.reading.picture(data, name), self.reading.channels
            height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
            decoded = _Decoded(image, height, width, labels)
            size = max(4, channels) * width * height  # bytes: Pillow pads RGB to four per pixel
            # Part of a data set would rarely be hit, so images are kept only if the whole set fits.
            if size * len(self) <= self.cache_bytes and size <= self.cache_room:
                self.cache_room -= size
                self.cache[index] = decoded
        return decoded


Picture = Image.Image | NDArray[np.uint8]
"""In colours, or channels (H, W, C)."""


class _Decoded(NamedTuple):
    image: Picture | Pixels
    height: int
    width: int
    labels: NDArray[np.float32]
