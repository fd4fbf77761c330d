"""Image-level labels: which classes an image shows.

ROOT/Annotations/ID.xml   PASCAL VOC: the name of every object
ROOT/labels.csv           header `image,labels`; a row holds an ID and class names with spaces between them
                          (a space inside a name is written `_`: traffic_light)
masks                     every class value that the mask holds

A source is a function from the ID of an image to its classes, as numbers from 0. It raises `UserError` where they
cannot be read, so that one bad entry can be reported beside the others.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.layout import Files, no_mask
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.errors import UserError, nearest
from fsr_fast.runtime.files import write_text

LabelSource = Callable[[str], list[int]]
Row = tuple[str, str, list[str] | None]  # place in the file, image, class names; none: the row has not two columns
HEADER = ("image", "labels")


def open_labels(root: Path, classes: Sequence[str], source: str, files: Files) -> LabelSource:
    """Open the labels of a data set in VOC layout.

    Args:
        root: folder of the data set.
        classes: names of the C foreground classes, in the order of the mask values 1…C.
        source: `xml`, `csv`, `masks`, or `auto` for the first of these that exists.
        files: gives the masks.

    Raises:
        UserError: the CSV file is missing or is none.
    """
    if source == "auto":
        source = "xml" if (root / "Annotations").is_dir() else "csv" if (root / "labels.csv").is_file() else "masks"
    if source == "csv":
        return TableLabels(root / "labels.csv", read_csv(root / "labels.csv"), classes)
    return XmlLabels(root / "Annotations", classes) if source == "xml" else MaskLabels(files)


def read_labels(ids: Names, source: LabelSource, classes: int) -> NDArray[np.float32]:
    """Read the labels of n images.

    Returns:
        (n, C) float32, 1 where the image shows the class, else 0.

    Raises:
        UserError: an image without an entry, a damaged file, an unknown class name.
    """
    labels = np.zeros((len(ids), classes), np.float32)
    for row, shown in zip(labels, map_ahead(source, ids), strict=True):
        row[shown] = 1
    return labels


class TableLabels:
    """Labels from a table of images and class names.

    Args:
        path: file of the table, for messages.
        rows: of the table.
        classes: names of the foreground classes.
    """

    def __init__(self, path: Path, rows: Iterable[Row], classes: Sequence[str]) -> None:
        self._path, self._classes = path, _Classes(classes)
        self._rows: dict[str, tuple[str, list[str] | None]] = {}
        self._twice: dict[str, str] = {}
        for where, name, shown in rows:
            if name in self._rows:
                self._twice[name] = where
            self._rows[name] = (where, shown)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __call__(self, name: str) -> list[int]:
        """Return the classes of an image."""
        if name not in self._rows:
            raise UserError(
                f"{self._path}: no row for the image {name!r}; add it, take the image off the list, or take the labels "
                "from elsewhere by data.labels; `fsr-fast data check` lists all that are missing"
            )
        if name in self._twice:
            raise UserError(f"{self._twice[name]}: the image {name!r} has a row already; keep one")
        where, shown = self._rows[name]
        if shown is None:
            raise UserError(f"{where}: expected 2 columns: an image, and its classes with spaces between them")
        return self._classes.numbers(shown, where)


class XmlLabels:
    """Labels from PASCAL VOC's annotations.

    Args:
        folder: Annotations.
        classes: names of the foreground classes.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self._folder, self._classes = folder, _Classes(classes)

    def __call__(self, name: str) -> list[int]:
        """Return the classes of an image."""
        path = self._folder / f"{name}.xml"
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; add it, or take the labels from elsewhere by data.labels") from None
        except ElementTree.ParseError as error:
            raise UserError(f"{path}: not valid XML: {error}; replace the file") from None
        return self._classes.numbers([(item.findtext("name") or "").strip() for item in objects], str(path))


class MaskLabels:
    """Labels from the masks.

    Args:
        files: gives the masks.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    def __call__(self, name: str) -> list[int]:
        """Return the classes of an image."""
        mask = self._files.mask(name)
        if mask is None:
            raise no_mask(self._files, name)
        return shown_classes(mask)


def read_csv(path: Path) -> Iterator[Row]:
    """Read the rows of a label file, one by one.

    Raises:
        UserError: the file is missing, is not CSV in UTF-8, or lacks the header.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(name.strip() for name in header) != HEADER:
                raise UserError(f"{path}, line 1: the header is {','.join(header)!r}; expected 'image,labels'")
            for row in filter(None, reader):
                where = f"{path}, line {reader.line_num}"
                yield where, row[0], row[1].split() if len(row) == 2 else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; add it, or take the labels from elsewhere by data.labels") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}; write it anew") from None


def read_json(path: Path) -> Iterator[Row]:
    """Read the entries of a label file `[{"image": NAME, "labels": [CLASS, …]}, …]`.

    Raises:
        UserError: the file is not JSON of that form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; write it anew") from None
    form = 'expected [{"image": name, "labels": [class, …]}, …]'
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds a {type(entries).__name__}; {form}")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        name, shown = (entry.get("image"), entry.get("labels")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(shown, list) or not all(isinstance(item, str) for item in shown):
            raise UserError(f"{where}: {str(entry)[:80]!r}; {form}")
        yield where, name, shown


def write_csv(path: Path, rows: Iterable[tuple[str, Iterable[str]]]) -> int:
    """Write a label file; it appears only when it is complete.

    Args:
        path: file to write.
        rows: image and class names.

    Returns:
        The number of rows.

    Raises:
        UserError: the file exists.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((name, " ".join(_key(label) for label in shown)) for name, shown in rows)
    write_new(path, text.getvalue())
    return text.getvalue().count("\n") - 1


def write_new(path: Path, text: str) -> None:
    """Write a file that appears only when it is complete.

    Raises:
        UserError: the file exists.
    """
    if path.exists():
        raise UserError(f"{path} exists; delete it or give another name")
    write_text(path, text)


def shown_classes(mask: NDArray[np.uint8]) -> list[int]:
    """Return the classes whose values a mask holds, as numbers from 0."""
    counts = np.bincount(mask.ravel(), minlength=256)
    return [int(value) for value in np.flatnonzero(counts[1:255])]


class _Classes:
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._table = {_key(name): number for number, name in enumerate(names)}
        for number, name in enumerate(names):
            last = self._table[_key(name)]
            if last != number:  # labels could not tell them apart
                twice = "stands there twice; keep one"
                alike = f"and {names[last]!r} are one name, with spaces written _; rename one"
                raise UserError(f"data.classes: {name!r} {twice if names[last] == name else alike}")

    def numbers(self, names: Sequence[str], where: str) -> list[int]:
        unknown = [name for name in names if _key(name) not in self._table]
        if unknown:
            raise UserError(f"{where}: unknown class {unknown[0]!r}{nearest(unknown[0], self._names)}")
        return [self._table[_key(name)] for name in names]


def _key(name: str) -> str:
    return name.replace(" ", "_")
