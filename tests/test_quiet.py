"""A run without problems prints no warning, and its last lines say what comes next."""

from pathlib import Path

import pytest

from fsr_fast import cli
from tests import helpers

SETTINGS = {
    "run": {"log_every": 1, "picture_every": 1, "checkpoint_every": 2, "evaluate_every": 2},
    "data": {"workers": 2},
    "loss": {"segmentation_start": 1},
}
VERBS = {
    "train": ["--config", "recipe.yaml"],
    "train once more": ["--config", "recipe.yaml"],
    "evaluate": ["--checkpoint", "run", "--crf", "--evaluate.crf_workers", "1"],
    "predict": ["--checkpoint", "run", "data/JPEGImages"],
    "pseudo-labels": ["--checkpoint", "run", "--kind", "seg"],
    "export": ["--checkpoint", "run"],
    "export as program": ["--checkpoint", "run", "--to", "torch"],
    "export as ONNX": ["--checkpoint", "run", "--to", "onnx"],
    "report": ["run", "--limit", "2"],
    "data": ["pack", "data", "--train", "train", "--classes", "red,green,blue", "--output", "shards"],
}


@pytest.mark.filterwarnings("error")
def test_no_verb_warns_and_the_last_line_says_what_comes_next(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # for the loader's processes
    root = helpers.write_dataset(Path("data"), train=12, val=2)
    helpers.write_config(Path("recipe.yaml"), helpers.values(SETTINGS, root=root, output="run"))
    for name, arguments in VERBS.items():
        cli.dispatch([name.split()[0], *arguments])
        out, err = capfd.readouterr()
        assert err == "", name
        assert out.splitlines()[-1].startswith("next: ") == (name != "data"), name
