"""Own pictures: a folder, and a table that names the classes of each.

ROOT/images/…                   pictures (.jpg, .jpeg, .png), in folders if you like
ROOT/train.csv, ROOT/val.csv    header `image,labels`: the path below images, and class names with spaces between them
                                (a space inside a name is written `_`); or train.json, val.json:
                                [{"image": "cat 1.jpg", "labels": ["cat"]}, …]
ROOT/classes.txt                one class a line, in the order of the mask values 1, 2, …
ROOT/masks/…png                 masks, under the names of their pictures; only validation needs them
"""

from __future__ import annotations

from pathlib import Path

from fsr_fast.dataloading.labels import TableLabels, read_csv, read_json
from fsr_fast.dataloading.layout import FolderFiles, Split, find_list, read_list
from fsr_fast.dataloading.names import Names
from fsr_fast.errors import UserError

TABLE_ENDINGS = (".csv", ".json")


def open_own(root: Path, list_name: str, key: str, classes: tuple[str, ...] | None) -> Split:
    """Open a table of own pictures.

    Args:
        root: folder of the data set.
        list_name: name of the table, or its path.
        key: of the configuration, for messages.
        classes: names of the foreground classes; none: those of classes.txt.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if not (root / "images").is_dir():
        raise UserError(
            f"data.root: {root} has no folder images; put the pictures there, and their labels in train.csv"
        )
    path = find_list(root, list_name, key, TABLE_ENDINGS)
    names = classes or tuple(read_classes(root))
    labels = TableLabels(path, read_json(path) if path.suffix == ".json" else read_csv(path), names)
    ids = list(labels)
    if not ids:
        raise UserError(f"{key}: {path} names no picture; expected a row for each")
    files = FolderFiles((root / "images",), (root / "masks",), len(names))
    return Split(path, Names(ids), names, files, labels)


def read_classes(root: Path) -> list[str]:
    """Read the class names of classes.txt.

    Raises:
        UserError: there is no such file, or it is empty or not text.
    """
    if not (root / "classes.txt").is_file():
        raise UserError(
            f"{root / 'classes.txt'}: no such file; write one class name a line, in the order of the mask values, "
            "or give data.classes"
        )
    return read_list(root / "classes.txt", "data.classes")
