"""Data sets in PASCAL VOC layout, with the labels of each image and, where there are any, its mask.

    ROOT/JPEGImages/ID.jpg                      images (.jpeg and .png will do as well)
    ROOT/ImageSets/Segmentation/LIST.txt        one ID a line
    ROOT/SegmentationClassAug/ID.png            masks: 0 background, 1… classes, 255 ignored
    ROOT/SegmentationClass/ID.png               the same, for images without a mask there
    ROOT/Annotations/ID.xml, ROOT/labels.csv    image labels, see `labels.py`

Training needs no masks, unless the labels are read from them; validation does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.dataloading import synthetic
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.images import IGNORE, DamagedFileError, check_name, image_size, inside, read_image, read_mask
from fsr_fast.dataloading.labels import read_labels
from fsr_fast.errors import UserError, nearest

SYNTHETIC_ROOT = Path("data/synthetic")
IMAGE_FOLDERS, IMAGE_ENDINGS = ("JPEGImages",), (".jpg", ".jpeg", ".png")
MASK_FOLDERS, MASK_ENDINGS = ("SegmentationClassAug", "SegmentationClass"), (".png",)

CLASSES = {"synthetic": synthetic.CLASSES, "voc": VOC_CLASSES, "coco": COCO_CLASSES}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SegmentationDataset:
    """The images of one list.

    Args:
        root: folder of the data set.
        ids: names of the n images.
        classes: names of the C foreground classes.
        labels: (n, C) float32, 1 where the image shows the class, else 0.
        mask_values: (K + 1,) uint8, what the class values 0…K of the mask files become: 0, 1…C or 255.
        dropped: number of images of the list that were left out because they show none of the classes.
    """

    root: Path
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.float32]
    mask_values: NDArray[np.uint8]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def max_labels(self) -> int:
        """Largest number of labels that an image has."""
        return int(self.labels.sum(1).max())

    def image(self, index: int) -> Image.Image:
        """Read an image as RGB, upright.

        Raises:
            DamagedFileError: the file is missing or cannot be decoded.
        """
        return read_image(self.image_path(index))

    def image_path(self, index: int) -> Path:
        """Give the file of an image.

        Raises:
            DamagedFileError: there is none.
        """
        return _find_image(self.root, self.ids[index])

    def mask(self, index: int) -> NDArray[np.uint8] | None:
        """Read a mask.

        Returns:
            (H, W) uint8: 0 background, 1…C the classes, 255 ignored; none where the image has no mask.

        Raises:
            DamagedFileError: the file is damaged, has another size than its image, or holds an unknown class value.
        """
        path = _find(self.root, MASK_FOLDERS, self.ids[index], MASK_ENDINGS)
        if path is None:
            return None
        mask = read_mask(path, len(self.mask_values) - 1)
        width, height = image_size(self.image_path(index))
        if mask.shape != (height, width):
            raise DamagedFileError(
                f"{path}: {mask.shape[1]} x {mask.shape[0]} pixels, but its image (upright, as its EXIF data say) has "
                f"{width} x {height}; the two must be of one size"
            )
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self.mask_values)] = self.mask_values
        return table[mask]


def build_datasets(config: DataConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Open the training and the validation list. The embedded data set is drawn if need be.

    Args:
        config: the section `data` of the configuration.

    Returns:
        The training set, without images that show none of the classes, and the validation set.

    Raises:
        UserError: a missing folder, list, image, label or mask, or an unknown class name.
    """
    root = config.root or SYNTHETIC_ROOT
    if config.dataset == "synthetic":
        synthetic.ensure(root)
    _check_layout(root, config.dataset)
    return _open(root, config, config.train_list, training=True), _open(root, config, config.val_list, training=False)


def _open(root: Path, config: DataConfig, list_name: str, *, training: bool) -> SegmentationDataset:
    names = config.classes or CLASSES[config.dataset]
    chosen = _choose(names, config.subset)
    ids = _read_list(root, list_name, "data.train_list" if training else "data.val_list")
    for name in ids:
        _find_image(root, name)
        if not training:
            _find_mask(root, name)
    labels = read_labels(root, ids, names, config.labels, lambda name: read_mask(_find_mask(root, name), len(names)))
    empty = np.flatnonzero(~labels.any(1))
    if training and len(empty):
        raise UserError(
            f"{root}: the training image {ids[empty[0]]!r} has no label ({len(empty)} of {len(ids)} have none); "
            f"label it, or take it off the list {list_name}"
        )
    labels = labels[:, chosen]
    kept = np.flatnonzero(labels.any(1)) if training else np.arange(len(ids))
    if not len(kept):
        raise UserError(f"data.subset: no training image of {root} shows any of {', '.join(config.subset or ())}")
    if len(kept) < len(ids):
        logger.warning(
            "%d of %d training images show no class of data.subset: left out", len(ids) - len(kept), len(ids)
        )
    values = np.full(len(names) + 1, IGNORE, np.uint8)
    values[0] = 0
    values[[number + 1 for number in chosen]] = np.arange(1, len(chosen) + 1)
    classes = tuple(names[number] for number in chosen)
    return SegmentationDataset(root, tuple(ids[i] for i in kept), classes, labels[kept], values, len(ids) - len(kept))


def _choose(names: Sequence[str], subset: Sequence[str] | None) -> list[int]:
    """Numbers of the classes to learn."""
    for key, given in (("data.classes", names), ("data.subset", subset or ())):
        twice = [name for name in given if given.count(name) > 1]
        if twice:
            raise UserError(f"{key}: {twice[0]!r} stands there twice; keep one")
    if not 0 < len(names) < IGNORE or (subset is not None and not subset):
        raise UserError(f"data.classes, data.subset: expected 1 to {IGNORE - 1} class names")
    for name in subset or ():
        if name not in names:
            raise UserError(f"data.subset: unknown class {name!r}{nearest(name, names)}")
    return [names.index(name) for name in subset or names]


def _check_layout(root: Path, dataset: str) -> None:
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder; give the folder of the data set by --data.root FOLDER")
    if (root / "JPEGImages").is_dir():
        return
    inside = next(
        (path.parent for pattern in ("*", "*/*") for path in sorted(root.glob(f"{pattern}/JPEGImages"))), None
    )
    hint = (
        f"did you mean {inside}?" if inside else "expected JPEGImages, ImageSets/Segmentation and masks or labels there"
    )
    if dataset == "coco" and (root / "annotations").is_dir():
        hint = "MS COCO's own layout and JSON are not read; expected JPEGImages, ImageSets/Segmentation and " + (
            "SegmentationClass, as in PASCAL VOC"
        )
    raise UserError(f"data.root: {root} has no folder JPEGImages; {hint}")


def _read_list(root: Path, list_name: str, key: str) -> list[str]:
    folder = root / "ImageSets/Segmentation"
    path = folder / f"{list_name}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lists = [file.stem for file in folder.glob("*.txt")]
        hint = nearest(list_name, lists) if lists else "; expected a text file with one id a line"
        raise UserError(f"{key}: {path} does not exist{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not text in UTF-8: {error}; write it anew, one id a line") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{key}: {path} is empty; expected one id a line")
    seen: set[str] = set()
    for name in ids:
        try:
            check_name(name)
        except DamagedFileError as error:
            raise UserError(f"{key}: {path}: {error}") from None
        if name in seen:
            raise UserError(f"{key}: {path}: {name!r} stands there twice; keep one")
        seen.add(name)
    return ids


def _find(root: Path, folders: Sequence[str], name: str, endings: Sequence[str]) -> Path | None:
    paths = (inside(root / folder, f"{name}{ending}") for folder in folders for ending in endings)
    return next((path for path in paths if path.is_file()), None)


def _find_image(root: Path, name: str) -> Path:
    path = _find(root, IMAGE_FOLDERS, name, IMAGE_ENDINGS)
    if path is None:
        raise DamagedFileError(
            f"{root / 'JPEGImages'}: no image for the id {name!r} (endings: {', '.join(IMAGE_ENDINGS)}); "
            "add the file, or take the id off the list"
        )
    return path


def _find_mask(root: Path, name: str) -> Path:
    path = _find(root, MASK_FOLDERS, name, MASK_ENDINGS)
    if path is None:
        raise DamagedFileError(
            f"{root}: no mask for the id {name!r} in {' or '.join(MASK_FOLDERS)}; add {name}.png, "
            "or take the id off the list"
        )
    return path
