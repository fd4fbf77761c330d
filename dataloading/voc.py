"""PASCAL VOC's layout.

    ROOT/JPEGImages/ID.jpg                      images (.jpeg and .png will do as well)
    ROOT/ImageSets/Segmentation/LIST.txt        one ID a line
    ROOT/SegmentationClassAug/ID.png            masks: 0 background, 1… classes, 255 ignored
    ROOT/SegmentationClass/ID.png               the same, for images without a mask there
    ROOT/Annotations/ID.xml, ROOT/labels.csv    image labels, see `labels.py`

MS COCO in this layout may have folders train2014 and val2014 in JPEGImages and SegmentationClass, as the official code
has. Training needs no masks, unless the labels are read from them; validation does.
"""

from __future__ import annotations

from pathlib import Path

from fsr_fast.dataloading.labels import open_labels
from fsr_fast.dataloading.layout import FolderFiles, Split, find_list, read_list
from fsr_fast.dataloading.names import Names
from fsr_fast.errors import UserError

LISTS = "ImageSets/Segmentation"
IMAGES = "JPEGImages"
MASKS = ("SegmentationClassAug", "SegmentationClass")
PARTS = ("train2014", "val2014")


def open_voc(root: Path, list_name: str, key: str, classes: tuple[str, ...], labels: str) -> Split:
    """Open a list of a data set in VOC layout.

    Args:
        root: folder of the data set.
        list_name: name of the list in ImageSets/Segmentation, or the path of a text file.
        key: of the configuration, for messages.
        classes: names of the foreground classes.
        labels: source of the image labels: `auto`, `xml`, `csv` or `masks`.

    Raises:
        UserError: the folder has another layout, or the list or labels.csv cannot be read.
    """
    check_layout(root)
    path = find_list(root / LISTS, list_name, key, (".txt",))
    ids = read_list(path, key)
    files = FolderFiles(_with_parts(root, (IMAGES,)), _with_parts(root, MASKS), len(classes))
    return Split(path, Names(ids), classes, files, open_labels(root, classes, labels, files))


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


def _with_parts(root: Path, folders: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the folders, and the parts of MS COCO that stand in them."""
    parts = [root / folder / part for folder in folders for part in PARTS]
    return (*(root / folder for folder in folders), *(part for part in parts if part.is_dir()))
