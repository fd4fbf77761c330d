"""Image-level labels: which classes an image shows.

ROOT/Annotations/ID.xml   PASCAL VOC: the name of every object
ROOT/labels.csv           header `image,labels`; a row holds an ID and class names with spaces between them
                          (a space inside a name is written `_`: traffic_light), or with commas, semicolons or bars
masks                     every class value that the mask holds

A source is a function from the ID of an image to its classes, as numbers from 0. It raises `UserError` if they
cannot be read, so that one bad entry can be reported among the others.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.layout import Files, bare_name, no_mask
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.tables import clean_name, read_table
from fsr_fast.dataloading.threads import map_ahead
from fsr_fast.errors import UserError, nearest
from fsr_fast.runtime.files import write_text

LabelSource = Callable[[str], list[int]]
Row = tuple[str, str, str | list[str] | None]
"""Place in the file, image, class names: as one cell, or one by one; None: the row has no cell for them."""
HEADER = ("image", "labels")
AT_ONCE = 64  # images per task of a thread: from memory, a single one's labels cost less than handing it over
NO_CLASS = ("background", "none")  # what people write for a picture that shows no class


def open_labels(root: Path, classes: Sequence[str], config: DataConfig, files: Files, notes: Notes) -> LabelSource:
    """Open the labels of a data set in VOC layout.

    Args:
        root: folder of the data set.
        classes: names of the C foreground classes, in the order of the mask values 1…C.
        config: section `data`; `labels`: `xml`, `csv`, `masks`, or `auto` for the first of these that exists.
        files: source of the masks.
        notes: records what was inferred.

    Raises:
        UserError: the CSV file is missing or malformed.
    """
    source = config.labels
    if source == "auto":
        source = "xml" if (root / "Annotations").is_dir() else "csv" if (root / "labels.csv").is_file() else "masks"
    if source == "csv":
        path = root / "labels.csv"
        rows = read_csv(path, encoding=config.encoding, separator=config.separator, notes=notes)
        return TableLabels(path, rows, classes, config.label_separator, notes)
    return XmlLabels(root / "Annotations", classes) if source == "xml" else MaskLabels(files)


def read_labels(ids: Names, source: LabelSource, classes: int) -> NDArray[np.float32]:
    """Read the labels of n images.

    Returns:
        (n, C) float32, 1 where the image shows the class, else 0.

    Raises:
        UserError: an image without an entry, a damaged file, an unknown class name.
    """
    labels = np.zeros((len(ids), classes), np.float32)

    def read(start: int) -> list[Any]:
        return [source(ids[index]) for index in range(start, min(start + AT_ONCE, len(ids)))]

    found = chain.from_iterable(map_ahead(read, range(0, len(ids), AT_ONCE)))
    for row, shown in zip(labels, found, strict=True):
        row[shown] = 1
    return labels


class TableLabels:
    """Labels from a table of images and class names.

    Args:
        path: file of the table, for messages.
        rows: of the table.
        classes: names of the foreground classes.
        separator: between the class names of a cell; `auto`, `space`, or a character.
        notes: records what was inferred.
    """

    def __init__(
        self,
        path: Path,
        rows: Iterable[Row],
        classes: Sequence[str],
        separator: str = "auto",
        notes: Notes | None = None,
    ) -> None:
        self._path, self._classes = path, _Classes(classes, separator, notes or Notes())
        self._rows: dict[str, tuple[str, str | list[str] | None]] = {}
        self._bare: dict[str, str] = {}
        self._twice: dict[str, str] = {}
        for where, name, shown in rows:
            if name in self._rows:
                self._twice[name] = where
            self._rows[name] = (where, shown)
            self._bare.setdefault(bare_name(name), name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __call__(self, name: str) -> list[int]:
        """Return the classes of an image."""
        known = name if name in self._rows else self._bare.get(bare_name(name))
        if known is None:
            raise UserError(
                f"{self._path}: no row for the image {name!r}; add it, take the image off the list, or choose another "
                "source of labels by data.labels; `fsr-fast data check` lists all that are missing"
            )
        if known in self._twice:
            raise UserError(f"{self._twice[known]}: the image {name!r} has a row already; keep one")
        where, shown = self._rows[known]
        if shown is None:
            raise UserError(
                f"{where}: expected 2 columns: an image, and its classes separated by spaces; for a picture that "
                "shows none of them the second column is empty"
            )
        return self._classes.read_cell(shown, where) if isinstance(shown, str) else self._classes.numbers(shown, where)


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
        path = self._folder / f"{bare_name(name)}.xml"
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; add it, or choose another source by data.labels") from None
        except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:  # and unusual encodings
            raise UserError(f"{path}: not valid XML: {error}; replace the file") from None
        return self._classes.numbers([(item.findtext("name") or "").strip() for item in objects], str(path))


class MaskLabels:
    """Labels from the masks.

    Args:
        files: source of the masks.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    def __call__(self, name: str) -> list[int]:
        """Return the classes of an image."""
        mask = self._files.mask(name)
        if mask is None:
            raise no_mask(self._files, name)
        return shown_classes(mask)


def read_csv(
    path: Path, *, encoding: str | None = None, separator: str | None = None, notes: Notes | None = None
) -> Iterator[Row]:
    """Read the rows of a label file.

    Args:
        path: the file.
        encoding: see `tables.read_table`.
        separator: likewise.
        notes: records what was inferred.

    Raises:
        UserError: the file is missing, is not a table, or lacks the header.
    """
    notes = notes or Notes()
    table = read_table(path, columns=HEADER, encoding=encoding, separator=separator, notes=notes)
    image, labels = (table.header.index(name) for name in HEADER)
    width = len(table.header)
    others = [name for name in table.header if name not in HEADER]
    if others:
        notes.add(f"{path.name}: columns other than image and labels are left out: {', '.join(map(repr, others))}")
    for where, cells in table.rows:
        spare = [cell for cell in cells[width:] if cell]
        if spare and labels < width - 1:
            raise UserError(f"{where}: {len(cells)} cells under {width} names; put names that hold a comma in quotes")
        if spare:
            notes.add(f"{path.name}: cells beyond the last column are labels, too", where)
        if len(cells) <= image or not cells[image]:
            raise UserError(f"{where}: names no picture; write its path in the column image, or delete the row")
        shown = ", ".join([cells[labels], *spare]) if len(cells) > labels else None
        yield where, clean_name(cells[image], notes, where), shown


def read_json(path: Path) -> Iterator[Row]:
    """Read the entries of a label file `[{"image": NAME, "labels": [CLASS, …]}, …]`.

    Raises:
        UserError: the file is not JSON of that form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; write it again") from None
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
    """Write a label file; it appears only once complete.

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
    def __init__(self, names: Sequence[str], separator: str = "auto", notes: Notes | None = None) -> None:
        self._names, self._separator, self._notes = names, separator, notes or Notes()
        self._table = {_key(name): number for number, name in enumerate(names)}
        for number, name in enumerate(names):
            last = self._table[_key(name)]
            if last != number:  # labels could not distinguish them
                twice = "is listed twice; keep one"
                alike = f"and {names[last]!r} are one name, with spaces written _; rename one"
                raise UserError(f"data.classes: {name!r} {twice if names[last] == name else alike}")

    def numbers(self, names: Sequence[str], where: str) -> list[int]:
        unknown = [name for name in names if _key(name) not in self._table]
        if unknown:
            raise UserError(f"{where}: unknown class {unknown[0]!r}{nearest(unknown[0], self._names)}")
        return [self._table[_key(name)] for name in names]

    def read_cell(self, cell: str, where: str) -> list[int]:
        """Split a cell into class names."""
        cell = cell.strip(" ,;|")
        if _key(cell) in self._table and not re.search(r"\s", cell):
            return self.numbers([cell], where)
        if cell.lower() in NO_CLASS:
            self._notes.add(f"the label {cell!r} is read as a picture that shows no class", where)
            return []
        if self._separator != "auto":
            mark = None if self._separator == "space" else self._separator
            return self.numbers([name.strip() for name in cell.split(mark) if name.strip()], where)
        if cell.startswith("["):  # a list as written by pandas
            return self.numbers(split_names(cell, where), where)
        pieces = split_names(cell, where)
        if len(pieces) > 1:
            self._notes.add("labels are separated by commas, semicolons or bars", where)
        return [number for piece in pieces for number in self._piece(piece, where)]

    def _piece(self, piece: str, where: str) -> list[int]:
        """Read one class name that may contain spaces, or several separated by spaces."""
        words = piece.split()
        whole, apart = _key(piece) in self._table, all(_key(word) in self._table for word in words)
        if whole and apart and len(words) > 1:
            raise UserError(
                f"{where}: {piece!r} can mean the class {piece!r} or the classes {' and '.join(map(repr, words))}; "
                "write _ for a space inside a name, or choose by --data.label_separator ',' (one class) or space"
            )
        return self.numbers([piece] if whole else words, where)


def split_names(cell: str, where: str) -> list[str]:
    """Split a cell of labels without knowing the classes: by commas, semicolons, bars, or as a list from pandas.

    Args:
        cell: of a table; Label Studio's `{"choices": [...]}` is also read.
        where: file and line, for messages.

    Raises:
        UserError: it begins like a list but is not one.
    """
    if cell.startswith("{"):
        cell = cell.partition(":")[2].strip().removesuffix("}").strip()
    if cell.startswith("["):
        return _literal(cell, where)
    pieces = (piece.strip() for piece in re.split("[,;|]", cell))
    return [piece for piece in pieces if piece and piece.lower() not in NO_CLASS]


def _literal(cell: str, where: str) -> list[str]:
    try:
        names = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {cell[:80]!r}; expected class names, as in ['cat', 'dog'] or in: cat dog")
    return names


def _key(name: str) -> str:
    return name.strip().replace(" ", "_")
