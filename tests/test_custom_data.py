"""Every command of docs/custom_data.md, in its order, as a new user would run them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fsr_fast import cli
from fsr_fast.dataloading.class_names import VOC_CLASSES
from fsr_fast.errors import UserError
from fsr_fast.reporting.tracking import read_metrics
from tests.dataloading.test_coco import write_part

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/custom_data.md"


def commands() -> list[str]:
    blocks = re.findall(r"```bash[^\n]*\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str) -> None:
    """Run a command: ours in this process, which has imported everything, others in a shell."""
    if not command.startswith("fsr-fast "):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
        subprocess.run(["bash", "-euc", command], check=True, env=environment)
        return
    cli.dispatch(shlex.split(command)[1:])  # an exit code above 0 would be raised


def write_public_data(folder: Path) -> None:
    """Write small versions of VOC, SBD, MS COCO and the official label file, under the names in the document."""
    draws = np.random.default_rng(0)
    voc, sbd = folder / "VOCdevkit/VOC2012", folder / "benchmark_RELEASE/dataset"
    for place in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass", "Annotations"):
        (voc / place).mkdir(parents=True)
    (sbd / "cls").mkdir(parents=True)
    for name, value in (("2007_000032", 1), ("2008_000002", 20), ("2007_000033", 5)):
        Image.fromarray(draws.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(voc / f"JPEGImages/{name}.jpg")
        mask = np.full((30, 40), value, np.uint8)
        savemat(sbd / f"cls/{name}.mat", {"GTcls": {"Segmentation": mask}})
        if name.startswith("2007"):
            Image.fromarray(mask).save(voc / f"SegmentationClass/{name}.png")
        shown = f"<annotation><object><name>{VOC_CLASSES[value - 1]}</name></object></annotation>"
        (voc / f"Annotations/{name}.xml").write_text(shown)
    (voc / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n")
    (sbd / "train.txt").write_text("2008_000002\n")
    (sbd / "val.txt").write_text("2007_000033\n")
    write_part(folder / "coco2014", "train2014", ["COCO_2", "COCO_1"])
    write_part(folder / "coco2014", "val2014", ["COCO_3"])
    np.save(folder / "cls_labels_onehot.npy", {"2007_000032": np.eye(20)[0]}, allow_pickle=True)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a user who has followed the document."""
    folder = tmp_path_factory.mktemp("user")
    write_public_data(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in commands():
            run(command)
        yield folder
    finally:
        os.chdir(before)


def test_the_document_s_training_ran_on_the_user_s_pictures_and_was_scored(user: Path) -> None:
    summary = json.loads((user / "runs/mine/summary.json").read_text())
    assert summary["iterations"] == 20
    assert set(summary["results"]["seg"]["classes"]) == {"background", "fizz", "luma", "miko", "pogo", "taro", "zuzu"}
    assert read_metrics(user / "runs/mine")
    assert json.loads((user / "runs/mine/metrics.json").read_text())["images"] == 12
    assert len(list((user / "results/masks").glob("*.png"))) == 72


def test_the_document_s_lists_masks_labels_and_shards_were_written(user: Path) -> None:
    assert json.loads((user / "findings.json").read_text())["findings"] == []
    assert len((user / "clean/train.csv").read_text().splitlines()) == 61
    voc = user / "VOCdevkit/VOC2012"
    assert (voc / "ImageSets/Segmentation/train_aug.txt").read_text() == "2007_000032\n2008_000002\n"
    assert len(list((voc / "SegmentationClassAug").iterdir())) == 3
    assert len(list((user / "coco2014/SegmentationClass/val2014").iterdir())) == 1
    expected = "image,labels\n2007_000032,aeroplane\n2008_000002,tvmonitor\n2007_000033,bottle\n"
    assert (user / "from_xml.csv").read_text() == (user / "from_masks.csv").read_text() == expected
    assert (user / "from_coco.csv").read_text() == "image,labels\nCOCO_3,person car\n"
    assert (user / "from_official.csv").read_text() == "image,labels\n2007_000032,aeroplane\n"
    index = json.loads((user / "shards/train.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == 60


def test_the_document_names_every_kind_of_finding() -> None:
    from fsr_fast.dataloading.findings import KINDS

    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z-]+)`", text.partition("| finding |")[2].partition("\n\n")[0])) == set(KINDS)


def test_a_training_without_validation_ends_without_scores(user: Path) -> None:
    shutil.copytree(user / "mydata", user / "unmasked", ignore=shutil.ignore_patterns("masks", "val.csv"))
    run(
        "fsr-fast train --config synthetic --data.dataset own --data.root unmasked --data.train_list train "
        "--data.val_list None --run.output runs/unmasked --optim.iterations 2 --optim.warmup 1 --run.evaluate_every 1"
    )
    summary = json.loads((user / "runs/unmasked/summary.json").read_text())
    assert summary["iterations"] == 2
    assert "results" not in summary
    run("fsr-fast predict --checkpoint runs/unmasked unmasked/images/creatures_000000.jpg --output unscored")
    assert (user / "unscored/masks/creatures_000000.png").is_file()
    with pytest.raises(UserError, match="evaluation needs a list of images with masks"):
        run("fsr-fast evaluate --checkpoint runs/unmasked")
