"""`fsr-fast data check` on data sets with one fault of each kind planted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from fsr_fast.commands.data import main
from fsr_fast.config import DataConfig
from fsr_fast.dataloading.detect import default_lists, detect_dataset
from fsr_fast.dataloading.findings import KINDS
from fsr_fast.errors import UserError
from tests.dataloading import people
from tests.dataloading.conftest import CLASSES, write_mask
from tests.dataloading.test_coco import coco  # noqa: F401 (a fixture)
from tests.dataloading.test_own import own  # noqa: F401 (a fixture)

VOC = ("--classes", ",".join(CLASSES))


def check(*arguments: Any, report: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Run the check; return its exit code and its report."""
    path = report or Path(arguments[0]).parent / "report.json"
    code = 0
    try:
        main(["check", *map(str, arguments), "--json", str(path)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, json.loads(path.read_text())


def found(report: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(finding["kind"], finding["list"], finding["name"]) for finding in report["findings"]}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text().rstrip("\n") + f"\n{line}\n")


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def lists(folder: Path, name: str) -> Path:
    return folder / f"ImageSets/Segmentation/{name}.txt"


def mask_of(folder: Path, name: str) -> Path:
    return folder / f"SegmentationClassAug/{name}.png"


def image_of(folder: Path, name: str) -> Path:
    return folder / f"JPEGImages/{name}.jpg"


def link_outside(folder: Path) -> None:
    image_of(folder, "two").rename(folder.parent / "two.jpg")
    image_of(folder, "two").symlink_to(folder.parent / "two.jpg")


FAULTS: dict[str, tuple[Callable[[Path], object], set[tuple[str, str, str]]]] = {
    "nothing": (lambda f: None, set()),
    "name that leads out": (lambda f: append(lists(f, "train_aug"), "../one"), {("outside", "train", "../one")}),
    "link that leads out": (link_outside, {("outside", "train", "two")}),
    "name twice": (lambda f: append(lists(f, "train_aug"), "one"), {("listed-twice", "train", "one")}),
    "missing image": (lambda f: image_of(f, "two").unlink(), {("missing-image", "train", "two")}),
    "truncated image": (lambda f: os.truncate(image_of(f, "two"), 700), {("damaged-image", "train", "two")}),
    "zero-byte image": (lambda f: os.truncate(image_of(f, "five"), 0), {("damaged-image", "val", "five")}),
    "no row": (lambda f: replace(f / "labels.csv", "two,cat\n", ""), {("bad-label", "train", "two")}),
    "row without labels": (lambda f: replace(f / "labels.csv", "two,cat\n", "two\n"), {("bad-label", "train", "two")}),
    "row twice": (lambda f: append(f / "labels.csv", "two,cat"), {("bad-label", "train", "two")}),
    "unknown class": (lambda f: replace(f / "labels.csv", "two,cat", "two,catt"), {("bad-label", "train", "two")}),
    "no label": (
        lambda f: replace(f / "labels.csv", "two,cat", "two,"),
        {("no-label", "train", "two"), ("mask-not-in-label", "train", "two")},
    ),
    "missing mask": (lambda f: mask_of(f, "six").unlink(), {("missing-mask", "val", "six")}),
    "truncated mask": (lambda f: os.truncate(mask_of(f, "one"), 40), {("damaged-mask", "train", "one")}),
    "mask of colours": (
        lambda f: Image.new("RGBA", (30, 20)).save(mask_of(f, "six")),
        {("damaged-mask", "val", "six")},
    ),
    "mask with an unknown value": (
        lambda f: write_mask(mask_of(f, "six"), np.full((20, 30), 9, np.uint8)),
        {("damaged-mask", "val", "six")},
    ),
    "mask of another size": (
        lambda f: write_mask(mask_of(f, "two"), np.full((21, 30), 3, np.uint8)),
        {("mask-size", "train", "two")},
    ),
    "label that the mask lacks": (
        lambda f: replace(f / "labels.csv", "two,cat", "two,cat dog"),
        {("label-not-in-mask", "train", "two")},
    ),
    "class that the labels lack": (
        lambda f: replace(f / "labels.csv", "five,bee dog", "five,bee"),
        {("mask-not-in-label", "val", "five")},
    ),
    "the same file twice": (
        lambda f: shutil.copy(image_of(f, "two"), image_of(f, "four")),
        {("duplicate", "train", "four")},
    ),
    "the same pixels in another format": (
        lambda f: (Image.open(image_of(f, "one")).save(f / "JPEGImages/four.png"), image_of(f, "four").unlink()),
        {("duplicate", "train", "four")},
    ),
    "a validation image in training": (
        lambda f: shutil.copy(image_of(f, "five"), image_of(f, "three")),
        {("leak", "train", "three")},
    ),
}


@pytest.fixture
def animals(folder: Path) -> Path:
    """The six images without their XML: labels.csv is the source."""
    shutil.rmtree(folder / "Annotations")
    return folder


@pytest.mark.parametrize("case", FAULTS)
def test_every_planted_fault_is_found_and_nothing_else(
    animals: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = FAULTS[case]
    damage(animals)
    before = snapshot(animals)
    code, report = check(animals, *VOC)
    assert found(report) == expected
    assert code == (1 if expected else 0)
    printed = capsys.readouterr().out
    for kind, _, name in expected:
        assert KINDS[kind][:20] in printed
        assert f"\n{kind}: {name}: " in printed
    assert snapshot(animals) == before


def test_a_report_takes_the_place_of_one_of_the_same_data_set_alone(animals: Path, tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    check(animals, *VOC, report=path)
    image_of(animals, "two").unlink()
    assert found(check(animals, *VOC, report=path)[1]) == {("missing-image", "train", "two")}
    other = tmp_path / "other"
    shutil.copytree(animals, other)
    mine = tmp_path / "mine.json"
    for root, report, content in ((other, path, path.read_text()), (animals, mine, '["mine"]'), (animals, mine, "x")):
        report.write_text(content)
        with pytest.raises(UserError, match="exists and is not a report of"):
            main(["check", str(root), *VOC, "--json", str(report)])
        assert report.read_text() == content


def test_names_do_not_steer_the_terminal(animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(lists(animals, "train_aug"), "\x1b[2Jtwo")
    assert found(check(animals, *VOC)[1]) == {("outside", "train", "\x1b[2Jtwo")}
    printed = capsys.readouterr().out
    assert "\x1b[2J" not in printed
    assert "outside: \\x1b[2Jtwo: " in printed


def test_all_faults_at_once_are_found_and_the_clean_lists_have_none(animals: Path) -> None:
    names = [f"extra {number}" for number in range(8)]
    random = np.random.default_rng(1)
    for name in names:
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(image_of(animals, name))
        write_mask(mask_of(animals, name), np.full((20, 30), 1, np.uint8))
        append(lists(animals, "train_aug"), name)
        append(animals / "labels.csv", f"{name},ant")
    os.truncate(image_of(animals, names[0]), 300)
    image_of(animals, names[1]).unlink()
    replace(animals / "labels.csv", f"{names[2]},ant", f"{names[2]},ant bee")
    shutil.copy(image_of(animals, names[3]), image_of(animals, names[4]))
    shutil.copy(image_of(animals, "six"), image_of(animals, names[5]))
    write_mask(mask_of(animals, names[6]), np.full((30, 20), 1, np.uint8))
    append(lists(animals, "train_aug"), "one")
    append(lists(animals, "train_aug"), "../../outside")
    mask_of(animals, "five").unlink()
    clean = animals.parent / "clean"
    code, report = check(animals, *VOC, "--fix", clean)
    assert code == 1
    assert found(report) == {
        ("damaged-image", "train", names[0]),
        ("missing-image", "train", names[1]),
        ("label-not-in-mask", "train", names[2]),
        ("duplicate", "train", names[4]),
        ("leak", "train", names[5]),
        ("mask-size", "train", names[6]),
        ("listed-twice", "train", "one"),
        ("outside", "train", "../../outside"),
        ("missing-mask", "val", "five"),
    }
    assert (clean / "train_aug.txt").read_text().splitlines() == ["one", "two", "three", "four", names[3], names[7]]
    assert (clean / "val.txt").read_text() == "six\n"
    code, report = check(animals, *VOC, "--train", clean / "train_aug.txt", "--val", clean / "val.txt")
    assert (code, report["findings"]) == (0, [])
    assert report["lists"]["train"]["images"] == 6


def test_the_report_counts_images_masks_and_classes(animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = check(animals, *VOC)
    train, val = report["lists"]["train"], report["lists"]["val"]
    assert (train["images"], train["masks"], train["clean"]) == (4, 4, 4)
    assert train["classes"] == {"ant": 2, "bee": 2, "cat": 1, "dog": 1}
    assert (val["images"], val["classes"]) == (2, {"ant": 1, "bee": 1, "cat": 1, "dog": 1})
    printed = capsys.readouterr().out
    assert "| train | 4      | 0        | 4     | 1.50" in printed
    assert "nothing was found" in printed


def test_the_embedded_data_set_has_no_fault(creatures: DataConfig, tmp_path: Path) -> None:
    code, report = check(creatures.root, report=tmp_path / "report.json")
    assert (code, report["dataset"], report["findings"]) == (0, "synthetic", [])
    assert [report["lists"][part]["images"] for part in ("train", "val")] == [22, 7]


def test_kinds_may_be_accepted(animals: Path) -> None:
    replace(animals / "labels.csv", "two,cat", "two,cat dog")
    code, report = check(animals, *VOC, "--accept", "label-not-in-mask", "leak")
    assert (code, report["findings"]) == (0, [])


def test_clean_lists_overwrite_nothing(animals: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"val\.txt exists"):
        main(["check", str(animals), *VOC, "--fix", str(tmp_path)])
    assert (tmp_path / "val.txt").read_text() == "mine\n"
    assert not (tmp_path / "train_aug.txt").exists()


def test_two_clean_lists_of_one_name_are_refused(animals: Path, tmp_path: Path) -> None:
    lists = animals / "ImageSets/Segmentation"
    (tmp_path / "val.txt").write_text((lists / "train_aug.txt").read_text())
    options = ["--train", str(tmp_path / "val.txt"), "--fix", str(tmp_path / "clean")]
    with pytest.raises(UserError, match="both lists are called 'val'; rename one; nothing was written"):
        main(["check", str(animals), *VOC, *options])
    assert not (tmp_path / "clean").exists()


def test_own_pictures_without_a_row_are_found_and_clean_tables_keep_labels(own: Path) -> None:  # noqa: F811
    names = ("one.jpg", "deep er/zwei ä.png", "three.JPG", "four.jpeg")
    for number, name in enumerate(names):
        Image.new("RGB", (20, 10), (90 * number // 2, 0, 0)).save(own / "images" / name)
    assert check(own)[0] == 0
    Image.new("RGB", (5, 5), (1, 2, 3)).save(own / "images/deep er/forgotten.png")
    os.truncate(own / "images/three.JPG", 100)
    before = snapshot(own)
    code, report = check(own, "--fix", own.parent / "clean")
    assert code == 1
    assert found(report) == {("unlisted", "", "deep er/forgotten.png"), ("damaged-image", "train", "three.JPG")}
    assert snapshot(own) == before
    text = (own.parent / "clean/train.csv").read_text(encoding="utf-8")
    assert text == "image,labels\none.jpg,red_ant\ndeep er/zwei ä.png,bee red_ant\n"


def test_ms_coco_is_checked_by_its_annotations(coco: Path) -> None:  # noqa: F811
    assert check(coco, report=coco / "report.json")[0] == 0
    os.truncate(coco / "val2014/COCO_3.jpg", 50)
    Image.new("RGB", (7, 7)).save(coco / "train2014/COCO_1.jpg")
    code, report = check(coco, "--fix", coco / "clean", report=coco / "report.json")
    assert code == 1
    assert {("damaged-image", "val", "COCO_3"), ("mask-size", "train", "COCO_1")} <= found(report)
    assert (coco / "clean/train2014.txt").read_text() == "COCO_2\n"


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (shutil.rmtree, ["not a folder"]),
        (lambda f: shutil.rmtree(f / "JPEGImages"), ["not a known layout", "JPEGImages", "train.csv"]),
        (
            lambda f: [path.unlink() for path in f.glob("ImageSets/*/*.txt")],
            ["no list of images", "--train LIST", "fsr-fast data import"],
        ),
        (lambda f: lists(f, "val").write_text(""), ["val.txt is empty"]),
    ],
)
def test_what_cannot_be_checked_is_said(animals: Path, damage: Callable[[Path], object], fragments: list[str]) -> None:
    damage(animals)
    with pytest.raises(UserError) as caught:
        main(["check", str(animals), *VOC])
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_layouts_are_told_apart(folder: Path, coco: Path, own: Path) -> None:  # noqa: F811
    assert (detect_dataset(folder), default_lists(folder, "voc")) == ("voc", {"train": "train_aug", "val": "val"})
    assert (detect_dataset(coco), default_lists(coco, "coco")) == ("coco", {"train": "train", "val": "val"})
    assert (detect_dataset(own), default_lists(own, "own")) == ("own", {"train": "train", "val": "val"})
    (own / "val.csv").unlink()
    assert default_lists(own, "own") == {"train": "train"}


LEAK = ("--accept", "leak")  # the one picture to validate on is trained on, too


def test_what_was_inferred_is_said_and_written(mydata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mydata / "train.csv").write_bytes(people.table(";", line="\r\n").encode("utf-16"))
    code, report = check(mydata, *LEAK)
    assert code == 0
    printed = capsys.readouterr().out
    for note in ("train.csv: encoded as UTF-16", "train.csv: columns are separated by semicolons"):
        assert f"read as: {note}" in printed
        assert note in report["read_as"]


def test_the_command_that_comes_next_fits_a_data_set_without_masks(
    mydata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(mydata, *LEAK)
    assert f"next: fsr-fast train --config own --data.root {mydata}, or on a CPU" in capsys.readouterr().out
    (mydata / "val.csv").unlink()
    check(mydata)
    assert f"--data.root {mydata} --data.val_list none, or on a CPU" in capsys.readouterr().out


def test_the_balance_of_the_classes_is_shown_and_warned_of(mydata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mydata / "train.csv").write_text("image,labels\na.jpg,cat\nin/b.jpg,cat dog\nc.jpg,cat\n")
    _, report = check(mydata, "--accept", "unlisted", "leak")
    printed = capsys.readouterr().out
    assert "| cat          | 3              | 0" in printed
    assert "warning: every training image shows 'cat'" in printed
    assert report["lists"]["train"]["negatives"] == 0
    assert [text.split("'")[1] for text in report["warnings"]] == ["cat", "cat", "dog", "potted plant"]
    (mydata / "train.csv").write_text(people.table())
    _, report = check(mydata, *LEAK)
    assert report["lists"]["train"]["negatives"] == 1
    assert not any("every training image" in text for text in report["warnings"])


def test_an_empty_label_whose_mask_shows_a_class_is_found(mydata: Path) -> None:
    (mydata / "train.csv").write_text(people.table().replace("a.jpg,cat", "a.jpg,"))
    assert found(check(mydata, *LEAK)[1]) == {("mask-not-in-label", "train", "a.jpg")}


def test_pictures_that_one_network_does_not_take_with_the_others_are_found(
    mydata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(mydata / "images/c.jpg", np.arange(240, dtype=np.uint8).reshape(6, 8, 5), planarconfig="contig")
    code, report = check(mydata, *LEAK)
    assert (code, found(report)) == (1, {("channels", "train", "c.jpg")})
    assert report["findings"][0]["message"].startswith("5 channels, but most pictures are for model.in_chans 3; save")
    listed = "3 channels in 4 pictures (first: a.jpg), 5 channels in 1 picture (first: c.jpg)"
    assert f"warning: a network takes pictures of one kind (model.in_chans), but here are {listed}" in (
        capsys.readouterr().out
    )
    check(mydata, *LEAK, "--fix", mydata / "clean")
    assert "c.jpg" not in (mydata / "clean/train.csv").read_text()


def test_grey_pictures_among_colours_are_a_remark(mydata: Path) -> None:
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(mydata / "images/c.jpg")
    code, report = check(mydata, *LEAK)
    assert (code, report["findings"]) == (0, [])
    (remark,) = (note for note in report["read_as"] if "in_chans" in note)
    assert "1 channel in 1 picture (first: c.jpg), 3 channels in 4 pictures (first: a.jpg)" in remark


def test_channels_that_are_left_out_as_transparency_are_a_remark(mydata: Path) -> None:
    Image.new("RGBA", (8, 6), (1, 2, 3, 4)).save(mydata / "images/c.jpg", format="png")
    (remark,) = (note for note in check(mydata, *LEAK)[1]["read_as"] if "in_chans" in note)
    assert "4 channels in 1 picture (first: c.jpg); the last of 2 or 4 channels is taken for transparency" in remark


def test_the_command_that_comes_next_has_the_channels_of_the_pictures(
    mydata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = np.random.default_rng(0)
    for path in (mydata / "images").rglob("*.jpg"):
        tifffile.imwrite(path, draws.integers(0, 256, (6, 8, 5), dtype=np.uint8), planarconfig="contig")
    _, report = check(mydata, *LEAK)
    assert report["findings"] == []
    assert f"--data.root {mydata} --model.in_chans 5, or on a CPU" in capsys.readouterr().out


def test_a_name_that_fits_two_pictures_is_found(mydata: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(mydata / "images/c.png")
    (mydata / "train.csv").write_text(people.table().replace("c.jpg", "c"))
    assert ("two-files", "train", "c") in found(check(mydata, *LEAK)[1])


def test_a_clean_list_is_a_plain_table_with_the_names_of_the_files(mydata: Path, tmp_path: Path) -> None:
    (mydata / "images/a.jpg").rename(mydata / "images/a.JPG")
    (mydata / "train.csv").write_bytes(people.table(";", between=", ").replace("in/b", "in\\b").encode("utf-16"))
    before = snapshot(mydata)
    assert check(mydata, *LEAK, "--fix", tmp_path / "clean")[0] == 0
    expected = "image,labels\na.JPG,cat\nin/b.jpg,cat dog\nc.jpg,potted_plant\nd.jpg,\n"
    assert (tmp_path / "clean/train.csv").read_text() == expected
    assert snapshot(mydata) == before


def test_masks_in_black_and_white_are_one_remark_not_a_finding(mydata: Path) -> None:
    (mydata / "classes.txt").write_text("cat\n")
    (mydata / "train.csv").write_text("image,labels\na.jpg,cat\nin/b.jpg,\nc.jpg,\nd.jpg,\n")
    write_mask(mydata / "masks/a.png", np.full((6, 8), 255, np.uint8))
    code, report = check(mydata, *LEAK)
    assert (code, report["findings"]) == (0, [])
    assert sum("255 is read as 'cat'" in note for note in report["read_as"]) == 1
