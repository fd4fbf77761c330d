"""A run folder that version 0.1.0 left behind after 2 of 4 iterations still opens, as that version would have.

The archive holds the folder, and what 0.1.0 reached when it went on: scores, and the norm of every parameter.
"""

import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast import train
from fsr_fast.commands import evaluate, predict
from fsr_fast.runtime.checkpoint import read_checkpoint
from tests import helpers

ARCHIVE = Path(__file__).parent / "fixtures" / "run_0.1.0.tar.xz"


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """What the old version reached; the run and its data are in the working folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    helpers.write_dataset(tmp_path / "data", train=4, val=2)
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("expected.json").read_text())


def test_it_goes_on_and_ends_where_the_old_version_ended(expected):
    train.main(["--config", "run/config.yaml"])
    checkpoint = read_checkpoint(Path("run"))
    assert checkpoint["iteration"] == 4
    norms = {name: value.double().norm().item() for name, value in checkpoint["student"].items()}
    assert norms == pytest.approx(expected["norms"], rel=1e-3)
    summary = json.loads(Path("run/summary.json").read_text())
    for name in ("seg_miou", "pseudo_miou"):
        assert summary[name] == pytest.approx(expected[name], abs=0.5)


def test_it_is_evaluated(expected):
    evaluate.main(["--checkpoint", "run", "--output", "scores"])
    scores = json.loads(Path("scores/metrics.json").read_text())
    assert (scores["iteration"], scores["images"]) == (2, 2)
    assert all(math.isfinite(result["mean_iou"]) for result in scores["results"].values())


def test_it_segments_a_picture(expected):
    predict.main(["--checkpoint", "run", "data/JPEGImages/picture_5.jpg", "--output", "out"])
    with Image.open("out/masks/picture_5.png") as mask:
        assert set(np.unique(mask)) <= {0, 1, 2, 3}
        assert mask.size == (36, 40)
