"""PASCAL VOC's layout.

    ROOT/JPEGImages/ID.jpg                      images (.png, .tif, … work as well)
    ROOT/ImageSets/Segmentation/LIST.txt        one ID per line; or, as in DeepLab's lists, image and mask by their
                                                paths from ROOT: /JPEGImages/ID.jpg /SegmentationClassAug/ID.png
    ROOT/SegmentationClassAug/ID.png            masks: 0 background, 1… classes, 255 ignored
    ROOT/SegmentationClass/ID.png               the same, for images without a mask there
    ROOT/Annotations/ID.xml, ROOT/labels.csv    image labels, see `labels.py`

MS COCO in this layout may have folders train2014 and val2014 in JPEGImages and SegmentationClass, as in the official
code. Training needs no masks, unless the labels are read from them; validation does.
"""

from __future__ import annotations

import re
from pathlib import Path

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.labels import open_labels
from fsr_fast.dataloading.layout import FolderFiles, Split, find_list, read_list
from fsr_fast.dataloading.mask_files import parse_meaning
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError

LISTS = "ImageSets/Segmentation"
IMAGES = "JPEGImages"
MASKS = ("SegmentationClassAug", "SegmentationClass")
PARTS = ("train2014", "val2014")
PAIR = re.compile(
    rf"/?{IMAGES}/(?P<name>(?P<id>.+)\.\w+)\s+/?(?P<folder>[^/]+)/(?P<mask>.+)\.(?:png|PNG|tif|tiff|bmp)", re.ASCII
)


def open_voc(root: Path, list_name: str, key: str, classes: tuple[str, ...], config: DataConfig) -> Split:
    """Open a list of a data set in VOC layout.

    Args:
        root: folder of the data set.
        list_name: name of the list in ImageSets/Segmentation, or the path of a text file.
        key: of the configuration, for messages.
        classes: names of the foreground classes.
        config: section `data`: source of the labels, encoding, links, meaning of the masks.

    Raises:
        UserError: the folder has another layout, or the list or labels.csv cannot be read.
    """
    check_layout(root)
    notes = Notes()
    path = find_list(root / LISTS, list_name, key, (".txt",))
    ids, masks = _split_pairs(read_list(path, key, encoding=config.encoding, notes=notes), path, key, notes)
    files = FolderFiles(
        _with_parts(root, (IMAGES,)),
        _with_parts(root, masks),
        len(classes),
        config.allow_links,
        parse_meaning(config.mask_values, classes),
        notes,
        config.max_pixels,
    )
    return Split(path, Names(ids), classes, files, open_labels(root, classes, config, files, notes), notes)


def check_layout(root: Path) -> None:
    """Refuse a folder without images in VOC layout.

    Raises:
        UserError: says what is missing, and where it may be.
    """
    if (root / IMAGES).is_dir():
        return
    inside = next((path.parent for depth in ("*", "*/*") for path in sorted(root.glob(f"{depth}/{IMAGES}"))), None)
    hint = f"did you mean {inside}?" if inside else f"expected {IMAGES}, {LISTS} and masks or labels there"
    raise UserError(f"data.root: {root} has no folder {IMAGES}; {hint}")


def _split_pairs(lines: list[str], path: Path, key: str, notes: Notes) -> tuple[list[str], tuple[str, ...]]:
    """Split lines of an image and its mask, as in DeepLab's lists, into ids and the folders of the masks."""
    pairs = [PAIR.fullmatch(line) for line in lines]
    if not all(pairs):
        return [line.removeprefix(f"/{IMAGES}/").removeprefix(f"{IMAGES}/") for line in lines], MASKS
    folders = {pair["folder"] for pair in pairs if pair}
    unlike = next((line for line, pair in zip(lines, pairs, strict=True) if pair and pair["id"] != pair["mask"]), None)
    if len(folders) > 1 or unlike:
        reason = f"{unlike!r} names two pictures" if unlike else f"masks are in {' and '.join(sorted(folders))}"
        raise UserError(f"{key}: {path}: {reason}; expected masks of one folder, under the names of their images")
    notes.add(f"{path.name}: lines of an image and a mask; masks are only taken from {min(folders)}")
    return [pair["name"] for pair in pairs if pair], (min(folders),)


def _with_parts(root: Path, folders: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders, and MS COCO's subfolders in them."""
    parts = [root / folder / part for folder in folders for part in PARTS]
    return (*(root / folder for folder in folders), *(part for part in parts if part.is_dir()))
