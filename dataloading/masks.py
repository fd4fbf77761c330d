"""Mask files: PASCAL VOC's from the Semantic Boundaries Dataset (SBD), MS COCO's from outlines, CVAT's from colours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.class_names import VOC_CLASSES
from fsr_fast.dataloading.exports import Export, match_pictures, read_labelmap
from fsr_fast.dataloading.images import DamagedFileError
from fsr_fast.dataloading.labels import shown_classes, write_new
from fsr_fast.dataloading.layout import Split, bare_name, check_names, no_mask, read_list
from fsr_fast.dataloading.mask_files import read_mask
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.palette import save_palette_png
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.dataloading.voc import LISTS, MASKS, check_layout
from fsr_fast.errors import UserError
from fsr_fast.runtime.files import atomic_path

Track = Callable[[Iterable[None], str, int], Iterable[None]]


def build_augmented_masks(root: Path, sbd: Path, *, track: Track) -> tuple[int, int]:
    """Write SegmentationClassAug and, where it is missing, the list train_aug.

    Images with masks in VOC keep those, with their ignored borders; all others get SBD's. The list holds the
    images of SBD and of VOC's own training list that are not in VOC's validation list: 10,582 of the official data.

    Args:
        root: VOCdevkit/VOC2012.
        sbd: SBD's folder with `cls/*.mat`, `train.txt` and `val.txt` (benchmark_RELEASE/dataset).
        track: shows progress; takes the masks, a description and their number.

    Returns:
        The number of masks, and of names on the list.

    Raises:
        UserError: a folder or list is missing, SegmentationClassAug exists, or a file is damaged; nothing is written.
    """
    check_layout(root)
    target = root / MASKS[0]
    lists = {path: _read(path) for path in (sbd / "train.txt", sbd / "val.txt", root / LISTS / "train.txt")}
    validation = set(_read(root / LISTS / "val.txt"))
    listed = sorted(set().union(*lists.values()) - validation)
    own = {path.stem for path in (root / MASKS[1]).glob("*.png")}
    names = sorted(own | set(listed))

    def read(name: str) -> NDArray[np.uint8]:
        path = root / MASKS[1] / f"{name}.png"
        return read_mask(path, len(VOC_CLASSES)) if name in own else read_sbd_mask(sbd / "cls" / f"{name}.mat")

    _write_folder(target, names, read, track=track)
    if not (root / LISTS / "train_aug.txt").exists():
        write_new(root / LISTS / "train_aug.txt", "".join(f"{name}\n" for name in listed))
    return len(names), len(listed)


def write_masks(split: Split, folder: Path, *, track: Track) -> int:
    """Write the masks of a list as files, `FOLDER/NAME.png`, as in the layouts of VOC and of the official code.

    Args:
        split: the list, opened with masks.
        folder: to write; it appears only once complete.
        track: shows progress; takes the masks, a description and their number.

    Returns:
        The number of masks.

    Raises:
        UserError: the folder exists, or an image has no mask.
    """

    def read(name: str) -> NDArray[np.uint8]:
        mask = split.files.mask(name)
        if mask is None:
            raise no_mask(split.files, name)
        return mask

    check_names(split.ids, split.origin, "data masks")
    _write_folder(folder, split.ids, read, track=track)
    return len(split.ids)


def convert_coloured_masks(folder: Path, images: Path, target: Path, notes: Notes, *, track: Track) -> Export:
    """Convert CVAT's coloured segmentation masks to masks of classes, under the names of their pictures.

    Args:
        folder: with labelmap.txt and SegmentationClass/*.png.
        images: folder of the pictures.
        target: folder to write; it appears only once complete.
        notes: records what was inferred.
        track: shows progress; takes the masks, a description and their number.

    Returns:
        Classes in the masks, by the paths of the pictures.

    Raises:
        UserError: a colour is not in labelmap.txt, a picture is missing, or the target exists.
    """
    classes, meaning = read_labelmap(folder / "labelmap.txt")
    masks = {path.relative_to(folder / MASKS[1]).with_suffix("").as_posix(): path for path in _pngs(folder / MASKS[1])}
    if not masks:
        raise UserError(f"{folder / MASKS[1]}: no masks; expected CVAT's export `Segmentation mask`")
    pictures = {picture: masks[name] for name, picture in match_pictures(masks, images, notes).items()}
    shown: dict[str, list[str]] = {}

    def read(name: str) -> NDArray[np.uint8]:
        mask = read_mask(pictures[name], len(classes), "", meaning)
        shown[name] = [classes[number] for number in shown_classes(mask)]
        return mask

    _write_folder(target, list(pictures), read, track=track)
    return Export({name: shown[name] for name in pictures}, classes, [])


def _pngs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def read_sbd_mask(path: Path) -> NDArray[np.uint8]:
    """Read the class mask of one of SBD's .mat files.

    Returns:
        (H, W) uint8: 0 background, 1…20 VOC's classes.

    Raises:
        DamagedFileError: the file is missing, damaged or of another kind.
    """
    from scipy.io import loadmat  # slow to import

    try:
        with open(path, "rb") as file:
            mask = loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except FileNotFoundError:
        raise DamagedFileError(
            f"{path}: no such file; expected SBD's cls folder with one .mat file per image"
        ) from None
    except Exception as error:  # scipy raises all kinds of errors on damaged files
        raise DamagedFileError(f"{path}: not one of SBD's class masks: {error}; download it again") from None
    if mask.ndim != 2 or mask.dtype.kind not in "ui" or not 0 <= mask.max(initial=0) <= len(VOC_CLASSES):
        raise DamagedFileError(
            f"{path}: {mask.dtype} of shape {mask.shape}; expected a class from 0 to 20 for each pixel"
        )
    return mask.astype(np.uint8)


def _write_folder(
    target: Path, names: Collection[str], read: Callable[[str], NDArray[np.uint8]], *, track: Track
) -> None:
    if target.exists():
        raise UserError(f"{target} exists; delete it to build it again")
    with atomic_path(target, sync=False) as folder:
        folder.mkdir()

        def write(name: str) -> None:
            save_palette_png(read(name), folder / f"{bare_name(name)}.png")

        for _ in track(map_ahead(write, names), "writing masks", len(names)):
            pass


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such list; expected VOC's and SBD's own train.txt and val.txt")
    return read_list(path, "data masks")
