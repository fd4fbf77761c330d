"""Own pictures: a folder, and a table that names the classes of each.

ROOT/images/…                   pictures (.jpg, .png, .tif, .bmp, .webp, .npy, .dcm), in subfolders if you like
ROOT/train.csv, ROOT/val.csv    header `image,labels`: the path below images, and class names separated by spaces
                                (a space inside a name is written `_`), none for a picture of background alone; or
                                train.xlsx; or train.json: [{"image": "cat 1.jpg", "labels": ["cat"]}, …]
ROOT/classes.txt                one class per line, in the order of the mask values 1, 2, …
ROOT/masks/…png                 masks, under the names of their pictures; only validation needs them
"""

from __future__ import annotations

import os
from pathlib import Path

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.labels import TableLabels, read_csv, read_json
from fsr_fast.dataloading.layout import FolderFiles, Split, find_list
from fsr_fast.dataloading.mask_files import parse_meaning
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.tables import read_lines
from fsr_fast.errors import UserError

TABLE_ENDINGS = (".csv", ".json", ".xlsx")
BACKGROUND = ("background", "_background_", "__background__")


def open_own(root: Path, list_name: str, key: str, config: DataConfig) -> Split:
    """Open a table of own pictures.

    Args:
        root: folder of the data set.
        list_name: name of the table, or its path.
        key: of the configuration, for messages.
        config: section `data`: names of the classes, if not those of classes.txt; how the table is read; links;
            meaning of the masks.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    if not (root / "images").is_dir():
        raise UserError(
            f"data.root: {root} has no folder images; put the pictures there, and their labels in train.csv"
        )
    notes = Notes()
    path = find_list(root, list_name, key, TABLE_ENDINGS)
    names = config.classes or tuple(read_classes(root, config.encoding, notes))
    rows = (
        read_json(path)
        if path.suffix == ".json"
        else read_csv(path, encoding=config.encoding, separator=config.separator, notes=notes)
    )
    named = ((where, _below(root, name, notes), shown) for where, name, shown in rows)
    labels = TableLabels(path, named, names, config.label_separator, notes)
    ids = list(labels)
    if not ids:
        raise UserError(f"{key}: {path} names no picture; expected one row per picture")
    meaning = parse_meaning(config.mask_values, names)
    files = FolderFiles(
        (root / "images",), (root / "masks",), len(names), config.allow_links, meaning, notes, config.max_pixels
    )
    return Split(path, Names(ids), names, files, labels, notes)


def read_classes(root: Path, encoding: str | None = None, notes: Notes | None = None) -> list[str]:
    """Read the class names of classes.txt.

    Raises:
        UserError: there is no such file, it is empty or not text, or it names the background.
    """
    path = root / "classes.txt"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; write one class name per line, in the order of mask values, or give "
            "--data.classes cat,dog"
        )
    lines = read_lines(path, encoding=encoding, notes=notes)
    if not lines:
        raise UserError(f"data.classes: {path} is empty; expected one class name per line")
    for where, name in lines:
        refuse_background(name, where)
    return [name for _, name in lines]


def refuse_background(name: str, where: str) -> None:
    """Refuse the background among the classes: it always has the mask value 0.

    Args:
        name: of a class.
        where: file and line, or the key of the configuration.

    Raises:
        UserError: the name is the background's.
    """
    if name.lower() in BACKGROUND:
        raise UserError(
            f"{where}: {name!r} is not a class: the background always exists, as mask value 0; remove it, so that "
            "the first class is mask value 1"
        )


def _below(root: Path, name: str, notes: Notes) -> str:
    """Return a name as a path below images: tables also give paths from the root, or absolute ones."""
    for start in (f"{root.absolute()}/images/", f"{root}/images/", "images/"):
        if name.startswith(start) and not os.path.exists(root / "images" / name):
            notes.add("paths in the table are read relative to the folder images", name)
            return name.removeprefix(start)
    return name
