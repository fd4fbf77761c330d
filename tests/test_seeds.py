"""The demonstration from several seeds: which runs it makes, and what it reads from them."""

import json
from pathlib import Path

import pytest

from bench import seeds


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """Calls of a training that leaves what a real one leaves."""
    calls = []

    def train(arguments):
        calls.append(list(arguments))
        folder = Path(arguments[arguments.index("--run.output") + 1])
        folder.mkdir(parents=True)
        result = {"mean_iou": 70.5, "classes": {"background": {"iou": 90.0}, "pogo": {"iou": 51.0}}}
        summary = {"images_per_second": 150.0, "results": {"pseudo": result, "seg": result}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "environment.json").write_text(json.dumps({"commit": "abc"}))
        scores = {"iteration": 100, "wall_seconds": 9.5, "pseudo_miou": 40.0, "seg_miou": 30.0}
        lines = [{"iteration": 50, "wall_seconds": 5.0, "loss/total": 2.0}, scores]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    monkeypatch.setattr(seeds.train, "main", train)
    return calls


def test_every_seed_is_trained_once_and_its_scores_are_printed(tmp_path, trained, capsys):
    for _ in range(2):
        seeds.main(["--seeds", "0", "3", "--output", str(tmp_path), "--optim.warmup", "5"])
    folders = [str(tmp_path / f"seed_{seed}") for seed in (0, 3)]
    options = ["--optim.warmup", "5"]
    assert trained == [
        ["--run.seed", seed, "--run.output", folder, *options] for seed, folder in zip("03", folders, strict=True)
    ]
    assert capsys.readouterr().out.count("seed 3: pseudo 70.5 (worst pogo 51.0), seg 70.5 (worst pogo 51.0)") == 2


def test_what_is_recorded_names_the_commit_that_trained(tmp_path, trained, monkeypatch):
    recorded = {}
    monkeypatch.setattr(seeds, "record", lambda case, device, content: recorded.update({case: content}))
    seeds.main(["--seeds", "4", "--output", str(tmp_path)])
    content = recorded["seeds 4"]
    assert (content["seed"], content["commit"], content["seg"]["classes"]["pogo"]) == (4, "abc", 51.0)
    assert content["curve"] == [{"iteration": 100, "wall_seconds": 9.5, "pseudo_miou": 40.0, "seg_miou": 30.0}]


def test_other_options_are_recorded_under_a_name_of_their_own(tmp_path, trained, monkeypatch):
    recorded = {}
    monkeypatch.setattr(seeds, "record", lambda case, device, content: recorded.update({case: content}))
    seeds.main(["--seeds", "4", "--output", str(tmp_path), "--name", "depth", "--teacher.stochastic_depth", "never"])
    assert list(recorded) == ["depth 4"]
    assert recorded["depth 4"]["options"] == ["--teacher.stochastic_depth", "never"]
