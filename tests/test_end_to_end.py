"""A few iterations of both presets, then evaluation and prediction on what they leave."""

import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_fast import load_network
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.predict import main as predict
from fsr_fast.config import load_config
from fsr_fast.evaluation.inference import read_picture, segment_batch
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.train import main as train
from tests import helpers

ITERATIONS = 6
PRESETS = {"paper": {}, "official": helpers.OFFICIAL}
LOSSES = {"classification", "affinity", "segmentation", "uncertain", "class_token"}


class Finished(NamedTuple):
    """A training that ended."""

    preset: str
    root: Path
    run: Path
    printed: str


@pytest.fixture(scope="module", params=PRESETS)
def finished(request, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp(request.param)
    root, run = helpers.write_dataset(folder / "data"), folder / "run"
    recipe = helpers.values(
        PRESETS[request.param],
        {"optim": {"iterations": ITERATIONS}, "loss": {"segmentation_start": 2}},
        {"run": {"picture_every": 3, "checkpoint_every": 2, "evaluate_every": 4}},
        root=root,
        output=run,
    )
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        train(["--config", str(helpers.write_config(folder / "recipe.yaml", recipe))])
    return Finished(request.param, root, run, "\n".join(lines))


def test_the_summary_holds_the_scores_and_where_the_pictures_are(finished):
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["iterations"] == ITERATIONS
    for name in ("pseudo", "seg"):
        assert 0 <= summary[f"{name}_miou"] <= 100
        assert summary[f"{name}_miou"] == summary["results"][name]["mean_iou"]
        assert list(summary["results"][name]["classes"]) == ["background", *helpers.CLASSES]
    assert summary["images_per_second"] > 0
    assert 0 < summary["of_ceiling"] < 1
    assert summary["wall_seconds"] > 0
    with Image.open(summary["picture"]) as picture:
        assert picture.width > 5 * 36  # image | truth | CAM | pseudo | seg
    assert finished.printed.splitlines()[-3:] == [
        f"picture: {summary['picture']}",
        f"summary: {finished.run / 'summary.json'}",
        f"next: fsr-fast report {finished.run}, or fsr-fast predict --checkpoint {finished.run} PICTURES",
    ]


def test_every_loss_that_counts_is_logged_with_rates(finished):
    lines = [line for line in read_metrics(finished.run) if "loss/total" in line]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    expected = LOSSES | ({"energy"} if finished.preset == "official" else set())
    late = {"segmentation", "energy"}
    found = [{key.removeprefix("loss/") for key in line if key.startswith("loss/")} - {"total"} for line in lines]
    assert found == [expected - late, expected, expected]
    for line in lines:
        assert all(np.isfinite(value) for value in line.values())
        assert line.keys() >= {"learning_rate", "images_per_second", "data_wait", "wall_seconds"}
    weights = load_config(["--config", str(finished.run / "config.yaml")])[0].loss
    total = sum(getattr(weights, name) * lines[1][f"loss/{name}"] for name in expected)
    assert lines[1]["loss/total"] == pytest.approx(total, rel=1e-5)


def test_the_validation_between_is_logged(finished):
    (line,) = [line for line in read_metrics(finished.run) if "seg_miou" in line]
    assert line["iteration"] == 4
    assert 0 <= line["pseudo_miou"] <= 100


def test_the_run_folder_holds_configuration_environment_checkpoints_and_pictures(finished):
    assert load_config(["--config", str(finished.run / "config.yaml")])[0].run.output == finished.run
    assert "torch" in json.loads((finished.run / "environment.json").read_text())["packages"]
    names = {path.relative_to(finished.run).as_posix() for path in finished.run.rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("checkpoints/")} == {
        "checkpoints/0000004.pt",
        "checkpoints/0000006.pt",
        "checkpoints/best.pt",
        "checkpoints/best.json",
    }
    assert {name for name in names if name.startswith("pictures/")} == {
        "pictures/training_000003.png",
        "pictures/training_000006.png",
        "pictures/validation_000006.png",
    }
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not [name for name in names if "partial" in name]


def test_a_checkpoint_holds_all_that_must_survive(finished):
    state = read_checkpoint(finished.run)
    assert state["iteration"] == ITERATIONS
    assert state["classes"] == list(helpers.CLASSES)
    assert state["loader"]["position"] == ITERATIONS * 4
    assert set(state["centres"]) == {"patch_centre", "class_centre"}
    assert all(value.any() for value in state["centres"].values())
    prefix = "network." if finished.preset == "official" else "own_projector."
    assert all(name.startswith(prefix) for name in state["teacher"])
    assert len(state["optimiser"]["state"]) == len(dict(load_network(finished.run).named_parameters()))


def test_training_moves_every_weight(finished):
    torch.manual_seed(0)
    config = load_config(["--config", str(finished.run / "config.yaml")])[0]
    trained = load_network(finished.run).state_dict()
    first = helpers.build_network(config.model, helpers.CLASSES, config.data.image_size).state_dict()
    still = {name for name, value in first.items() if torch.equal(value, trained[name])}
    # the gain is fixed, and the keys' bias starts at 0, where its gradient keeps it
    assert still == {"projector.last_layer.weight_g", *(name for name in first if name.endswith("attn.k.bias"))}


def test_a_finished_run_that_is_started_again_only_evaluates(finished):
    timing = {"wall_seconds": 0, "checkpoint_wait": 0}
    before = json.loads((finished.run / "summary.json").read_text())
    checkpoint = (finished.run / "checkpoints" / "0000006.pt").read_bytes()
    lines = read_metrics(finished.run)
    train(["--config", str(finished.run / "config.yaml")])
    after = json.loads((finished.run / "summary.json").read_text())
    assert {**after, **timing} == {**before, **timing}
    assert (finished.run / "checkpoints" / "0000006.pt").read_bytes() == checkpoint
    assert read_metrics(finished.run) == lines


def test_evaluation_of_the_run_gives_the_summary_s_scores(finished, capsys):
    evaluate(["--checkpoint", str(finished.run)])
    metrics = json.loads((finished.run / "metrics.json").read_text())
    assert metrics["results"] == json.loads((finished.run / "summary.json").read_text())["results"]
    assert (metrics["iteration"], metrics["list"], metrics["images"]) == (ITERATIONS, "val", 4)
    printed = capsys.readouterr().out
    for word in ("background", *helpers.CLASSES, "mean", "pseudo", "seg"):
        assert word in printed
    assert (finished.run / "evaluation.png").is_file()


def test_evaluation_takes_its_settings_from_the_command_line(finished, tmp_path):
    file = finished.run / "checkpoints" / "0000004.pt"
    options = ["--list", "train", "--scales", "1.0", "1.5", "--no-flip", "--threshold", "0.3", "--limit", "2", "--crf"]
    evaluate(["--checkpoint", str(file), "--root", str(finished.root), *options, "--output", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["results"]) == ["pseudo", "seg", "seg+crf"]
    assert (metrics["iteration"], metrics["list"], metrics["images"]) == (4, "train", 2)
    assert sum(row["pixels"] for row in metrics["results"]["seg"]["classes"].values()) == 2 * 40 * 36


def test_predictions_of_a_folder_are_written_with_scores(finished, tmp_path):
    output = tmp_path / "predictions"
    predict(["--checkpoint", str(finished.run), str(finished.root / "JPEGImages"), "--output", str(output)])
    names = {path.stem for path in (finished.root / "JPEGImages").iterdir()}
    assert {path.stem for path in (output / "masks").iterdir()} == names
    assert {path.stem for path in (output / "overlays").iterdir()} == names
    scores = json.loads((output / "scores.json").read_text())
    assert {Path(path).stem for path in scores} == names
    config = load_config(["--config", str(finished.run / "config.yaml")])[0]
    path = finished.root / "JPEGImages" / "picture_3.jpg"
    (prediction,) = segment_batch(load_network(finished.run), [read_picture(path)], config)
    assert scores[str(path)]["scores"] == pytest.approx(prediction.scores)
    with Image.open(output / "masks" / "picture_3.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), prediction.mask)
    written = {path.name for path in (output / "cams").glob("picture_3_*")}
    assert written == {f"picture_3_{name}.png" for name in prediction.cams}


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fsr_fast.train")
    monkeypatch.setattr(sys, "argv", ["train", "--print-config"])
    runpy.run_module("fsr_fast.train", run_name="__main__")
    assert "batch_size" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train", "--mask.ratio", "7"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("fsr_fast.train", run_name="__main__")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: command line: --mask.ratio")
    assert "Traceback" not in message
