"""Read lists and tables written by people: infer encoding and separator, and remove Excel's leftovers.

Ambiguities are not guessed: the error shows the possible readings, and the option that chooses.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
CODE_PAGES = ("cp1252", "mac_roman", "cp1250", "cp1251")  # encodings of spreadsheets that do not write Unicode
EXCEL, OLD_EXCEL = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
SPACE = "\u00a0"  # no-break space, as pasted by spreadsheets


class Row(NamedTuple):
    """One row of a table."""

    where: str
    """File and line, for messages."""
    cells: list[str]
    """Without surrounding spaces; a row may have fewer or more than the header."""


class Table(NamedTuple):
    """A table with a header."""

    header: list[str]
    rows: list[Row]


def read_text(
    path: Path, *, encoding: str | None = None, notes: Notes | None = None, key: str = "data.encoding"
) -> str:
    """Read a text file. Line ends become `\\n`.

    Args:
        path: the file.
        encoding: its name in Python; None: UTF-8, or UTF-16 where detected.
        notes: records what was inferred.
        key: the option that names the encoding, for messages.

    Raises:
        UserError: the file is missing, or is not text in this encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; add it, or name another file") from None
    chosen = encoding or _encoding(data)
    try:
        text = data.decode(chosen)
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{path}: {_other_encodings(data, error, key)}") from None
    if "\0" in text:
        raise UserError(f"{path}: not text: it holds zero bytes; write it again as text in UTF-8")
    if notes is not None and chosen.lower() not in ("utf-8", "utf-8-sig"):
        notes.add(f"{path.name}: encoded as {chosen.upper()}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, *, encoding: str | None = None, notes: Notes | None = None) -> list[tuple[str, str]]:
    """Read a list: place in the file and text of every line that is not blank.

    Raises:
        UserError: as `read_text`.
    """
    lines = read_text(path, encoding=encoding, notes=notes).split("\n")
    stripped = ((f"{path}, line {number}", _strip(line)) for number, line in enumerate(lines, 1))
    return [(where, line) for where, line in stripped if line]


def read_table(
    path: Path,
    *,
    columns: Sequence[str] = (),
    encoding: str | None = None,
    separator: str | None = None,
    notes: Notes | None = None,
    key: str = "data",
) -> Table:
    """Read a table: CSV with any of the usual separators, or an Excel workbook's first sheet.

    Blank rows, and blank columns at the end, are left out.

    Args:
        path: the file.
        columns: names that the header must contain, in any order and any capitals; they reveal the separator.
        encoding: as for `read_text`.
        separator: between the cells; None: inferred from the header.
        notes: records what was inferred.
        key: prefix of the options that choose, for messages.

    Raises:
        UserError: the file cannot be read, the header lacks a column, or the separator is ambiguous.
    """
    notes = Notes() if notes is None else notes
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from None
    if start == OLD_EXCEL:
        raise UserError(f"{path}: a workbook of an old Excel version; save it as .xlsx, or as CSV UTF-8")
    if start == EXCEL:
        numbered = _read_excel(path, notes)
    else:
        text = read_text(path, encoding=encoding, notes=notes, key=f"{key}.encoding" if key == "data" else "--encoding")
        text, named = _named_separator(text)
        separator = separator or named or _separator(path, text, columns, key)
        if separator != ",":
            notes.add(f"{path.name}: columns are separated by {SEPARATORS.get(separator, repr(separator))}")
        numbered = _split(path, text, separator)
    filled = [(number, cells) for number, cells in numbered if any(cells)]
    if not filled:
        raise UserError(f"{path}: is empty; expected a header and one row per picture")
    if len(filled) < len(numbered):
        notes.add(f"{path.name}: {len(numbered) - len(filled)} blank rows are left out")
    (line, header), *rows = filled
    width = max((number for number, cell in enumerate(header, 1) if cell), default=0)
    if width < len(header) and all(not any(cells[width:]) for _, cells in rows):
        notes.add(f"{path.name}: {len(header) - width} columns without a name are empty, and left out")
        header, rows = header[:width], [(number, cells[:width]) for number, cells in rows]
    missing = [name for name in columns if name not in map(str.lower, header)]
    if missing:
        raise UserError(
            f"{path}, line {line}: the header is {','.join(header)!r}; expected {','.join(columns)!r}; "
            "`fsr-fast data import` reads tables of other forms"
        )
    return Table(
        [name.lower() if name.lower() in columns else name for name in header],
        [Row(f"{path}, line {number}", cells) for number, cells in rows],
    )


def clean_name(name: str, notes: Notes, where: str) -> str:
    """Return a file's name as a path with `/`, without a leading `./`."""
    if "\\" in name:
        notes.add("backslashes in names are read as /", where)
        name = name.replace("\\", "/")
    return name.removeprefix("./")


def _encoding(data: bytes) -> str:
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if marked:
        return marked
    head = data[:1000]
    if b"\0" in head:  # UTF-16 without its mark: every second byte of plain letters is zero
        even, odd = head[::2].count(0), head[1::2].count(0)
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def _other_encodings(data: bytes, error: Exception, key: str) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return f"{error}; {key} takes the name of an encoding, such as cp1252"
    line = next((line for line in data.splitlines() if any(byte > 127 for byte in line)), data)[:80]
    readings: dict[str, str] = {}
    for page in CODE_PAGES:
        readings.setdefault(line.decode(page, "replace").strip(), page)
    shown = ", ".join(f"{text!r} ({page})" for text, page in readings.items())
    return (
        f"not text in UTF-8; a line of it could mean {shown}; choose by --{key.removeprefix('--')} NAME, or save it "
        "as CSV UTF-8"
    )


def _named_separator(text: str) -> tuple[str, str | None]:
    """Remove Excel's first line `sep=;`."""
    match = re.match(r'"?sep=(.)"?[ ,;\t]*\n', text, re.IGNORECASE)
    return (text[match.end() :], match[1]) if match else (text, None)


def _separator(path: Path, text: str, columns: Sequence[str], key: str) -> str:
    line = next((line for line in text.split("\n") if line.strip(" ,;|\t")), "")
    cells = {mark: [_strip(cell) for cell in next(csv.reader([line], delimiter=mark), [])] for mark in SEPARATORS}
    if columns:
        fitting = [mark for mark, found in cells.items() if set(columns) <= {cell.lower() for cell in found}]
        return fitting[0] if fitting else ","
    several = [mark for mark, found in cells.items() if len(found) > 1]
    even = [mark for mark in several if len({len(row) for _, row in _split(path, text, mark) if any(row)}) == 1]
    likely = even or several
    if len(likely) > 1:
        shown = "; or ".join(f"by {SEPARATORS[mark]} into {cells[mark]}" for mark in likely)
        option = "--separator" if key != "data" else "--data.separator"
        raise UserError(f"{path}: the header can be split {shown}; choose by {option} {likely[0]!r} or {likely[1]!r}")
    return likely[0] if likely else ","


def _split(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        return [(reader.line_num, [_strip(cell) for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}; write it again") from None


def _read_excel(path: Path, notes: Notes) -> list[tuple[int, list[str]]]:
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{path}: an Excel workbook; save it as CSV UTF-8, or `pip install openpyxl`, which reads it"
        ) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        rows: Iterable[Sequence[object]] = sheet.iter_rows(values_only=True)
        numbered = [(number, [_cell(value) for value in row]) for number, row in enumerate(rows, 1)]
        width = max((len(cells) for _, cells in numbered), default=0)
        numbered = [(number, cells + [""] * (width - len(cells))) for number, cells in numbered]
    except Exception as error:  # openpyxl raises all kinds of errors on damaged workbooks
        raise UserError(f"{path}: not a readable workbook: {error}; save it again, or as CSV UTF-8") from None
    others = f", the first of {len(book.worksheets)}" if len(book.worksheets) > 1 else ""
    notes.add(f"{path.name}: the sheet {sheet.title!r}{others} is read")
    return numbered


def _cell(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else _strip(str(value))


def _strip(text: str) -> str:
    return text.replace(SPACE, " ").strip()


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file; add it, or choose another source by data.labels"
    return f"cannot be read: {error.strerror}"
