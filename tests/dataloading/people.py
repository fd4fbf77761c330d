"""A small data set of own pictures, as people have it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.datasets import open_split
from fsr_fast.dataloading.layout import Split

OWN_CLASSES = ("cat", "dog", "potted plant")
SHOWN = {"a.jpg": ["cat"], "in/b.jpg": ["cat", "dog"], "c.jpg": ["potted plant"], "d.jpg": []}


def table(separator: str = ",", between: str = " ", line: str = "\n") -> str:
    rows = ["image" + separator + "labels"]
    for name, shown in SHOWN.items():
        labels = between.join(label.replace(" ", "_") for label in shown)
        rows.append(f'{name}{separator}"{labels}"' if between.strip() else f"{name}{separator}{labels}")
    return line.join(rows) + line


def write_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"dataset": "own", "root": root, "train_list": "train", "val_list": "val", **changes}
    )


def train_split(root: Path, **changes: Any) -> Split:
    return open_split(config(root, **changes), training=True, with_masks=True)


def shown(split: Split) -> dict[str, list[str]]:
    return {name: [split.classes[number] for number in split.labels(name)] for name in split.ids}


def said(split: Split, text: str) -> bool:
    return any(text in note for note in split.notes)


def voc_config(root: Path, **changes: Any) -> DataConfig:
    """Return the section that reads the folder in VOC layout."""
    return DataConfig.model_validate(
        {"dataset": "voc", "root": root, "classes": ("ant", "bee", "cat", "dog"), "labels": "csv", **changes}
    )
