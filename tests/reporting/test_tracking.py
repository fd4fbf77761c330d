import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fsr_fast.errors import UserError
from fsr_fast.reporting import tracking
from fsr_fast.reporting.tracking import Tracker, environment, read_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def record(folder: Path, iterations: list[int], start: int = 0) -> None:
    with Tracker(folder, iteration=start, clock=Clock()) as tracker:
        for iteration in iterations:
            tracker.log(iteration, {"loss/total": iteration / 2})


def scalars(folder: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("loss/total")]


def test_a_run_leaves_one_json_object_a_line_with_numbers_and_wall_time(tmp_path):
    with Tracker(tmp_path / "new" / "run", clock=Clock()) as tracker:
        tracker.log(10, {"loss/total": torch.tensor(0.5), "rate": 1e-3})
        tracker.log(20, {"loss/total": math.nan, "rate": math.inf})
    first, second = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"iteration": 10, "wall_seconds": 1.0, "loss/total": 0.5, "rate": 1e-3}
    assert json.loads(second) == {"iteration": 20, "wall_seconds": 2.0, "loss/total": None, "rate": None}


def test_a_logged_line_is_readable_at_once(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(10, {"loss/total": 0.5})
    assert read_metrics(tmp_path)[0]["loss/total"] == 0.5
    tracker.close()


def test_tensorboard_shows_scalars_and_pictures_while_the_run_goes_on(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(10, {"loss/total": 0.5})
        assert scalars(tmp_path) == [(10, 0.5)]
        tracker.pictures(10, Image.new("RGB", (4, 3)))
        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        assert [event.step for event in board.Images("pictures")] == [10]


def test_resuming_drops_what_lies_beyond_and_goes_on_with_the_clock(tmp_path):
    record(tmp_path, [10, 20, 30, 40])
    record(tmp_path, [30], start=20)
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [10, 20, 30]
    assert [line["wall_seconds"] for line in lines] == [1.0, 2.0, 3.0]
    assert scalars(tmp_path) == [(10, 5.0), (20, 10.0), (30, 15.0)]


def test_a_new_run_starts_an_empty_record(tmp_path):
    record(tmp_path, [10, 20])
    record(tmp_path, [10])
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [10]


@pytest.mark.parametrize("torn", ['{"iteration": 30, "lo', "{", '{"iteration": 3', "\x00\x00\x00"])
def test_a_torn_last_line_is_left_out_and_mended_on_resume(tmp_path, torn):
    record(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [10, 20]
    record(tmp_path, [30], start=20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [10, 20, 30]


@pytest.mark.parametrize("damage", ["not JSON", "7", "{}"])
def test_damage_before_the_last_line_is_named_and_nothing_is_touched(tmp_path, damage):
    record(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{damage}\n{second}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        Tracker(tmp_path, iteration=20)
    assert path.read_text() == f"{first}\n{damage}\n{second}\n"


def test_without_a_file_there_are_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_pictures_reach_the_folder_and_tensorboard(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with Tracker(tmp_path) as tracker:
        path = tracker.pictures(250, Image.fromarray(pixels))
    assert path == tmp_path / "pictures" / "pictures_000250.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("pictures")
    assert (event.step, event.width, event.height) == (250, 9, 6)


def test_summary_is_written_with_the_wall_time_and_undefined_values_as_null(tmp_path):
    with Tracker(tmp_path, clock=Clock()) as tracker:
        path = tracker.summary({"seg": {"mean_iou": math.nan, "iou": [1.0, math.inf]}, "iterations": 3})
    assert json.loads(path.read_text()) == {
        "seg": {"mean_iou": None, "iou": [1.0, None]},
        "iterations": 3,
        "wall_seconds": 1.0,
    }


def test_environment_names_versions_devices_and_cores(tmp_path):
    with Tracker(tmp_path):
        pass
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written == environment()
    assert written["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert written["cpu"]
    assert written["cpu_cores"] >= 1
    assert (written["cuda"] is None) == (not torch.cuda.is_available())


def test_commit_is_that_of_our_repository_and_never_of_one_around_an_installation(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "tracking.py"
    module.write_text("installed\n")
    (tmp_path / "other.txt").write_text("theirs\n")
    monkeypatch.setattr(tracking, "__file__", str(module))
    git("init", "--quiet")
    git("add", "other.txt")
    git("commit", "--quiet", "-m", "theirs")
    assert environment()["commit"] is None
    git("add", "tracking.py")
    git("commit", "--quiet", "-m", "ours")
    assert environment()["commit"] == git("rev-parse", "HEAD")
    module.write_text("changed\n")
    assert environment()["commit"] == git("rev-parse", "HEAD") + "-dirty"
