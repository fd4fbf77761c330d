import itertools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fsr_fast.config import CONFIG_FOLDER, DataConfig, load_config
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets, open_split
from fsr_fast.errors import UserError
from tests.dataloading.conftest import CLASSES, SHOWN, shown, write_mask


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "voc", "root": root, "classes": CLASSES, **changes})


@pytest.mark.parametrize("source", ["xml", "csv", "masks"])
def test_every_source_gives_the_same_labels(folder: Path, source: str) -> None:
    train, val = build_datasets(config(folder, labels=source))
    expected = {name: {CLASSES[value - 1] for value in values} for name, values in SHOWN.items()}
    assert shown(train) | shown(val) == expected
    assert train.labels.dtype == np.float32
    assert (train.labels.shape, train.max_labels) == ((4, 4), 2)


def test_auto_takes_the_first_source_that_exists(folder: Path) -> None:
    def first_label() -> set[str]:
        return shown(build_datasets(config(folder))[0])["two"]

    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace("two,cat", "two,dog"))
    write_mask(folder / "SegmentationClassAug/two.png", np.full((20, 30), 1, np.uint8))
    assert first_label() == {"cat"}
    shutil.rmtree(folder / "Annotations")
    assert first_label() == {"dog"}
    (folder / "labels.csv").unlink()
    assert first_label() == {"ant"}


def test_masks_are_read_by_value_not_by_colour(folder: Path) -> None:
    train, _ = build_datasets(config(folder))
    mask = train.mask(0)
    assert mask is not None
    assert mask.dtype == np.uint8
    assert mask.shape == (20, 30)
    assert mask[0, 0] == 255
    assert mask[10, 6] == 1
    assert mask[10, 16] == 2
    assert mask[0, 10] == 0


def test_greyscale_masks_and_the_second_mask_folder_will_do(folder: Path) -> None:
    (folder / "SegmentationClass").mkdir()
    (folder / "SegmentationClassAug/five.png").unlink()
    Image.fromarray(np.full((20, 30), 3, np.uint8)).save(folder / "SegmentationClass/five.png")
    _, val = build_datasets(config(folder))
    masks = [val.mask(0), val.mask(1)]
    assert masks[0] is not None
    assert (masks[0] == 3).all()
    assert masks[1] is not None
    assert masks[1][10, 6] == 3


def test_training_needs_no_masks(folder: Path) -> None:
    (folder / "SegmentationClassAug/one.png").unlink()
    assert build_datasets(config(folder))[0].mask(0) is None


def test_a_subset_renumbers_its_classes_and_ignores_the_others(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train, val = build_datasets(config(folder, subset=("dog", "ant")))
    assert train.classes == ("dog", "ant")
    assert (tuple(train.ids), train.dropped) == (("one", "three"), 2)
    assert "2 of 4 training images" in caplog.text
    np.testing.assert_array_equal(train.labels, [[0, 1], [1, 1]])
    assert tuple(val.ids) == ("five", "six")
    mask = train.mask(0)
    assert mask is not None
    assert (mask[10, 6], mask[10, 16], mask[0, 0], mask[0, 10]) == (2, 255, 255, 0)


@pytest.mark.parametrize(
    ("second", "message"),
    [("fire_ant", "'fire ant' and 'fire_ant' are one name"), ("fire ant", "'fire ant' is listed twice")],
)
def test_class_names_that_labels_cannot_tell_apart_are_refused(folder: Path, second: str, message: str) -> None:
    data = config(folder, classes=("fire ant", second, "cat", "dog"), labels="csv")
    with pytest.raises(UserError, match=message):
        open_split(data, training=True, with_masks=False)


def test_names_of_the_public_data_sets() -> None:
    assert (len(VOC_CLASSES), len(set(VOC_CLASSES)), VOC_CLASSES[14]) == (20, 20, "person")
    assert (len(COCO_CLASSES), len(set(COCO_CLASSES)), COCO_CLASSES[9]) == (80, 80, "traffic light")


def test_coco_in_voc_layout_is_read_with_underscores_for_spaces(folder: Path) -> None:
    rows = ["image,labels", *(f"{name},traffic_light dog" for name in SHOWN)]
    (folder / "labels.csv").write_text("\n".join(rows))
    train, _ = build_datasets(config(folder, dataset="coco", classes=None, labels="csv"))
    assert shown(train)["one"] == {"traffic light", "dog"}


def test_ids_may_name_folders_and_hold_spaces(folder: Path) -> None:
    for place, ending in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png"), ("Annotations", "xml")):
        (folder / place / "deep").mkdir()
        (folder / place / f"one.{ending}").rename(folder / place / f"deep/ä one.{ending}")
    (folder / "ImageSets/Segmentation/train_aug.txt").write_text("deep/ä one\n", encoding="utf-8")
    train, _ = build_datasets(config(folder))
    assert train.image(0).size == (30, 20)
    assert train.mask(0) is not None


def write_list(folder: Path, text: str, name: str = "train_aug") -> None:
    (folder / f"ImageSets/Segmentation/{name}.txt").write_text(text)


def write_csv(folder: Path, text: str) -> None:
    (folder / "labels.csv").write_text(text)


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


ALL = "image,labels\n" + "".join(f"{name},ant\n" for name in SHOWN)
BAD: dict[str, tuple[Callable[[Path], object], dict[str, Any], list[str]]] = {
    "missing root": (shutil.rmtree, {}, ["data.root", "animals", "not a folder", "--data.root FOLDER"]),
    "another layout": (
        lambda f: shutil.rmtree(f / "JPEGImages"),
        {},
        ["data.root", "animals", "no folder JPEGImages", "expected JPEGImages, ImageSets/Segmentation"],
    ),
    "the folder above": (
        lambda f: move(f / "JPEGImages", f / "VOC2012/JPEGImages"),
        {},
        ["no folder JPEGImages", "did you mean", "animals/VOC2012?"],
    ),
    "missing list": (lambda f: None, {"train_list": "train_au"}, ["data.train_list", "train_au.txt", "'train_aug'"]),
    "missing validation list": (lambda f: None, {"val_list": "vall"}, ["data.val_list", "vall.txt", "'val'"]),
    "empty list": (
        lambda f: write_list(f, "\n \n"),
        {},
        ["data.train_list", "train_aug.txt", "empty", "one id per line"],
    ),
    "duplicate id": (lambda f: write_list(f, "one\ntwo\none\n"), {}, ["train_aug.txt", "'one'", "twice"]),
    "absolute id": (lambda f: write_list(f, "/etc/passwd\n"), {}, ["'/etc/passwd'", "leads out"]),
    "id above the root": (lambda f: write_list(f, "a/../../one\n"), {}, ["'a/../../one'", "leads out"]),
    "list that is not text": (
        lambda f: (f / "ImageSets/Segmentation/train_aug.txt").write_bytes(b"\xff\xd8\xff\xe0"),
        {},
        ["train_aug.txt", "not text in UTF-8"],
    ),
    "id without image": (
        lambda f: write_list(f, "one\nsevn\n"),
        {},
        ["JPEGImages", "no image for the id 'sevn'", ".jpg", "take the id off the list"],
    ),
    "validation id without mask": (
        lambda f: (f / "SegmentationClassAug/six.png").unlink(),
        {},
        ["no mask for the id 'six'", "SegmentationClassAug/six.png", "off the list"],
    ),
    "labels from missing masks": (
        lambda f: (f / "SegmentationClassAug/two.png").unlink(),
        {"labels": "masks"},
        ["no mask for the id 'two'"],
    ),
    "unknown class in CSV": (
        lambda f: write_csv(f, ALL.replace("two,ant", "two,ant catt")),
        {"labels": "csv"},
        ["labels.csv, line 3", "unknown class 'catt'", "did you mean 'cat'?"],
    ),
    "unknown class in XML": (
        lambda f: (f / "Annotations/two.xml").write_text("<a><object><name>dgo</name></object></a>"),
        {},
        ["two.xml", "unknown class 'dgo'", "did you mean 'dog'?"],
    ),
    "object without name": (
        lambda f: (f / "Annotations/two.xml").write_text("<a><object/></a>"),
        {},
        ["two.xml", "unknown class ''", "known are: ant, bee, cat, dog"],
    ),
    "broken XML": (
        lambda f: (f / "Annotations/two.xml").write_text("<a><object>"),
        {},
        ["two.xml", "not valid XML", "replace"],
    ),
    "missing XML": (lambda f: (f / "Annotations/two.xml").unlink(), {}, ["two.xml", "no such file", "data.labels"]),
    "missing CSV": (
        lambda f: (f / "labels.csv").unlink(),
        {"labels": "csv"},
        ["labels.csv", "no such file", "data.labels"],
    ),
    "CSV without header": (
        lambda f: write_csv(f, "one,ant\n"),
        {"labels": "csv"},
        ["labels.csv, line 1", "'one,ant'", "expected 'image,labels'"],
    ),
    "empty CSV": (lambda f: write_csv(f, ""), {"labels": "csv"}, ["labels.csv: is empty", "expected a header"]),
    "CSV with an unknown class behind a comma": (
        lambda f: write_csv(f, ALL.replace("two,ant", "two,t,ant")),
        {"labels": "csv"},
        ["labels.csv, line 3", "unknown class 't'"],
    ),
    "CSV with a row twice": (
        lambda f: write_csv(f, ALL + "two,bee\n"),
        {"labels": "csv"},
        ["labels.csv, line 8", "'two'", "keep one"],
    ),
    "CSV without a row": (
        lambda f: write_csv(f, ALL.replace("two,ant\n", "")),
        {"labels": "csv"},
        ["labels.csv", "no row for the image 'two'", "fsr-fast data check"],
    ),
    "CSV that is not text": (
        lambda f: (f / "labels.csv").write_bytes(b"image,labels\n\xff\xfe"),
        {"labels": "csv"},
        ["labels.csv", "UTF-8"],
    ),
    "image without label": (
        lambda f: write_csv(f, ALL.replace("two,ant", "two,")),
        {"labels": "csv"},
        ["train_aug.txt", "training image 'two' has no label", "1 of 4", "data.negatives true", "or false"],
    ),
    "unknown class in the subset": (lambda f: None, {"subset": ("ant", "be")}, ["data.subset", "'be'", "'bee'?"]),
    "class twice in the subset": (lambda f: None, {"subset": ("ant", "ant")}, ["data.subset", "'ant'", "twice"]),
    "empty subset": (lambda f: None, {"subset": ()}, ["data.subset", "expected 1 to 254"]),
    "class twice": (lambda f: None, {"classes": ("ant", "bee", "ant")}, ["data.classes", "'ant'", "twice"]),
    "nothing left by the subset": (
        lambda f: write_list(f, "two\nfour\n"),
        {"subset": ("dog",)},
        ["data.subset", "no training image", "dog"],
    ),
    "mask value beyond the classes": (
        lambda f: write_mask(f / "SegmentationClassAug/two.png", np.full((20, 30), 5, np.uint8)),
        {"labels": "masks"},
        ["two.png", "the value 5", "4 classes", "expected 0 to 4, or 255", "data.classes"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(folder: Path, case: str) -> None:
    damage, changes, fragments = BAD[case]
    damage(folder)
    with pytest.raises(UserError) as error:
        build_datasets(config(folder, **changes))
    for fragment in fragments:
        assert fragment in str(error.value)


def read_mask(dataset: SegmentationDataset) -> object:
    return dataset.mask(1)


def read_image(dataset: SegmentationDataset) -> object:
    return dataset.image(1)


DAMAGED: dict[str, tuple[Callable[[Path], object], Callable[[SegmentationDataset], object], list[str]]] = {
    "image that is no image": (
        lambda f: (f / "JPEGImages/two.jpg").write_bytes(b"no image"),
        read_image,
        ["two.jpg", "cannot be decoded", "replace the file"],
    ),
    "truncated image": (
        lambda f: os.truncate(f / "JPEGImages/two.jpg", 700),
        read_image,
        ["two.jpg", "cannot be decoded"],
    ),
    "image taken away": (
        lambda f: (f / "JPEGImages/two.jpg").unlink(),
        read_image,
        ["no image for the id 'two'"],
    ),
    "mask that is no image": (
        lambda f: (f / "SegmentationClassAug/two.png").write_bytes(b""),
        read_mask,
        ["two.png", "cannot be decoded"],
    ),
    "mask of colours": (
        lambda f: Image.new("RGB", (30, 20), "#80ff00").save(f / "SegmentationClassAug/two.png"),
        read_mask,
        ["two.png", "mode RGB", "#80ff00", "--data.mask_values"],
    ),
    "mask of another size": (
        lambda f: write_mask(f / "SegmentationClassAug/two.png", np.zeros((30, 20), np.uint8)),
        read_mask,
        ["two.png: 20 x 30 pixels", "its image has 30 x 20", "EXIF orientation"],
    ),
    "mask with an unknown value": (
        lambda f: write_mask(f / "SegmentationClassAug/two.png", np.full((20, 30), 9, np.uint8)),
        read_mask,
        ["two.png", "the value 9", "4 classes"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(folder: Path, case: str) -> None:
    damage, read, fragments = DAMAGED[case]
    train, _ = build_datasets(config(folder))
    damage(folder)
    with pytest.raises(UserError) as error:
        read(train)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("recipe", ["voc_vit_b", "voc_official"])
def test_the_recipes_read_pascal_voc_as_it_is(folder: Path, recipe: str) -> None:
    for path, name in zip(sorted((folder / "Annotations").glob("*.xml")), itertools.cycle(VOC_CLASSES), strict=False):
        path.write_text(f"<annotation><object><name>{name}</name></object></annotation>")
    data = load_config(["--config", str(CONFIG_FOLDER / f"{recipe}.yaml"), "--data.root", str(folder)])[0].data
    train, val = build_datasets(data)
    assert (len(train), len(val), train.classes) == (4, 2, VOC_CLASSES)


@pytest.mark.skipif("FSR_VOC_ANIMALS" not in os.environ, reason="FSR_VOC_ANIMALS names no folder of real photographs")
def test_real_photographs_with_a_subset() -> None:
    six = ("cat", "cow", "dog", "horse", "person", "sheep")
    train, val = build_datasets(DataConfig(dataset="voc", root=Path(os.environ["FSR_VOC_ANIMALS"]), subset=six))
    assert (len(train), len(val), train.classes) == (1454, 115, six)
    np.testing.assert_array_equal(train.labels.sum(0), [300, 263, 300, 320, 420, 300])
    np.testing.assert_array_equal(val.labels.sum(0), [24, 22, 24, 25, 30, 22])
    for index in range(0, len(val), 10):
        mask = val.mask(index)
        assert mask is not None
        assert mask.shape == val.image(index).size[::-1]
        assert set(np.unique(mask)) - {0, 255} <= set(np.flatnonzero(val.labels[index]) + 1)
