"""Profiles, logs, and the resources of a long run."""

import gzip
import json
import sys
import threading

import psutil
import pytest

from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests import helpers

SMALL = {
    "run": {"checkpoint_every": 20, "log_every": 5},
    "model": {
        "backbone_options": {**helpers.config().model.backbone_options, "depth": 3, "embed_dim": 16},
        "aux_block": -2,
        "aggregator_blocks": 1,
    },
    "optim": {"batch_size": 2},
}
MEBIBYTE = 2**20


def test_a_profile_of_five_iterations_is_written_where_it_is_asked_for(recipe, tmp_path):
    train(["--config", str(recipe("run", {"optim": {"iterations": 11}, "run": {"profile": True}}))])
    with gzip.open(tmp_path / "run" / "profile" / "rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 5


def test_without_the_question_nothing_is_profiled_and_no_logger_is_imported(recipe, tmp_path, monkeypatch):
    for package in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)  # an import would fail
    train(["--config", str(recipe("run", {"optim": {"iterations": 3}}))])
    assert not (tmp_path / "run" / "profile").exists()


def test_the_log_of_a_process_tells_its_story(recipe, tmp_path):
    train(["--config", str(recipe("run", {"optim": {"iterations": 3}}))])
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "rank 0 of 1 starts" in log
    assert str(tmp_path / "run" / "checkpoints" / "0000003.pt") in log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["checkpoint_wait"] < 1


def usage() -> dict[str, int]:
    process = psutil.Process()
    return {"memory": process.memory_info().rss, "handles": process.num_fds(), "threads": threading.active_count()}


@pytest.mark.faults
@pytest.mark.parametrize("steps", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_long_run_uses_no_more_memory_handles_or_threads_at_its_end_than_early_on(recipe, monkeypatch, record, steps):
    samples = {}
    iterate = Trainer._iterate

    def changed(self, forward, batch):
        if self.iteration % (steps // 10) == 5:  # well behind a checkpoint, whose files are closed then
            self.supervisor._saver._join()
            samples[self.iteration] = usage()
        return iterate(self, forward, batch)

    monkeypatch.setattr(Trainer, "_iterate", changed)
    train(["--config", str(recipe("run", SMALL, {"optim": {"iterations": steps}}))])
    _, _, early, *_, last = samples.values()
    growth = (last["memory"] - early["memory"]) / MEBIBYTE
    assert last["handles"] == early["handles"]
    assert last["threads"] == early["threads"]
    assert growth < 16
    record(
        "a long run (number: its iterations)",
        injected=steps,
        lost="nothing",
        outcome=f"no more file handles and threads than early on; memory {growth:+.1f} MiB",
    )
