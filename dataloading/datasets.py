"""The training and the validation set, whatever layout the data set has on disk.

`voc.py`, `coco.py` and `own.py` open the layouts; here the labels are read, the classes chosen and the files found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.config_sections import BUILT_IN_DATASETS
from fsr_fast.dataloading import synthetic
from fsr_fast.dataloading.arrays import Pixels
from fsr_fast.dataloading.batch import EncodedImage, ImageSet, Order
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES, check_class_names
from fsr_fast.dataloading.coco import has_instances, open_coco
from fsr_fast.dataloading.fingerprint import Part
from fsr_fast.dataloading.images import IGNORE, DamagedFileError
from fsr_fast.dataloading.labels import MaskLabels, open_labels, read_labels
from fsr_fast.dataloading.layout import Files, FolderFiles, Split, check_names, check_one_file_each, no_mask
from fsr_fast.dataloading.mask_files import drawn_in_black_and_white
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.negatives import balance_warnings, keeps_negatives, no_label
from fsr_fast.dataloading.own import open_own, refuse_background
from fsr_fast.dataloading.reading import COLOURS, Reading, given_window, picture_size
from fsr_fast.dataloading.shard_reader import open_shards
from fsr_fast.dataloading.voc import LISTS, open_voc
from fsr_fast.errors import UserError, nearest
from fsr_fast.plugins import DATASETS

SAMPLED = 4  # validation masks from which the meaning of values is inferred
SYNTHETIC_ROOT = Path("data/synthetic")
CLASSES = {"synthetic": synthetic.CLASSES, "voc": VOC_CLASSES, "coco": COCO_CLASSES}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """The images of one list.

    Args:
        files: finds image and mask of a name.
        ids: names of the n images.
        classes: names of the C foreground classes.
        labels: (n, C) float32, 1 where the image shows the class, else 0.
        mask_values: (K + 1,) uint8, new values of the class values 0…K of the mask files: 0, 1…C or 255.
        dropped: number of images of the list that were left out because they show none of the classes.
        reading: how images are read.
    """

    files: Files
    ids: Names
    classes: tuple[str, ...]
    labels: NDArray[np.float32]
    mask_values: NDArray[np.uint8]
    dropped: int = 0
    reading: Reading = COLOURS

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def max_labels(self) -> int:
        """Largest number of labels of an image."""
        return int(self.labels.sum(1).max())

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as the network takes it, (H, W, channels), upright.

        Raises:
            DamagedFileError: the file is missing or cannot be decoded.
        """
        return self.reading.pixels(self.image_path(index))

    def image(self, index: int) -> Image.Image:
        """Read an image for display, in colours, upright; raises like `pixels`."""
        return self.reading.image(self.image_path(index))

    def source(self, index: int) -> tuple[Path, str]:
        """Return the file of an image, and its name in messages.

        Raises:
            DamagedFileError: it is missing.
        """
        path = self.image_path(index)
        return path, str(path)

    def read_as(self, reading: Reading) -> SegmentationDataset:
        """Return the same list with a different reading."""
        return replace(self, reading=reading)

    def encoded(self, index: int) -> EncodedImage:
        """Read an image's file as it is.

        Raises:
            DamagedFileError: the file is missing or cannot be read.
        """
        path = self.image_path(index)
        try:
            return EncodedImage(path.read_bytes(), self.labels[index], str(path))
        except OSError as error:
            raise DamagedFileError(f"{path}: cannot be read: {error}") from None

    def open_large(self, index: int) -> Pixels | None:
        """Open an image to be read by region; None: it is small, or its format does not allow it."""
        return self.reading.open_large(self.image_path(index))

    def order(self, seed: int, epoch: int) -> Order:
        """Return the order of an epoch of training: one permutation of all images."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def parts(self, *, contents: bool) -> Iterator[Part]:
        """Return the identity of each image, in order, for a fingerprint."""
        for index, name in enumerate(self.ids):
            path = self.image_path(index)
            try:
                content = path.read_bytes() if contents else b""
                yield Part(name, self.labels[index].tobytes(), path.stat().st_size, content)
            except OSError as error:
                raise DamagedFileError(f"{path}: cannot be read: {error}") from None

    def image_path(self, index: int) -> Path:
        """Return the file of an image.

        Raises:
            DamagedFileError: there is none.
        """
        return self.files.image_path(self.ids[index])

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """Read a mask.

        Returns:
            (H, W) uint8: 0 background, 1…C the classes, 255 ignored; None if the image has no mask.

        Raises:
            DamagedFileError: the file is damaged, has another size than its image, or holds an unknown class value.
        """
        mask = self.files.mask(self.ids[index])
        if mask is None:
            return None
        size = picture_size(self.image_path(index), max_pixels=self.reading.max_pixels)
        check_size(mask, size, self.files.mask_place(self.ids[index]))
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self.mask_values)] = self.mask_values
        return table[mask]


def check_size(mask: NDArray[np.uint8], size: tuple[int, int], place: str) -> None:
    """Refuse a mask that does not cover its image.

    Args:
        mask: (H, W).
        size: width and height of the upright image.
        place: where the mask is, for messages.

    Raises:
        DamagedFileError: the sizes differ.
    """
    height, width = mask.shape
    if (width, height) == size:
        return
    turned = "the mask was drawn on the image as stored; turn it as the EXIF orientation says" * (
        (height, width) == size
    )
    raise DamagedFileError(
        f"{place}: {width} x {height} pixels, but its image has {size[0]} x {size[1]}; "
        f"{turned or 'the two must be of one size'}"
    )


def build_datasets(config: DataConfig, reading: Reading | None = None) -> tuple[ImageSet, ImageSet]:
    """Open the training and the validation list. The embedded data set is drawn if need be.

    Args:
        config: the section `data` of the configuration.
        reading: how images are read; None: from `config` alone, in three colours.

    Returns:
        The training set, without images that show none of the classes, and the validation set, which is empty without
        a validation list.

    Raises:
        UserError: a missing folder, list, image, label or mask, or an unknown class name.
    """
    reading = reading or Reading(window=given_window(config), max_pixels=config.max_pixels)
    if config.dataset == "shards":
        return open_shards(config, reading, training=True), open_shards(config, reading, training=False)
    if config.dataset == "synthetic":
        synthetic.ensure(_folder(config))
    said: set[str] = set()
    train = _build(config, reading, training=True, said=said)
    if config.val_list is None:
        return train, replace(train, ids=Names(()), labels=train.labels[:0], dropped=0)
    return train, _build(config, reading, training=False, said=said)


def _folder(config: DataConfig) -> Path:
    if isinstance(config.root, str):
        raise UserError(
            f"data.root: {config.root} is a URL; data.dataset {config.dataset!r} needs a folder, only 'shards' does not"
        )
    return config.root or SYNTHETIC_ROOT


def open_split(config: DataConfig, *, training: bool, with_masks: bool) -> Split:
    """Open a list as it is on disk.

    Args:
        config: the section `data` of the configuration.
        training: the training list, else the validation list.
        with_masks: masks are needed, even if they cost memory.

    Raises:
        UserError: a missing folder or list, a file of labels or annotations that cannot be read, or shards.
    """
    if config.dataset == "shards":
        raise UserError(
            "data.dataset: shards, which cannot be opened as files; give the data set that they were packed from"
        )
    root = _folder(config)
    list_name, key = (config.train_list, "data.train_list") if training else (config.val_list, "data.val_list")
    if list_name is None:
        raise UserError(f"{key}: none; name a list of images with masks")
    if not root.is_dir():
        raise UserError(f"data.root: {root} is not a folder; give the folder of the data set by --data.root FOLDER")
    if config.dataset == "own":
        split = open_own(root, list_name, key, config)
    elif config.dataset not in BUILT_IN_DATASETS:
        split = DATASETS[config.dataset](root, list_name, key, config)
    elif config.dataset == "coco" and has_instances(root) and not (root / LISTS).is_dir():
        split = open_coco(
            root,
            list_name,
            key,
            config.classes or COCO_CLASSES,
            with_masks=with_masks or config.labels == "masks",
            negatives=training and config.negatives is True,
            links=config.allow_links,
            max_pixels=config.max_pixels,
        )
    else:
        split = open_voc(root, list_name, key, config.classes or CLASSES[config.dataset], config)
        return _see_values(split, config) if with_masks or isinstance(split.labels, MaskLabels) else split
    split = _see_values(split, config) if with_masks or config.labels == "masks" else split
    if config.labels != "auto":
        split = split._replace(labels=open_labels(root, split.classes, config, split.files, split.notes))
    return split


def _see_values(split: Split, config: DataConfig) -> Split:
    """Detect whether masks of one class are drawn as 0 and 255."""
    files = split.files
    if len(split.classes) > 1 or config.mask_values != "auto" or not isinstance(files, FolderFiles):
        return split
    masks = (_try(files, name) for name in split.ids)
    if not drawn_in_black_and_white(mask for mask in masks if mask is not None):
        return split
    split.notes.add(
        f"masks hold 0 and 255, and nowhere a 1: 255 is read as {split.classes[0]!r}, and no pixel is ignored; if 255 "
        'does mean ignored, give --data.mask_values \'{"0": background, "255": ignore}\'',
        level=logging.WARNING,
    )
    changed = replace(files, meaning={0: 0, IGNORE: 1})
    labels = MaskLabels(changed) if isinstance(split.labels, MaskLabels) else split.labels
    return split._replace(files=changed, labels=labels)


def _try(files: Files, name: str) -> NDArray[np.uint8] | None:
    """Read a mask that may be missing or damaged, which is reported where the mask is needed."""
    try:
        return files.mask(name)
    except DamagedFileError:
        return None


def _build(config: DataConfig, reading: Reading, *, training: bool, said: set[str]) -> SegmentationDataset:
    split = open_split(config, training=training, with_masks=not training)
    names, files = split.classes, split.files
    chosen = _choose(names, config.subset)
    check_names(split.ids, split.origin, "data.train_list" if training else "data.val_list")
    for _, problem in check_one_file_each(split):
        raise UserError(problem)
    for name in split.ids:
        files.image_path(name)
        if not training and not files.has_mask(name):
            raise no_mask(files, name)
    labels = read_labels(split.ids, split.labels, len(names))
    if not training:
        for name in list(split.ids)[:SAMPLED]:
            _try(files, name)
    split.notes.log(logger, said)
    empty = np.asarray(~labels.any(1))
    if training and empty.any() and keeps_negatives(config) is None:
        raise no_label(split, split.ids[int(empty.argmax())], f" ({empty.sum()} of {len(labels)} have none)")
    labels = labels[:, chosen]
    kept = np.arange(len(labels))
    if training:
        kept = np.flatnonzero(labels.any(1) | (empty & bool(keeps_negatives(config))))
        if not labels.any():
            key = "data.subset" if config.subset else str(split.origin)
            wanted_names = ", ".join(names[number] for number in chosen)
            raise UserError(f"{key}: no training image of {config.root} shows any of {wanted_names}")
        _tell(config, empty, len(labels) - len(kept))
        for warning in balance_warnings([names[number] for number in chosen], labels[kept].sum(0), len(kept)):
            logger.warning("data: %s", warning)
    values = np.full(len(names) + 1, IGNORE, np.uint8)
    values[0] = 0
    values[[number + 1 for number in chosen]] = np.arange(1, len(chosen) + 1)
    classes = tuple(names[number] for number in chosen)
    dropped = len(labels) - len(kept)
    return SegmentationDataset(files, split.ids.take(kept), classes, labels[kept], values, dropped, reading)


def _tell(config: DataConfig, empty: NDArray[np.bool_], dropped: int) -> None:
    """Report which training images show nothing, and which are left out."""
    count = len(empty)
    if empty.any() and keeps_negatives(config):
        logger.info("data: %d of %d training images show no class: background alone", empty.sum(), count)
    elif empty.any():
        logger.warning("data: %d of %d training images show no class: left out", empty.sum(), count)
        dropped -= int(empty.sum())
    if dropped:
        logger.warning("%d of %d training images show no class of data.subset: left out", dropped, count)


def _choose(names: Sequence[str], subset: Sequence[str] | None) -> list[int]:
    """Return the numbers of the classes to learn."""
    for key, given in (("data.classes", names), ("data.subset", subset)):
        if given is not None:
            check_class_names(given, key)
            for name in given:
                refuse_background(name, key)
    for name in subset or ():
        if name not in names:
            raise UserError(f"data.subset: unknown class {name!r}{nearest(name, names)}")
    return [names.index(name) for name in subset or names]
