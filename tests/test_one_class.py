"""A set of one class, from pictures with and without it: trained, scored and labelled from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast import cli
from tests import helpers


@pytest.fixture
def cracks(tmp_path: Path) -> Path:
    """Eight pictures, every second one of background alone; masks drawn in black and white."""
    root = tmp_path / "cracks"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    draws, rows = np.random.default_rng(0), []
    for number in range(8):
        picture, mask = draws.integers(90, 160, (40, 36, 3), dtype=np.uint8), np.zeros((40, 36), np.uint8)
        if number % 2:
            picture[18:22], mask[18:22] = 20, 255
        Image.fromarray(picture).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        rows.append(f"{number}.png,{'crack' if number % 2 else ''}\n")
    (root / "classes.txt").write_text("crack\n")
    for name, part in (("train", rows[:6]), ("val", rows[6:])):
        (root / f"{name}.csv").write_text("image,labels\n" + "".join(part))
    return root


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_set_of_one_class_is_trained_scored_and_labelled(cracks: Path, tmp_path: Path, engine: str) -> None:
    own = {"dataset": "own", "train_list": "train", "val_list": "val", "classes": None, "labels": "auto"}
    recipe = helpers.values({"data": own, "run": {"engine": engine}}, root=cracks, output=tmp_path / "run")
    config = helpers.write_config(tmp_path / "recipe.yaml", recipe)
    cli.dispatch(["train", "--config", str(config)])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for kind in ("pseudo", "seg"):
        scores = summary["results"][kind]["classes"]
        assert set(scores) == {"background", "crack"}
        assert scores["crack"]["iou"] is not None  # 255 counts as the class
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if "loss" in line)
    cli.dispatch(["pseudo-labels", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "labels")])
    for number in range(0, 6, 2):
        with Image.open(tmp_path / f"labels/labels/{number}.png") as labels:
            assert not np.asarray(labels).any()
