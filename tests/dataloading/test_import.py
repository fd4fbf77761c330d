"""`fsr-fast data import`: exports of labelling tools and spreadsheets become a table that training reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fsr_fast.commands.data import main
from fsr_fast.config import DataConfig
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError

PICTURES = ("one.jpg", "deep/two.png", "three three.jpg", "four.JPG")
EXPECTED = {"one.jpg": {"cat"}, "deep/two.png": {"cat", "hot dog"}, "three three.jpg": {"hot dog"}, "four.JPG": set()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four pictures that wait for their labels."""
    for name in PICTURES:
        path = tmp_path / "mydata/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (len(name), 9, 9)).save(path)
    return tmp_path / "mydata"


def run(source: Path, root: Path, *options: str) -> dict[str, set[str]]:
    """Import, and read the result as a training does."""
    main(["import", str(source), "--output", str(root), *options])
    data = DataConfig(dataset="own", root=root, train_list="train", val_list=None)
    train, _ = build_datasets(data)
    return {
        name: {train.classes[number] for number in np.flatnonzero(row)}
        for name, row in zip(train.ids, train.labels, strict=True)  # type: ignore[call-overload]
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def task(image: str, *choices: str, kind: str = "choices") -> dict[str, Any]:
    results = [{"type": kind, "value": {kind: [choice]}} for choice in choices]
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": results}]}


def test_label_studio_s_choices_and_regions(root: Path, tmp_path: Path) -> None:
    tasks = [
        task("/data/upload/1/1a2b3c4d-one.jpg", "cat"),
        task("/data/local-files/?d=deep/two.png", "cat", "hot dog", kind="rectanglelabels"),
        task("s3://bucket/photos/three%20three.jpg", "hot dog"),
        task("http://localhost/four.JPG"),
    ]
    assert run(write(tmp_path / "tasks.json", tasks), root, "--empty", "background") == EXPECTED


def test_label_studio_s_short_form(root: Path, tmp_path: Path) -> None:
    tasks = [
        {"image": "/data/upload/1/one.jpg", "id": 1, "choice": "cat", "annotator": 1, "created_at": "2026"},
        {"image": "deep/two.png", "id": 2, "choice": {"choices": ["cat", "hot dog"]}},
        {"image": "three three.jpg", "id": 3, "box": [{"x": 1, "rectanglelabels": ["hot dog"]}]},
        {"image": "four.JPG", "id": 4, "lead_time": 1.0},
    ]
    assert run(write(tmp_path / "tasks.json", tasks), root, "--empty", "background") == EXPECTED


def test_our_own_json(root: Path, tmp_path: Path) -> None:
    entries = [{"image": name, "labels": sorted(labels)} for name, labels in EXPECTED.items()]
    assert run(write(tmp_path / "mine.json", entries), root) == EXPECTED


def test_cvat_s_tags_and_shapes(root: Path, tmp_path: Path) -> None:
    text = """<?xml version="1.0" encoding="utf-8"?><annotations><meta><task><labels>
    <label><name>hot dog</name></label><label><name>cat</name></label></labels></task></meta>
    <image id="0" name="one.jpg"><tag label="cat"/></image>
    <image id="1" name="deep/two.png"><tag label="cat"/><box label="hot dog" xtl="0"/><box label="cat"/></image>
    <image id="2" name="three three.jpg"><polygon label="hot dog" points="0,0"/></image>
    <image id="3" name="four.JPG"></image></annotations>"""
    assert run(write(tmp_path / "annotations.xml", text), root, "--empty", "background") == EXPECTED
    assert (root / "classes.txt").read_text() == "hot dog\ncat\n"  # in CVAT's order


def test_cvat_s_masks_become_masks_and_labels(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cvat"
    (folder / "SegmentationClass/deep").mkdir(parents=True)
    write(
        folder / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:250,0,9::\nhot dog:1,2,3::\n"
    )
    for name, labels in EXPECTED.items():
        mask = np.zeros((4, 6, 3), np.uint8)
        for row, label in enumerate(sorted(labels)):
            mask[row] = (250, 0, 9) if label == "cat" else (1, 2, 3)
        Image.fromarray(mask).save((folder / "SegmentationClass" / name).with_suffix(".png"))
    assert run(folder, root) == EXPECTED
    _, val = build_datasets(DataConfig(dataset="own", root=root, train_list="train", val_list="train"))
    mask = val.mask(list(val.ids).index("deep/two.png"))  # type: ignore[call-overload]
    assert mask is not None
    assert mask[:, 0].tolist() == [1, 2, 0, 0]
    Image.fromarray(np.full((4, 6, 3), 77, np.uint8)).save(folder / "SegmentationClass/one.png")
    (root / "train.csv").unlink()
    (root / "masks").rename(tmp_path / "masks")
    with pytest.raises(UserError, match="holds the colour #4d4d4d"):
        run(folder, root)
    assert not (root / "masks").exists()


def test_ms_coco_s_form_without_outlines(root: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(PICTURES)],
        "categories": [{"id": 0, "name": "animals"}, {"id": 7, "name": "hot dog"}, {"id": 9, "name": "cat"}],
        "annotations": [{"image_id": image, "category_id": label} for image, label in [(0, 9), (1, 9), (1, 7), (2, 7)]],
    }
    assert run(write(tmp_path / "coco.json", content), root, "--empty", "background") == EXPECTED
    assert (root / "classes.txt").read_text() == "hot dog\ncat\n"


def test_folders_named_by_class(root: Path) -> None:
    images = root / "images"
    for name, folder in (("one.jpg", "cat"), ("three three.jpg", "hot dog/more"), ("four.JPG", "background")):
        (images / folder).mkdir(parents=True)
        (images / name).rename(images / folder / name)
    (images / "deep/two.png").unlink()
    found = run(images, root)
    assert found == {"cat/one.jpg": {"cat"}, "hot dog/more/three three.jpg": {"hot dog"}, "background/four.JPG": set()}


TABLES = {
    "a column per class": "image,cat,hot dog\none.jpg,1,0\ndeep/two.png,1,1\nthree three.jpg,0,1\nfour.JPG,0,0\n",
    "pandas with its index": ",filename,cat,hot dog\n"
    "0,one.jpg,1.0,0.0\n1,two.png,1.0,1.0\n2,three three.jpg,0.0,1.0\n3,four.JPG,0.0,0.0\n",
    "Excel's yes and no": "Picture;Photographer;Cat;Hot dog\n"
    "one.jpg;Ann;x;\ndeep\\two.png;Bob;x;x\nthree three.jpg;Ann;;x\nfour.JPG;;;\n",
    "a row per label": "path,label\none.jpg,cat\ndeep/two.png,cat\ndeep/two.png,hot dog\nthree three.jpg,hot dog\n"
    "four.JPG,\n",
    "labels in one cell": 'filename,tags\none.jpg,cat\ntwo.png,"cat, hot dog"\nthree three.jpg,hot dog\nfour.JPG,\n',
    "pandas' lists": "image,labels\none.jpg,['cat']\ntwo.png,\"['cat', 'hot dog']\"\n"
    "three three.jpg,['hot dog']\nfour.JPG,[]\n",
    "Label Studio's table": 'id,image,choice\n1,/data/upload/1/0a1b2c3d-one.jpg,cat\n'
    '2,two.png,"{""choices"": [""cat"", ""hot dog""]}"\n3,three three.jpg,hot dog\n4,four.JPG,\n',
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_all_forms(root: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(write(tmp_path / "labels.csv", TABLES[case]), root)
    assert {name: {label.lower() for label in labels} for name, labels in found.items()} == EXPECTED
    printed = capsys.readouterr().out
    assert "no class: 1 pictures" in printed
    assert f"next: fsr-fast data check {root}" in printed


def test_a_workbook_of_excel(root: Path, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in TABLES["a column per class"].splitlines():
        book.active.append([int(cell) if cell.isdigit() else cell for cell in line.split(",")])
    book.save(tmp_path / "labels.xlsx")
    assert run(tmp_path / "labels.xlsx", root) == EXPECTED


@pytest.mark.parametrize("line", ["cat,hot dog\n", "cat\thot dog\n"])
def test_a_list_of_classes_that_is_there_keeps_its_order(root: Path, tmp_path: Path, line: str) -> None:
    write(root / "classes.txt", "zebra\nhot dog\ncat\n")
    assert run(write(tmp_path / "labels.csv", TABLES["a column per class"]), root) == EXPECTED
    assert (root / "classes.txt").read_text() == "zebra\nhot dog\ncat\n"


REFUSED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "pictures without a word": (
        "a.xml",
        '<annotations><image name="one.jpg"><tag label="cat"/></image><image name="four.JPG"/></annotations>',
        ("says nothing about 1 of 2 pictures", "'four.JPG'", "--empty background", "--empty skip"),
    ),
    "missing pictures": (
        "a.csv",
        "image,label\none.jpg,cat\nfive.jpg,cat\nsix.jpg,cat\n",
        ("2 of 3 pictures are not in", "'five.jpg'"),
    ),
    "two places for the picture": (
        "a.csv",
        "filename,path,label\none.jpg,one.jpg,cat\n",
        ("filename or path", "--image-column filename"),
    ),
    "two separators": (
        "a.csv",
        "image;x,label\none.jpg;x,cat\n",
        ("can be split by commas", "or by semicolons", "--separator"),
    ),
    "no labels": ("a.csv", "image,size\none.jpg,77\n", ("no column of labels", "['image', 'size']")),
    "no JSON": ("a.json", "[{", ("not valid JSON",)),
    "deep JSON": ("a.json", "[" * 100_000, ("not valid JSON",)),
    "another JSON": ("a.json", {"a": 1}, ("not a known format", "Label Studio")),
    "no XML": ("a.xml", "<annotations>", ("not valid XML",)),
    "another XML": ("a.xml", "<a/>", ("expected CVAT's XML",)),
    "another class": ("a.csv", "image,label\none.jpg,cow\n", ("classes.txt: lacks 'cow'",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused_and_writes_nothing(root: Path, tmp_path: Path, case: str) -> None:
    name, content, fragments = REFUSED[case]
    write(root / "classes.txt", "cat\n")
    source = write(tmp_path / name, content)
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as caught:
        run(source, root)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert sorted(root.rglob("*")) == before


def test_pictures_without_a_word_may_be_left_out(root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.xml", REFUSED["pictures without a word"][1])
    assert run(source, root, "--empty", "skip") == {"one.jpg": {"cat"}}


def test_equal_names_in_two_folders_are_refused(root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(root / "images/two.png")
    with pytest.raises(UserError, match=r"'x/two\.png' can mean deep/two\.png or two\.png"):
        run(write(tmp_path / "a.csv", "image,label\nx/two.png,cat\n"), root)
    assert run(write(tmp_path / "b.csv", "image,label\ndeep/two.png,cat\n"), root) == {"deep/two.png": {"cat"}}


def test_a_table_that_is_there_is_kept(root: Path, tmp_path: Path) -> None:
    write(root / "train.csv", "mine")
    with pytest.raises(UserError, match=r"train\.csv exists"):
        run(write(tmp_path / "a.csv", "image,label\none.jpg,cat\n"), root)
    assert (root / "train.csv").read_text() == "mine"
