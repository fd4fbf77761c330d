"""Tables as spreadsheets write them: read where the meaning is certain, else refused with the remedy."""

import logging
from pathlib import Path

import pytest

from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from tests.dataloading.people import SHOWN, config, said, shown, table, train_split

# --- spreadsheets

TABLES: dict[str, tuple[bytes, str]] = {
    "semicolons": (table(";").encode(), "separated by semicolons"),
    "tabs": (table("\t").encode(), "separated by tabs"),
    "commas between labels": (table(between=",").encode(), "labels are separated by commas"),
    "semicolons between labels": (table(between="; ").encode(), "labels are separated by commas, semicolons"),
    "spaces around names": (b"image , labels\n" + table().partition("\n")[2].replace(",", " , ").encode(), ""),
    "no-break spaces": (table().replace("a.jpg,", "a.jpg\u00a0,").encode(), ""),
    "an empty row": (table().replace("c.jpg", ",\n\n;\nc.jpg").replace(";\n", ",\n").encode(), "blank rows"),
    "empty columns": ("\n".join(f"{line},," for line in table().splitlines()).encode(), "columns without a name"),
    "labels in columns": (table().replace("cat dog", "cat,dog").encode(), "cells beyond the last column are labels"),
    "a byte-order mark": (b"\xef\xbb\xbf" + table().encode(), ""),
    "UTF-16": (table("\t").encode("utf-16"), "encoded as UTF-16"),
    "UTF-16 without a mark": (table().encode("utf-16-le"), "encoded as UTF-16-LE"),
    "Windows line ends": (table(line="\r\n").encode(), ""),
    "old Macs' line ends": (table(line="\r").encode(), ""),
    "backslashes": (table().replace("in/b", "in\\b").encode(), "backslashes in names"),
    "capitals in the header": (table().replace("image,labels", "Image,Labels").encode(), ""),
    "Excel's word about the separator": (b"sep=;\n" + table(";").encode(), "separated by semicolons"),
    "further columns": (
        "\n".join(f"{n},{line},x" for n, line in enumerate(table().splitlines())).encode().replace(b"0,", b"no,", 1),
        "columns other than image and labels",
    ),
    "paths from the root on": (
        table().replace("\n", "\nimages/").removesuffix("images/").encode(),
        "read relative to the folder images",
    ),
    "pandas' lists": (table().replace("cat dog", "\"['cat', 'dog']\"").encode(), ""),
    "a class name with its space": (table().replace("potted_plant", "potted plant").encode(), ""),
    "the word background": (table().replace("d.jpg,", "d.jpg,background").encode(), "shows no class"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_the_usual_kinds_is_read_and_said(mydata: Path, case: str) -> None:
    content, note = TABLES[case]
    (mydata / "train.csv").write_bytes(content)
    split = train_split(mydata)
    assert shown(split) == SHOWN
    assert all(split.files.image_path(name).is_file() for name in split.ids)
    assert said(split, note) if note else not list(split.notes)


def test_a_plain_table_leaves_nothing_to_say(mydata: Path) -> None:
    split = train_split(mydata)
    assert (shown(split), list(split.notes)) == (SHOWN, [])


def test_what_was_inferred_is_logged_once(mydata: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mydata / "train.csv").write_bytes(table(";").encode())
    with caplog.at_level(logging.INFO):
        build_datasets(config(mydata))
    assert [record.getMessage() for record in caplog.records if "semicolons" in record.getMessage()] == [
        "data: train.csv: columns are separated by semicolons"
    ]


def test_a_workbook_of_excel_is_a_table(mydata: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    (mydata / "train.csv").unlink()
    book = openpyxl.Workbook()
    for row in (["image", "labels"], *([name, " ".join(labels) or None] for name, labels in SHOWN.items()), [None]):
        book.active.append(row)
    book.save(mydata / "train.xlsx")
    assert shown(train_split(mydata)) == SHOWN
    (mydata / "train.xlsx").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match=r"train\.xlsx: not a readable workbook"):
        train_split(mydata)


UNCERTAIN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "another encoding": (
        "image,labels\nKäfer.jpg,cat\n".encode("cp1252"),
        ("train.csv: not text in UTF-8", "'Käfer.jpg,cat' (cp1252)", "(mac_roman)", "--data.encoding NAME"),
    ),
    "one class or two": (
        b"image,labels\na.jpg,hot dog\n",
        ("line 2", "'hot dog' can mean", "'hot' and 'dog'", "--data.label_separator"),
    ),
    "no header": (b"a.jpg,cat\n", ("line 1", "'a.jpg,cat'", "expected 'image,labels'", "fsr-fast data import")),
    "a row without a picture": (b"image,labels\n,cat\n", ("line 2", "names no picture")),
    "a row without the second cell": (b"image,labels\na.jpg\n", ("line 2", "expected 2 columns")),
    "nothing": (b"\n\n", ("is empty", "expected a header")),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ("train.csv",)),
    "an old workbook": (b"\xd0\xcf\x11\xe0 ...", ("an old Excel", "save it as .xlsx")),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_a_table_that_is_not_certain_is_refused_with_the_remedy(mydata: Path, case: str) -> None:
    content, fragments = UNCERTAIN[case]
    (mydata / "classes.txt").write_text("cat\ndog\nhot\nhot dog\n")
    (mydata / "train.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        shown(train_split(mydata))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_options_choose_between_two_readings(mydata: Path) -> None:
    (mydata / "classes.txt").write_text("cat\ndog\nhot\nhot dog\n")
    (mydata / "train.csv").write_bytes("image,labels\nKäfer.jpg,hot dog\n".encode("cp1252"))
    for separator, expected in (("space", ["hot", "dog"]), (",", ["hot dog"])):
        split = train_split(mydata, encoding="cp1252", label_separator=separator)
        assert shown(split) == {"Käfer.jpg": expected}
