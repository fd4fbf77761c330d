"""Image-level labels: which classes an image shows.

ROOT/Annotations/ID.xml   PASCAL VOC: the name of every object
ROOT/labels.csv           header `image,labels`; a row holds an ID and class names with spaces between them
                          (a space inside a name is written `_`: traffic_light)
masks                     every class value that the mask holds
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fsr_fast.errors import UserError, nearest

ReadMask = Callable[[str], NDArray[np.uint8]]


def read_labels(
    root: Path, ids: Sequence[str], classes: Sequence[str], source: str, read_mask: ReadMask
) -> NDArray[np.float32]:
    """Read the labels of a list of images.

    Args:
        root: folder of the data set.
        ids: names of the n images.
        classes: names of the C foreground classes, in the order of the mask values 1…C.
        source: `xml`, `csv`, `masks`, or `auto` for the first of these that exists.
        read_mask: gives the mask of an id, (H, W) uint8 with the values 0…C and 255.

    Returns:
        (n, C) float32, 1 where the image shows the class, else 0.

    Raises:
        UserError: an image without an entry, a damaged file, an unknown class name.
    """
    if source == "auto":
        source = "xml" if (root / "Annotations").is_dir() else "csv" if (root / "labels.csv").is_file() else "masks"
    numbers = {_key(name): number for number, name in enumerate(classes)}
    if source == "csv":
        rows = _read_csv(root / "labels.csv", ids, numbers, classes)
    else:
        with ThreadPoolExecutor(8) as pool:
            if source == "xml":
                paths = [root / "Annotations" / f"{name}.xml" for name in ids]
                rows = list(pool.map(lambda path: _read_xml(path, numbers, classes), paths))
            else:
                rows = list(pool.map(lambda name: _shown(read_mask(name)), ids))
    labels = np.zeros((len(ids), len(classes)), np.float32)
    for row, shown in zip(labels, rows, strict=True):
        row[shown] = 1
    return labels


def _read_csv(path: Path, ids: Sequence[str], numbers: dict[str, int], classes: Sequence[str]) -> list[list[int]]:
    table: dict[str, list[int]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if [name.strip() for name in header] != ["image", "labels"]:
                raise UserError(f"{path}, line 1: the header is {','.join(header)!r}; expected 'image,labels'")
            for row in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                if len(row) != 2:
                    raise UserError(
                        f"{where}: {len(row)} columns; expected 2: an image, and its classes with spaces between them"
                    )
                if row[0] in table:
                    raise UserError(f"{where}: the image {row[0]!r} has a row already; keep one")
                table[row[0]] = _numbers(row[1].split(), where, numbers, classes)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; add it, or take the labels from elsewhere by data.labels") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}; write it anew") from None
    missing = [name for name in ids if name not in table]
    if missing:
        raise UserError(
            f"{path}: no row for the image {missing[0]!r} ({len(missing)} of {len(ids)} lack one); "
            "add the rows, or take the labels from elsewhere by data.labels"
        )
    return [table[name] for name in ids]


def _read_xml(path: Path, numbers: dict[str, int], classes: Sequence[str]) -> list[int]:
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; add it, or take the labels from elsewhere by data.labels") from None
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not valid XML: {error}; replace the file") from None
    return _numbers([(item.findtext("name") or "").strip() for item in objects], str(path), numbers, classes)


def _shown(mask: NDArray[np.uint8]) -> list[int]:
    counts = np.bincount(mask.ravel(), minlength=256)
    return [int(value) - 1 for value in np.flatnonzero(counts[1:255]) + 1]


def _numbers(names: Iterable[str], where: str, numbers: dict[str, int], classes: Sequence[str]) -> list[int]:
    unknown = [name for name in names if _key(name) not in numbers]
    if unknown:
        raise UserError(f"{where}: unknown class {unknown[0]!r}{nearest(unknown[0], classes)}")
    return [numbers[_key(name)] for name in names]


def _key(name: str) -> str:
    return name.replace(" ", "_")
