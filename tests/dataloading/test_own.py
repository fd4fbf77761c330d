import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast.config import CONFIG_FOLDER, load_config
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets
from fsr_fast.dataloading.names import Names
from fsr_fast.errors import UserError
from tests.dataloading.people import config

SHOWN = {"one.jpg": ["red ant"], "deep er/zwei ä.png": ["bee", "red ant"], "three.JPG": ["bee"], "four": ["bee"]}


def write_table(path: Path, shown: dict[str, list[str]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps([{"image": name, "labels": labels} for name, labels in shown.items()]))
    else:
        rows = [f"{name},{' '.join(label.replace(' ', '_') for label in labels)}" for name, labels in shown.items()]
        path.write_text("image,labels\n" + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Four pictures in folders, two classes, masks for the one to validate on."""
    root = tmp_path / "mine"
    for name in SHOWN:
        path = root / "images" / (name if "." in name else f"{name}.jpeg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (9, 9, 9)).save(path)
    (root / "masks").mkdir()
    Image.fromarray(np.full((10, 20), 2, np.uint8)).save(root / "masks/four.png")
    (root / "classes.txt").write_text("red ant\nbee\n")
    write_table(root / "train.csv", {name: labels for name, labels in SHOWN.items() if name != "four"})
    write_table(root / "val.csv", {"four": ["bee"]})
    return root


def shown(dataset: SegmentationDataset) -> dict[str, list[str]]:
    return {
        name: sorted(dataset.classes[number] for number in np.flatnonzero(row))
        for name, row in zip(dataset.ids, dataset.labels, strict=True)
    }


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_tables_give_pictures_and_labels(own: Path, ending: str) -> None:
    (own / "train.csv").unlink()
    write_table(own / f"train{ending}", {name: labels for name, labels in SHOWN.items() if name != "four"})
    train, val = build_datasets(config(own))
    assert shown(train) | shown(val) == SHOWN
    assert train.classes == ("red ant", "bee")
    assert [train.image(index).size for index in range(3)] == [(20, 10)] * 3
    assert train.mask(0) is None
    mask = val.mask(0)
    assert mask is not None
    assert (mask == 2).all()


def test_masks_bear_the_names_of_their_pictures(own: Path) -> None:
    (own / "masks/deep er").mkdir()
    Image.fromarray(np.full((10, 20), 1, np.uint8)).save(own / "masks/deep er/zwei ä.png")
    mask = build_datasets(config(own))[0].mask(1)
    assert mask is not None
    assert (mask == 1).all()


def test_labels_may_come_from_the_masks(own: Path) -> None:
    shutil.copy(own / "val.csv", own / "train.csv")
    Image.fromarray(np.full((10, 20), 1, np.uint8)).save(own / "masks/four.png")
    train, _ = build_datasets(config(own, labels="masks"))
    assert shown(train) == {"four": ["red ant"]}


def test_classes_of_the_configuration_go_before_the_file(own: Path) -> None:
    train, _ = build_datasets(config(own, classes=("bee", "red ant")))
    assert train.classes == ("bee", "red ant")
    np.testing.assert_array_equal(train.labels[0], [0, 1])


def test_a_table_may_stand_elsewhere(own: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "clean.csv", {"one.jpg": ["bee"]})
    assert shown(build_datasets(config(own, train_list=str(tmp_path / "clean.csv")))[0]) == {"one.jpg": ["bee"]}


def test_the_recipe_reads_own_pictures(own: Path) -> None:
    data = load_config(["--config", str(CONFIG_FOLDER / "own.yaml"), "--data.root", str(own)])[0].data
    train, val = build_datasets(data)
    assert shown(train) | shown(val) == SHOWN


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no images": (lambda f: shutil.rmtree(f / "images"), ["data.root", "no folder images", "train.csv"]),
    "no table": (lambda f: (f / "train.csv").unlink(), ["data.train_list", "train.csv does not exist"]),
    "no classes": (
        lambda f: (f / "classes.txt").unlink(),
        ["classes.txt", "one class name per line", "--data.classes cat,dog"],
    ),
    "empty table": (lambda f: write_table(f / "train.csv", {}), ["data.train_list", "names no picture"]),
    "unknown class": (
        lambda f: write_table(f / "train.csv", {"one.jpg": ["beee"]}),
        ["train.csv, line 2", "'beee'", "did you mean 'bee'?"],
    ),
    "missing picture": (
        lambda f: write_table(f / "train.csv", {"on.jpg": ["bee"]}),
        ["no image for the id 'on.jpg'", "images"],
    ),
    "picture outside": (
        lambda f: write_table(f / "train.csv", {"../train.csv": ["bee"]}),
        ["train.csv", "'../train.csv' leads out"],
    ),
    "picture twice": (
        lambda f: (f / "train.csv").write_text("image,labels\none.jpg,bee\none.jpg,bee\n"),
        ["train.csv, line 3", "has a row already"],
    ),
    "validation without mask": (
        lambda f: (f / "masks/four.png").unlink(),
        ["no mask for the id 'four'", "masks/four.png"],
    ),
    "JSON of another form": (
        lambda f: ((f / "train.csv").unlink(), (f / "train.json").write_text('{"one.jpg": ["bee"]}')),
        ["train.json: holds a dict", '[{"image": name'],
    ),
    "JSON entry of another form": (
        lambda f: (
            (f / "train.csv").unlink(),
            (f / "train.json").write_text('[{"image": "one.jpg", "labels": "bee"}]'),
        ),
        ["train.json, entry 1", '[{"image": name'],
    ),
    "no JSON": (
        lambda f: ((f / "train.csv").unlink(), (f / "train.json").write_text("[{]")),
        ["train.json: not valid JSON"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_named(own: Path, case: str) -> None:
    damage, fragments = BAD[case]
    damage(own)
    with pytest.raises(UserError) as error:
        build_datasets(config(own))
    for fragment in fragments:
        assert fragment in str(error.value)


def test_names_are_kept_as_they_are() -> None:
    given = ["", "a", "deep/ä one", "犬", "a" * 300]
    names = Names(given)
    assert (len(names), list(names), names[4]) == (5, given, given[4])
    assert list(names.take([3, 1])) == ["犬", "a"]
    with pytest.raises(IndexError):
        names[5]


def test_a_hundred_thousand_names_take_a_few_megabytes() -> None:
    tracemalloc.start()
    try:
        names = Names(f"COCO_train2014_{number:012d}" for number in range(100_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert names[99_999] == "COCO_train2014_000000099999"
    assert held < 4 * 2**20
