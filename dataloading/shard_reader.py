"""Training and evaluation from the shards of `pack.py`: tar files in a folder, or in a store behind a URL.

The index files hold the offset of each part of each sample, so a sample is one read of a range of bytes, and the
stream is as exact as with single files: every sample once per epoch over all ranks, order and augmentation functions
of seed and position, resume at the very next sample with any number of workers. A reader that streams whole shards
through a shuffle buffer, as WebDataset's own, could only do this by saving the buffer.

The order of an epoch: the shards are shuffled and taken in windows of `WINDOW` shards, and the samples of a window are
shuffled together. So memory holds the offsets of a few shards, whatever the number of images, and reads stay within a
few files at a time: a cache such as `simplecache::s3://…` fetches each shard once per epoch. Neighbours in the list
share few windows; pack a sorted list with `--shuffle`.

Both pipelines read through this module; WebDataset's tools and DALI's reader can read the same files.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.batch import EncodedImage
from fsr_fast.dataloading.fingerprint import Part
from fsr_fast.dataloading.images import DamagedFileError
from fsr_fast.dataloading.mask_files import read_mask
from fsr_fast.dataloading.reading import Reading
from fsr_fast.dataloading.stores import open_store
from fsr_fast.errors import UserError, nearest

VERSION = 1  # of the format
WINDOW = 8  # shards that are shuffled together
PLACES = 2 * WINDOW  # shards whose offsets a process caches
IMAGE_ENDINGS = ("jpg", "png", "tif", "npy", "dcm")

Item = TypeVar("Item")
Place = tuple[int, int]
"""First byte and number of bytes."""


class _Shard(BaseModel):
    file: str = Field(pattern=r"^[^/\\\x00]+\.tar$")  # only beside the index
    samples: int = Field(ge=0, lt=2**31)
    bytes: int = Field(ge=0, lt=2**48)


class _Index(BaseModel):
    version: int
    classes: tuple[str, ...]
    max_labels: int
    shards: tuple[_Shard, ...]


class _About(BaseModel):
    labels: tuple[Annotated[int, Field(ge=0)], ...]
    name: str | None = None


class Column(Generic[Item]):
    """One property of all samples, read on demand."""

    def __init__(self, count: int, read: Callable[[int], Item]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return self._read(index)


class ShardDataset:
    """The samples of one list of shards; used like `SegmentationDataset`.

    Args:
        root: folder, or URL, as for `open_store`.
        name: of the list.
        empty: leave out the samples.
        reading: how images are read.

    Raises:
        UserError: the index is missing, damaged or of another version.
    """

    def __init__(self, root: str, name: str, *, empty: bool = False, reading: Reading | None = None) -> None:
        self._root, self._name, self.reading = root.rstrip("/"), name, reading or Reading()
        self._process = -1
        self._filesystem: Any = None
        self._folder = ""
        self._places: OrderedDict[int, list[dict[str, Place]]] = OrderedDict()
        index = self._read_index()
        self._files = [shard.file for shard in index.shards]
        self._sizes = [shard.bytes for shard in index.shards]
        self._starts = np.cumsum([0, *(shard.samples for shard in index.shards if not empty)])
        self.classes = index.classes
        self.max_labels = index.max_labels
        self.ids = Column(len(self), self._id)
        self.labels = Column(len(self), self._labels)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def encoded(self, index: int) -> EncodedImage:
        """Read an image as stored, and its labels.

        Raises:
            DamagedFileError: the sample cannot be read.
        """
        shard, parts = self._parts(index)
        place = self._place(index, shard)
        both = self._image_part(parts, place), self._json_part(parts, place)
        first = min(start for start, _ in both)
        run = self._read(shard, first, max(start + size for start, size in both))
        data, text = (run[start - first : start - first + size] for start, size in both)
        return EncodedImage(data, self._vector(_parse(text, place), place), place)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as the network takes it, (H, W, channels), upright.

        Raises:
            DamagedFileError: it cannot be read or decoded.
        """
        return self.reading.pixels(*self.source(index))

    def image(self, index: int) -> Image.Image:
        """Read an image for display, in colours, upright; raises like `pixels`."""
        return self.reading.image(*self.source(index))

    def source(self, index: int) -> tuple[bytes, str]:
        """Return the file of an image as it is, and its place.

        Raises:
            DamagedFileError: it cannot be read.
        """
        shard, parts = self._parts(index)
        place = self._place(index, shard)
        start, size = self._image_part(parts, place)
        return self._read(shard, start, start + size), place

    def read_as(self, reading: Reading) -> ShardDataset:
        """Return the same list with a different reading."""
        other = copy.copy(self)
        other.reading = reading
        other.ids, other.labels = Column(len(self), other._id), Column(len(self), other._labels)
        return other

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """Read a mask, (H, W) uint8: 0 background, 1…C classes, 255 ignored; None if none was packed.

        Raises:
            DamagedFileError: it cannot be read.
        """
        shard, parts = self._parts(index)
        if "mask.png" not in parts:
            return None
        start, size = parts["mask.png"]
        content, place = self._read(shard, start, start + size), self._place(index, shard)
        return read_mask(content, len(self.classes), place, max_pixels=self.reading.max_pixels)

    def order(self, seed: int, epoch: int) -> ShardOrder:
        """Return the order of an epoch: shards shuffled, then the samples of each window of shards."""
        return ShardOrder(self._starts, seed, epoch)

    def parts(self, *, contents: bool) -> Iterator[Part]:
        """Return the identity of the shards, in order, for a fingerprint: names, numbers of samples and sizes."""
        for file, count, size in zip(self._files, np.diff(self._starts), self._sizes, strict=True):
            yield Part(file, str(count).encode(), size, b"")

    def _id(self, index: int) -> str:
        """Name a sample; by its place if its name cannot be read, since damaged samples are reported, too."""
        try:
            name = self._about(index)[0].name
        except DamagedFileError:
            name = None
        return self._within(index, self._parts(index)[0]) if name is None else name

    def _labels(self, index: int) -> NDArray[np.float32]:
        return self._vector(*self._about(index))

    def _about(self, index: int) -> tuple[_About, str]:
        """Read the description of an image; return it with its place."""
        shard, parts = self._parts(index)
        place = self._place(index, shard)
        start, size = self._json_part(parts, place)
        return _parse(self._read(shard, start, start + size), place), place

    def _vector(self, about: _About, place: str) -> NDArray[np.float32]:
        labels = np.zeros(len(self.classes), np.float32)
        if any(label >= len(labels) for label in about.labels):
            raise DamagedFileError(f"{place}: labels that are not numbers of its {len(labels)} classes; pack it again")
        labels[list(about.labels)] = 1
        return labels

    @staticmethod
    def _image_part(parts: dict[str, Place], place: str) -> Place:
        image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
        if image is None:
            raise DamagedFileError(f"{place}: no image in this sample; pack it again")
        return image

    @staticmethod
    def _json_part(parts: dict[str, Place], place: str) -> Place:
        if "json" not in parts:
            raise DamagedFileError(f"{place}: no JSON in this sample; pack it again")
        return parts["json"]

    def _parts(self, index: int) -> tuple[int, dict[str, Place]]:
        """Return the shard of a sample, and offset and size of its parts by extension."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        if shard not in self._places:
            self._places[shard] = self._read_places(shard)
            if len(self._places) > PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(shard)
        return shard, self._places[shard][index - int(self._starts[shard])]

    def _read_places(self, shard: int) -> list[dict[str, Place]]:
        file = self._files[shard].removesuffix(".tar") + ".idx"
        try:
            lines = self._open_root().cat_file(f"{self._folder}/{file}").decode().splitlines()
            places = []
            for line in lines[1:]:
                words = line.split()
                rows = [words[start : start + 4] for start in range(0, len(words), 4)]
                places.append({ending: (int(offset), int(size)) for ending, offset, size, _ in rows})
            expected = int(self._starts[shard + 1] - self._starts[shard])
            if lines[0].split() != ["v1.2", str(expected)] or len(places) != expected:
                raise ValueError(f"not {expected} samples in the format v1.2")
            for start, size in itertools.chain.from_iterable(sample.values() for sample in places):
                if min(start, size) < 0 or start + size > self._sizes[shard]:
                    raise ValueError(f"{size} bytes from {start} on, in a shard of {self._sizes[shard]} bytes")
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{self._root}/{file}: cannot be read: {error}; pack the list again") from None
        return places

    def _read(self, shard: int, start: int, end: int) -> bytes:
        file = self._files[shard]
        try:
            data: bytes = self._open_root().cat_file(f"{self._folder}/{file}", start=start, end=end)
        except (OSError, MemoryError) as error:
            raise DamagedFileError(f"{self._root}/{file}: bytes {start} to {end} cannot be read: {error}") from None
        if len(data) != end - start:
            raise DamagedFileError(f"{self._root}/{file}: ends before byte {end}; copy or pack it again")
        return data

    def _read_index(self) -> _Index:
        path = f"{self._root}/{self._name}.json"
        try:
            filesystem = self._open_root()
            try:
                index = _Index.model_validate_json(filesystem.cat_file(f"{self._folder}/{self._name}.json"))
            except FileNotFoundError:
                found = [str(file).rpartition("/")[2] for file in filesystem.glob(f"{self._folder}/*.json")]
                hint = nearest(self._name, [file.removesuffix(".json") for file in found]) if found else ""
                raise UserError(
                    f"{path}: no such file{hint}; expected the index that `fsr-fast data pack` writes"
                ) from (None)
            if index.version != VERSION or not index.shards:
                raise ValueError(f"version {index.version} with {len(index.shards)} shards, expected {VERSION}")
        except (OSError, ValueError, ImportError) as error:
            reason = _explain(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: not a readable index of shards ({reason}); pack the list again, or install what fsspec needs "
                "for this URL"
            ) from None
        return index

    def _open_root(self) -> Any:
        """Open the file system, one per process: connections do not survive a fork."""
        if self._process != os.getpid():
            self._filesystem, self._folder = open_store(self._root)
            self._process = os.getpid()
        return self._filesystem

    def _place(self, index: int, shard: int) -> str:
        return f"{self._root}/{self._within(index, shard)}"

    def _within(self, index: int, shard: int) -> str:
        return f"{self._files[shard]}, sample {index - int(self._starts[shard])}"


class ShardOrder:
    """The order of one epoch; an offset is looked up only in its window.

    Args:
        starts: (S + 1,) numbers of the first samples of the shards, and of all samples.
        seed: ≥ 0.
        epoch: ≥ 0.
    """

    def __init__(self, starts: NDArray[np.int64], seed: int, epoch: int) -> None:
        self._starts, self._seed, self._epoch = starts, seed, epoch
        self._shards = np.random.default_rng((seed, epoch)).permutation(len(starts) - 1)
        sizes = np.diff(starts)[self._shards]
        self._windows = np.cumsum([0, *(sizes[first : first + WINDOW].sum() for first in range(0, len(sizes), WINDOW))])
        self._window = _Window(-1, np.empty(0, np.int64))

    def __getitem__(self, offset: int) -> int:
        number = int(np.searchsorted(self._windows, offset, side="right")) - 1
        if number != self._window.number:
            shards = self._shards[number * WINDOW : (number + 1) * WINDOW]
            samples = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
            shuffled = np.random.default_rng((self._seed, self._epoch, number)).permutation(samples)
            self._window = _Window(number, shuffled)
        return int(self._window.samples[offset - int(self._windows[number])])


class _Window(NamedTuple):
    number: int
    samples: NDArray[np.int64]


def _parse(text: bytes, place: str) -> _About:
    try:
        return _About.model_validate_json(text)
    except ValidationError as error:
        raise DamagedFileError(f"{place}: its JSON cannot be read: {_explain(error)}; pack it again") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def open_shards(config: DataConfig, reading: Reading | None = None, *, training: bool) -> ShardDataset:
    """Open the shards of the training or the validation list.

    Args:
        config: the section `data` of the configuration.
        reading: how images are read.
        training: the training list, else the validation list.

    Raises:
        UserError: there are none, or the configuration requests something that shards do not support.
    """
    if config.subset is not None or config.labels != "auto":
        key = "labels" if config.subset is None else "subset"
        raise UserError(f"data.{key}: shards contain their labels; choose when packing, and leave it out")
    name = config.train_list if training else config.val_list
    reading = reading or Reading(max_pixels=config.max_pixels)
    dataset = ShardDataset(str(config.root), name or config.train_list, empty=name is None, reading=reading)
    if config.classes is not None and config.classes != dataset.classes:
        raise UserError(f"data.classes: differ from those of the shards ({', '.join(dataset.classes)}); leave them out")
    return dataset
