import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as outlines
from pycocotools.coco import COCO

from fsr_fast.config import CONFIG_FOLDER, DataConfig, load_config
from fsr_fast.dataloading.class_names import COCO_CLASSES
from fsr_fast.dataloading.datasets import build_datasets, open_split
from fsr_fast.errors import UserError
from tests.dataloading.conftest import shown

# Official ids: gaps after 11, 25, 28, …; 90 is the eightieth class.
CATEGORIES = {1: "person", 3: "car", 13: "stop sign", 90: "toothbrush"}
HEIGHT, WIDTH = 40, 60


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def crowd(left: int, right: int) -> dict[str, Any]:
    """Encode columns left to right as an uncompressed run-length code."""
    return {"size": [HEIGHT, WIDTH], "counts": [left * HEIGHT, (right - left) * HEIGHT, (WIDTH - right) * HEIGHT]}


OBJECTS = {  # image: (category, outline, crowd)
    "COCO_2": [(1, rectangle(10.3, 5.1, 50.7, 35.9), 0), (90, rectangle(20, 10, 30.5, 20.5), 0)],
    "COCO_1": [(13, [[3.0, 3.0, 20.5, 4.0, 12.25, 30.0], [40.0, 2.0, 55.0, 2.0, 47.0, 20.0]], 0)],
    "COCO_3": [(3, crowd(5, 40), 1), (1, rectangle(8, 8, 20, 20), 0), (1, rectangle(30, 8, 36, 20), 0)],
    "COCO_4": [],
}


def write_part(root: Path, part: str, names: list[str]) -> Path:
    """Write the images and the annotations of a part; return the annotation file."""
    (root / part).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, name in enumerate(names, 100):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * (number - 99), 20 * len(part), 0)).save(root / part / f"{name}.jpg")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1})
        for category, outline, is_crowd in OBJECTS[name]:
            code = outlines.frPyObjects(outline, HEIGHT, WIDTH)
            area = float(outlines.area(outlines.merge(code) if isinstance(code, list) else code))
            entry = {"image_id": number, "category_id": category, "segmentation": outline, "area": area}
            annotations.append({"id": len(annotations) + 1, "iscrowd": is_crowd, **entry})
    content = {
        "info": {"year": 2014},
        "licenses": [{"id": 1, "name": "none"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name, "supercategory": "thing"} for key, name in CATEGORIES.items()],
    }
    path = root / f"annotations/instances_{part}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A small MS COCO: three training images, one of them without objects, and two to validate on."""
    write_part(tmp_path, "train2014", ["COCO_2", "COCO_4", "COCO_1"])
    write_part(tmp_path, "val2014", ["COCO_3", "COCO_2"])
    return tmp_path


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"dataset": "coco", "root": root, "train_list": "train", "val_list": "val", **changes}
    )


def test_images_with_objects_are_listed_with_the_classes_of_their_objects(coco: Path) -> None:
    train, val = build_datasets(config(coco))
    assert shown(train) == {"COCO_1": {"stop sign"}, "COCO_2": {"person", "toothbrush"}}
    assert shown(val) == {"COCO_2": {"person", "toothbrush"}, "COCO_3": {"car", "person"}}  # the car is a crowd
    assert train.classes == COCO_CLASSES
    assert train.labels.shape == (2, 80)
    assert train.image(0).size == (WIDTH, HEIGHT)


def test_masks_hold_eighty_one_contiguous_values(coco: Path) -> None:
    mask = build_datasets(config(coco))[1].mask(0)
    assert mask is not None
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 80}


def test_masks_are_those_of_pycocotools_with_small_objects_above_large_ones(coco: Path) -> None:
    _, val = build_datasets(config(coco))
    official = COCO(str(coco / "annotations/instances_val2014.json"))
    for index, image in enumerate((101, 100)):
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        objects = official.loadAnns(official.getAnnIds(image))
        for item in sorted(objects, key=lambda item: -item["area"]):
            expected[official.annToMask(item) > 0] = COCO_CLASSES.index(CATEGORIES[item["category_id"]]) + 1
        mask = val.mask(index)
        assert mask is not None
        np.testing.assert_array_equal(mask, expected)
    assert mask is not None
    assert (mask[12, 10], mask[12, 25], mask[12, 50]) == (1, 3, 0)  # person above the crowd of cars


def test_training_keeps_no_outlines_unless_labels_come_from_them(coco: Path) -> None:
    assert build_datasets(config(coco))[0].mask(0) is None
    train, _ = build_datasets(config(coco, labels="masks"))
    assert shown(train) == {"COCO_1": {"stop sign"}, "COCO_2": {"person", "toothbrush"}}


def test_a_text_file_takes_some_of_the_images(coco: Path) -> None:
    (coco / "train.txt").write_text("COCO_1\n")
    train, _ = build_datasets(config(coco, train_list=str(coco / "train.txt")))
    assert tuple(train.ids) == ("COCO_1",)


def test_images_may_stand_below_jpegimages(coco: Path) -> None:
    (coco / "JPEGImages").mkdir()
    for part in ("train2014", "val2014"):
        (coco / part).rename(coco / "JPEGImages" / part)
    assert build_datasets(config(coco))[1].image(1).size == (WIDTH, HEIGHT)


def test_the_official_code_s_folders_are_read(tmp_path: Path) -> None:
    root = tmp_path / "COCO"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    rows = ["image,labels"]
    for part, name, value in (("train", "COCO_train2014_9", 10), ("val", "COCO_val2014_42", 80)):
        for folder, ending, colour in (("JPEGImages", "jpg", 128), ("SegmentationClass", "png", value)):
            (root / folder / f"{part}2014").mkdir(parents=True)
            Image.new("L", (9, 7), colour).save(root / folder / f"{part}2014/{name}.{ending}")
        (root / f"ImageSets/Segmentation/{part}.txt").write_text(f"{name}\n")
        rows.append(f"{name},{COCO_CLASSES[value - 1].replace(' ', '_')}")
    (root / "labels.csv").write_text("\n".join(rows))
    train, val = build_datasets(config(root))
    assert shown(train) == {"COCO_train2014_9": {"traffic light"}}
    mask = val.mask(0)
    assert mask is not None
    assert (mask == 80).all()
    assert val.image(0).size == (9, 7)


@pytest.mark.parametrize("recipe", ["coco_vit_b", "coco_official"])
def test_the_recipes_read_ms_coco_as_it_is(coco: Path, recipe: str) -> None:
    data = load_config(["--config", str(CONFIG_FOLDER / f"{recipe}.yaml"), "--data.root", str(coco)])[0].data
    train, val = build_datasets(data)
    assert (tuple(train.ids), tuple(val.ids), len(train.classes)) == (("COCO_1", "COCO_2"), ("COCO_2", "COCO_3"), 80)


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


BAD: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "no such part": (
        lambda a: None,
        {"train_list": "trian"},
        ["data.train_list", "instances_trian", "did you mean 'train'"],
    ),
    "broken JSON": (lambda a: a.write_text('{"images": ['), {}, ["instances_train2014.json", "not valid JSON"]),
    "a list": (lambda a: a.write_text("[]"), {}, ["instances_train2014.json", "images, annotations and categories"]),
    "captions": (lambda a: change(a, annotations=[{"image_id": 100, "caption": "a cat"}]), {}, ["instances file"]),
    "without images": (lambda a: change(a, images=None), {}, ["instances_train2014.json", "instances file"]),
    "unknown image": (
        lambda a: change(a, annotations=[{"image_id": 7, "category_id": 1, "segmentation": [], "area": 1}]),
        {},
        ["instances_train2014.json", "KeyError: 7"],
    ),
    "other classes": (
        lambda a: change(a, categories=[{"id": key, "name": f"{name}s"} for key, name in CATEGORIES.items()]),
        {},
        ["unknown class 'persons'", "did you mean 'person'?"],
    ),
    "a name that leads out": (
        lambda a: a.write_text(a.read_text().replace("COCO_1.jpg", "../COCO_1.jpg")),
        {},
        ["'../COCO_1' leads out"],
    ),
    "missing images": (
        lambda a: (a.parent.parent / "train2014").rename(a.parent.parent / "elsewhere"),
        {},
        ["data.root", "no folder train2014"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_are_named(coco: Path, case: str) -> None:
    damage, changes, fragments = BAD[case]
    damage(coco / "annotations/instances_train2014.json")
    with pytest.raises(UserError) as error:
        build_datasets(config(coco, **changes))
    for fragment in fragments:
        assert fragment in str(error.value)


WHOLE, FAR = HEIGHT * WIDTH, 1e9
HOSTILE = {
    "no size": {"counts": [1, 2], "size": [3]},
    "rubbish": {"counts": "rubbish", "size": [HEIGHT, WIDTH]},
    "another size": {"counts": [0, 25 * 10**8], "size": [50_000, 50_000]},
    "runs beyond the picture": {"counts": [0, 10 * WHOLE], "size": [HEIGHT, WIDTH]},
    "runs beyond the picture, compressed": {"counts": "0PPPP4", "size": [HEIGHT, WIDTH]},
    "negative runs": {"counts": [0, -WHOLE, 2 * WHOLE], "size": [HEIGHT, WIDTH]},
    "far away": [[0.0, 0.0, FAR, 0.0, FAR, FAR, 0.0, FAR]],
    "half a point": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]],
    "text": [["a", "b", "c", "d", "e", "f"]],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_outline_that_cannot_be_drawn_is_named(coco: Path, case: str) -> None:
    path = coco / "annotations/instances_val2014.json"
    change(path, annotations=[{"image_id": 100, "category_id": 1, "segmentation": HOSTILE[case], "area": 5.0}])
    _, val = build_datasets(config(coco))
    with pytest.raises(UserError, match=r"instances_val2014\.json: an outline of 'COCO_3' cannot be drawn"):
        val.mask(0)


def test_outlines_without_an_area_are_left_out_and_said(coco: Path) -> None:
    path = coco / "annotations/instances_val2014.json"
    sound = {"image_id": 100, "category_id": 3, "segmentation": rectangle(2, 2, 20, 20), "area": 5.0}
    flat = [
        sound | {"category_id": 1, "segmentation": outline, "area": 1.0} for outline in ([], [[1.0, 2.0, 3.0, 4.0]])
    ]
    change(path, annotations=[*flat, sound])
    split = open_split(config(coco), training=False, with_masks=True)
    mask = split.files.mask("COCO_3")
    assert mask is not None
    assert set(np.unique(mask)) == {0, COCO_CLASSES.index("car") + 1}
    assert any("outlines without an area" in note and "COCO_3" in note for note in split.notes)


def test_compressed_run_lengths_are_drawn_as_pycocotools_does(coco: Path) -> None:
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[3:17, 5:50], truth[20:22, ::3] = 1, 1
    code = outlines.encode(np.asfortranarray(truth))
    outline = {"size": list(code["size"]), "counts": code["counts"].decode()}
    path = coco / "annotations/instances_val2014.json"
    change(path, annotations=[{"image_id": 100, "category_id": 1, "segmentation": outline, "area": 5.0}])
    np.testing.assert_array_equal(build_datasets(config(coco))[1].mask(0), truth)


@pytest.mark.parametrize("ending", [".JPG", ".png"])
def test_files_are_called_as_the_annotations_write_them(coco: Path, ending: str) -> None:
    path = coco / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        old = coco / "train2014" / image["file_name"]
        image["file_name"] = old.stem + ending
        old.rename(old.with_suffix(ending))
    path.write_text(json.dumps(content))
    train, _ = build_datasets(config(coco))
    assert [train.image_path(index).name for index in range(2)] == [f"COCO_1{ending}", f"COCO_2{ending}"]
    assert list(train.ids) == ["COCO_1", "COCO_2"]


def test_files_that_differ_in_the_ending_alone_are_two_images(coco: Path) -> None:
    path = coco / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"][1]["file_name"] = "COCO_2.png"  # was COCO_4, without objects
    path.write_text(json.dumps(content))
    (coco / "train2014/COCO_4.jpg").rename(coco / "train2014/COCO_2.png")
    train, _ = build_datasets(config(coco, negatives=True))
    assert list(train.ids) == ["COCO_1", "COCO_2.jpg", "COCO_2.png"]
    assert train.labels.sum(1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("negatives", [True, False, "auto"])
def test_images_without_objects_join_the_training_list_by_option(coco: Path, negatives: Any) -> None:
    train, val = build_datasets(config(coco, negatives=negatives))
    assert ("COCO_4" in train.ids) == (negatives is True)
    assert len(val) == 2


@pytest.mark.parametrize("content", ['{"info": ' + "[" * 100_000, '{"images": [], "area": NaN}', '{"images": ['])
def test_what_is_no_json_is_one_error(coco: Path, content: str) -> None:
    (coco / "annotations/instances_train2014.json").write_text(content)
    with pytest.raises(UserError, match=r"instances_train2014\.json: not valid JSON"):
        build_datasets(config(coco))
