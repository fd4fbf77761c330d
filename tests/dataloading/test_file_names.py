"""Names of files in lists and folders as people have them, and classes.txt."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.layout import IMAGE_ENDINGS
from fsr_fast.errors import UserError
from tests.dataloading.people import config, said, train_split, voc_config

# --- names of files


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)  # files are told by their content
@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_every_ending_is_found_in_any_capitals(mydata: Path, ending: str, change: Callable[[str], str]) -> None:
    path = mydata / "images" / f"photo{change(ending)}"
    known = {".tif": "TIFF", ".jpg": "JPEG", ".npy": "PNG", ".dcm": "PNG"}
    Image.new("RGB", (8, 6), "#405060").save(path, known.get(ending))
    for name in ("photo", path.name):
        (mydata / "train.csv").write_text(f"image,labels\n{name},cat\n")
        train, _ = build_datasets(config(mydata, negatives=False))
        assert train.image_path(0) == path
        assert train.image(0).size == (8, 6)


def test_capitals_of_the_list_may_differ_and_it_is_said(mydata: Path) -> None:
    (mydata / "images/a.jpg").rename(mydata / "images/a.JPG")
    split = train_split(mydata)
    assert split.files.image_path("a.jpg").name == "a.JPG"
    assert said(split, "spelt differently in the list")


def test_accents_may_be_composed_otherwise(mydata: Path) -> None:
    (mydata / "images/c.jpg").rename(mydata / "images" / unicodedata.normalize("NFD", "Käfer.jpg"))
    (mydata / "train.csv").write_text("image,labels\n" + unicodedata.normalize("NFC", "Käfer.jpg") + ",cat\n")
    assert build_datasets(config(mydata))[0].image(0).size == (8, 6)


def test_a_name_that_fits_two_files_is_refused_with_both(mydata: Path) -> None:
    Image.new("RGB", (8, 6)).save(mydata / "images/a.png")
    (mydata / "train.csv").write_text("image,labels\na,cat\n")
    with pytest.raises(UserError, match=r"'a' can mean a\.jpg or a\.png; write the extension"):
        build_datasets(config(mydata))


def test_a_mask_may_keep_the_ending_of_its_picture(mydata: Path) -> None:
    (mydata / "masks/a.png").rename(mydata / "masks/a.jpg.PNG")
    assert build_datasets(config(mydata))[1].mask(0) is not None


def test_a_missing_file_names_the_one_that_is_there(mydata: Path) -> None:
    (mydata / "train.csv").write_text("image,labels\nA.png,cat\n")
    with pytest.raises(UserError, match=r"no image for the id 'A\.png'.*there is .*a\.jpg: spell its name like that"):
        build_datasets(config(mydata))


def test_a_folder_of_links_needs_the_root_of_its_store(mydata: Path, tmp_path: Path) -> None:
    store = tmp_path / "store/ab"
    store.mkdir(parents=True)
    for path in [*(mydata / "images").rglob("*.jpg"), mydata / "masks/a.png"]:
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    with pytest.raises(UserError, match=r"symbolic link that leads out of .*--data\.allow_links '\[.*store/ab\]'"):
        build_datasets(config(mydata))
    with pytest.raises(UserError, match="symbolic link that leads out of"):
        build_datasets(config(mydata, allow_links=[tmp_path / "other"]))
    train, val = build_datasets(config(mydata, allow_links=[tmp_path / "store"]))
    assert train.image(0).size == (8, 6)
    assert val.mask(0) is not None


def test_a_store_does_not_open_its_neighbours(mydata: Path, tmp_path: Path) -> None:
    (tmp_path / "store-secret").mkdir()
    (mydata / "images/a.jpg").rename(tmp_path / "store-secret/a.jpg")
    (mydata / "images/a.jpg").symlink_to(tmp_path / "store-secret/a.jpg")
    with pytest.raises(UserError, match="leads out"):
        build_datasets(config(mydata, allow_links=[tmp_path / "store"]))


# --- lists


def test_lists_of_the_deeplab_kind_name_image_and_mask(folder: Path) -> None:
    (folder / "SegmentationClassAug").rename(folder / "Masks")
    for name in ("train_aug", "val"):
        path = folder / f"ImageSets/Segmentation/{name}.txt"
        names = path.read_text().split()
        path.write_text("".join(f"/JPEGImages/{name}.jpg /Masks/{name}.png\n" for name in names))
    train, val = build_datasets(voc_config(folder))
    assert list(train.ids) == ["one.jpg", "two.jpg", "three.jpg", "four.jpg"]
    assert train.labels.sum() == 6
    assert val.mask(0) is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/JPEGImages/one.jpg /SegmentationClassAug/two.png", "names two pictures"),
        ("JPEGImages/one.jpg SegmentationClass/one.png", "masks are in SegmentationClass and SegmentationClassAug"),
    ],
)
def test_a_list_of_pairs_that_do_not_belong_together_is_refused(folder: Path, line: str, message: str) -> None:
    path = folder / "ImageSets/Segmentation/train_aug.txt"
    path.write_text(f"{line}\n/JPEGImages/two.jpg /SegmentationClassAug/two.png\n")
    with pytest.raises(UserError, match=message):
        build_datasets(voc_config(folder))


@pytest.mark.parametrize("labels", ["xml", "csv", "masks"])
def test_ids_may_carry_the_ending_of_the_image(folder: Path, labels: str) -> None:
    plain, _ = build_datasets(voc_config(folder, labels=labels))
    for name in ("train_aug", "val"):
        path = folder / f"ImageSets/Segmentation/{name}.txt"
        path.write_text("".join(f"{name}.jpg\r\n" for name in path.read_text().split()))
    train, val = build_datasets(voc_config(folder, labels=labels))
    np.testing.assert_array_equal(train.labels, plain.labels)
    assert val.mask(0) is not None


@pytest.mark.parametrize(
    "text", [b'<?xml version="1.0" encoding="utf-7"?><a/>', b'<?xml version="1.0" encoding="nonsense"?><a/>']
)
def test_xml_in_an_odd_encoding_is_one_error(folder: Path, text: bytes) -> None:
    (folder / "Annotations/two.xml").write_bytes(text)
    with pytest.raises(UserError, match=r"two\.xml: not valid XML"):
        build_datasets(voc_config(folder, labels="xml"))


def test_deep_json_is_one_error(mydata: Path) -> None:
    (mydata / "train.csv").unlink()
    (mydata / "train.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"train\.json: not valid JSON"):
        train_split(mydata)


# --- classes


@pytest.mark.parametrize("name", ["background", "Background", "_background_"])
def test_the_background_is_no_class(mydata: Path, name: str) -> None:
    (mydata / "classes.txt").write_text(f"cat\n\n{name}\n")
    with pytest.raises(UserError, match=rf"classes\.txt, line 3: '{name}' is not a class"):
        train_split(mydata)
    with pytest.raises(UserError, match=rf"data\.classes: '{name}' is not a class"):
        build_datasets(config(mydata, classes=[name, "cat", "dog", "potted plant"]))
