"""Small data sets to read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.datasets import SegmentationDataset
from fsr_fast.dataloading.stream import StreamLoader
from fsr_fast.dataloading.synthetic import generate
from tests.dataloading import people

CLASSES = ("ant", "bee", "cat", "dog")
SHOWN = {  # what the images of `folder` show, as mask values
    "one": (1, 2),
    "two": (3,),
    "three": (4, 1),
    "four": (2,),
    "five": (2, 4),
    "six": (3, 1),
}


def shown(dataset: SegmentationDataset) -> dict[str, set[str]]:
    """The classes that each image of a set shows, by its name."""
    return {
        name: {dataset.classes[number] for number in np.flatnonzero(row)}
        for name, row in zip(dataset.ids, dataset.labels, strict=True)
    }


@pytest.fixture(autouse=True)
def close_loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the loaders that a test has left: once they are garbage, each of their processes is waited for."""
    opened: list[StreamLoader] = []
    start = StreamLoader.__init__

    def listed(self: StreamLoader, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(StreamLoader, "__init__", listed)
    yield
    for loader in opened:
        loader.close()


@pytest.fixture(scope="session")
def creatures(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The embedded data set, with few images."""
    root = tmp_path_factory.mktemp("creatures") / "set"
    generate(root, train=22, val=7, processes=1)
    return DataConfig(dataset="synthetic", root=root, image_size=32, workers=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of four classes in VOC layout, with masks, XML and CSV: four to train on, two to validate on."""
    root = tmp_path / "animals"
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation", "Annotations"):
        (root / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = ["image,labels"]
    for name, shown in SHOWN.items():
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((20, 30), np.uint8)
        mask[:, :3] = 255
        for column, value in enumerate(shown):
            mask[5:15, 5 + 10 * column : 13 + 10 * column] = value
        write_mask(root / "SegmentationClassAug" / f"{name}.png", mask)
        names = [CLASSES[value - 1] for value in shown]
        objects = "".join(f"<object><name>{n}</name><part><name>head</name></part></object>" for n in names)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        rows.append(f"{name},{' '.join(names)}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("one\ntwo\nthree\nfour\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("five\nsix\n\n")
    return root


@pytest.fixture
def mydata(tmp_path: Path) -> Path:
    """Four pictures, the last of background alone, and a mask for the first."""
    root = tmp_path / "mydata"
    for number, name in enumerate(people.SHOWN):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (90, 9, 60 * number)).save(path)
    (root / "masks").mkdir()
    people.write_mask(root / "masks/a.png", np.ones((6, 8), np.uint8))
    (root / "classes.txt").write_text("\n".join(people.OWN_CLASSES))
    (root / "train.csv").write_text(people.table())
    (root / "val.csv").write_text("image,labels\na.jpg,cat\n")
    return root


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a palette PNG whose colours say nothing about the values."""
    image = Image.fromarray(mask, mode="P")
    image.putpalette([255 - value // 3 for value in range(768)])
    image.save(path)
