"""Write a list of a data set as WebDataset shards: few large files, which object stores and DALI read in order.

    train-000000.tar, train-000001.tar, …   samples: KEY.jpg, .png, .tif, .npy or .dcm (the file as it was), KEY.json,
                                            KEY.mask.png
    train-000000.idx, …                     offsets of the parts of each sample, for DALI
    train.json                              {"version", "classes", "max_labels", "shards": [{"file", "samples", "bytes",
                                            "sha256"}]}; written last, so that an interrupted pack has none

KEY counts the samples; KEY.json holds {"labels": [numbers of the classes, from 0], "name": the name in the data set}.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image
from webdataset import TarWriter

from fsr_fast.dataloading import tiff
from fsr_fast.dataloading.arrays import NUMPY, is_dicom, open_array, start_of
from fsr_fast.dataloading.datasets import check_size
from fsr_fast.dataloading.images import MAX_PIXELS, image_header, read_image
from fsr_fast.dataloading.layout import Split, check_names, no_mask
from fsr_fast.dataloading.negatives import no_label
from fsr_fast.dataloading.stores import open_store
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.errors import UserError

VERSION = 1
BLOCK = 512  # bytes, of a tar file
ENDINGS = {"JPEG": "jpg", "PNG": "png"}


class Sample(NamedTuple):
    """The parts of one image in a shard."""

    parts: dict[str, bytes]
    """Content by extension, in the order of the extensions."""
    labels: int
    """Number of labels."""


Track = Callable[[Iterable[Sample], str, int], Iterable[Sample]]


def pack(
    split: Split,
    output: str,
    name: str,
    *,
    with_masks: bool,
    shard_bytes: int,
    negatives: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    seed: int | None = None,
    track: Track,
) -> dict[str, Any]:
    """Write the shards of a list, and their index.

    Args:
        split: the list.
        output: folder, or URL, as for `open_store`.
        name: of the list; the prefix of all file names.
        with_masks: also pack the masks; then every image needs one.
        shard_bytes: size at which a shard is closed, ≥ 1.
        negatives: images that show no class are packed (True), left out (False) or refused (None), if without masks.
        max_pixels: largest image that is packed.
        seed: of the order in which the images are written; None: as in the list.
        track: shows progress; takes the samples, a description and their number.

    Returns:
        The index.

    Raises:
        UserError: the list is already packed there, or an image, label or mask is damaged.
    """
    check_names(split.ids, split.origin, "data")
    filesystem, folder = open_store(output)
    filesystem.makedirs(folder, exist_ok=True)
    here = {str(path).rpartition("/")[2] for path in filesystem.ls(folder, detail=False)}
    old = sorted(file for file in here if re.match(rf"{re.escape(name)}(-\d{{6}})?\.(tar|idx|json)", file))
    if old:
        raise UserError(f"{output}: holds {old[0]}, from another or an interrupted pack; delete {name}* there")
    order = np.arange(len(split.ids)) if seed is None else np.random.default_rng(seed).permutation(len(split.ids))
    read = partial(read_sample, split, with_masks=with_masks, negatives=negatives, max_pixels=max_pixels)
    samples = map_ahead(lambda number: read(split.ids[int(number)]), order)
    most = 0
    with _Shards(filesystem, folder, name, shard_bytes) as shards:
        for sample in track((sample for sample in samples if sample), f"packing {name}", len(order)):
            shards.write(sample)
            most = max(most, sample.labels)
        shards.close_shard()
        index = {"version": VERSION, "classes": list(split.classes), "max_labels": most, "shards": shards.done}
        shards.put(f"{name}.json", json.dumps(index, ensure_ascii=False, indent=1).encode())
    return index


def read_sample(
    split: Split, name: str, *, with_masks: bool, negatives: bool | None = None, max_pixels: int = MAX_PIXELS
) -> Sample | None:
    """Read image, labels and mask of a name, and check them as a training would.

    Returns:
        The sample; None if the image shows no class and is left out.

    Raises:
        UserError: one of them is missing or damaged.
    """
    path = split.files.image_path(name)
    content = path.read_bytes()
    size, ending = _look(content, str(path), max_pixels)
    if not ending:  # another format of 8 bits
        content, ending = _png(read_image(content, str(path), max_pixels)), "png"
    labels = split.labels(name)
    if not labels and not with_masks and not negatives:
        if negatives is False:
            return None
        raise no_label(split, name, "")
    parts = {ending: content}
    parts["json"] = json.dumps({"labels": sorted(set(labels)), "name": name}, ensure_ascii=False).encode()
    if with_masks:
        mask = split.files.mask(name)
        if mask is None:
            raise no_mask(split.files, name)
        check_size(mask, size, split.files.mask_place(name))
        parts["mask.png"] = _png(Image.fromarray(mask))
    return Sample(dict(sorted(parts.items())), len(set(labels)))


def _look(content: bytes, where: str, max_pixels: int) -> tuple[tuple[int, int], str]:
    """Decode a picture; return width and height, and its extension if it can go into a shard as it is, else nothing."""
    pixels = open_array(content, where, max_pixels=max_pixels)
    pixels[:, :]
    height, width, channels = pixels.shape
    start = start_of(content)
    if start.startswith(NUMPY):
        ending = "npy"
    elif is_dicom(start):
        ending = "dcm"
    elif start.startswith(tiff.MAGIC):
        ending = "tif" if pixels.dtype != np.uint8 or channels not in (1, 3) else ""
    else:
        ending = ENDINGS.get(image_header(content, where, max_pixels).format, "")
    return (width, height), ending


class _Shards:
    """Writes samples to one shard after another. Files get their names only once complete."""

    def __init__(self, filesystem: Any, folder: str, name: str, limit: int) -> None:
        self.done: list[dict[str, Any]] = []
        self._filesystem, self._folder, self._name, self._limit = filesystem, folder, name, limit
        self._samples = 0
        self._touched: list[str] = []
        self._shard: _Shard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        if self._shard:
            with suppress(OSError):  # perhaps the disk is full; the file is removed anyway
                self._shard.writer.close()
                self._shard.target.close()
        for path in filter(self._filesystem.exists, self._touched):
            self._filesystem.rm(path)

    def write(self, sample: Sample) -> None:
        if self._shard is None:
            self._shard = _Shard(self._open(f"{self._name}-{len(self.done):06d}.tar"))
        self._shard.write(f"{self._samples:09d}", sample.parts)
        self._samples += 1
        if self._shard.writer.tarstream.offset >= self._limit:
            self.close_shard()

    def close_shard(self) -> None:
        if self._shard is None:
            return
        shard, stem = self._shard, f"{self._name}-{len(self.done):06d}"
        self._shard = None
        shard.writer.close()
        shard.target.close()
        self._finish(f"{stem}.tar")
        index = f"v1.2 {len(shard.lines)}\n" + "".join(f"{line}\n" for line in shard.lines)
        self.put(f"{stem}.idx", index.encode())
        size, digest = shard.target.size, shard.target.hash.hexdigest()
        self.done.append({"file": f"{stem}.tar", "samples": len(shard.lines), "bytes": size, "sha256": digest})

    def put(self, file: str, content: bytes) -> None:
        target = self._open(file)
        target.write(content)
        target.close()
        self._finish(file)

    def _open(self, file: str) -> _Counted:
        path = f"{self._folder}/{file}"
        self._touched += [path, f"{path}.partial"]
        return _Counted(self._filesystem.open(f"{path}.partial", "wb"))

    def _finish(self, file: str) -> None:
        path = f"{self._folder}/{file}"
        self._filesystem.mv(f"{path}.partial", path)


class _Shard:
    """A tar file during writing, and the offsets of its parts (the index format of DALI's wds2idx, 1.2)."""

    def __init__(self, target: _Counted) -> None:
        self.target, self.lines = target, list[str]()
        self.writer = TarWriter(target, encoder=False, mtime=0, compress=False)

    def write(self, key: str, parts: dict[str, bytes]) -> None:
        offset, places = self.writer.tarstream.offset, []
        for ending, content in parts.items():
            places.append(f"{ending} {offset + BLOCK} {len(content)} {key}.{ending}")
            offset += BLOCK * (1 + math.ceil(len(content) / BLOCK))
        self.writer.write({"__key__": key, **parts})
        self.lines.append(" ".join(places))


class _Counted:
    """A file that is written once; counts and digests its bytes."""

    def __init__(self, file: Any) -> None:
        self.size, self.hash = 0, hashlib.sha256()
        self._file = file

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.hash.update(content)
        return self._file.write(content)

    def close(self) -> None:
        self._file.close()


def _png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()
