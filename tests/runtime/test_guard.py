"""Non-finite iterations are skipped entirely, counted, and end the run if they do not stop."""

import math

import pytest
import torch

from fsr_fast.config import load_config
from fsr_fast.errors import UserError
from fsr_fast.reporting.averages import Averages
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.guard import LIMIT, NonFiniteGuard, gradient_norm
from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests import helpers

ALONE = Process(0, 1, torch.device("cpu"))


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {
        "student": trainer.network.state_dict(),
        "teacher": trainer.step.teacher.state_dict(),
        "centres": trainer.step.distillation.state_dict(),
    }
    found = {f"{part} {name}": value.clone() for part, state in parts.items() for name, value in state.items()}
    for number, state in trainer.optimiser.state_dict()["state"].items():
        found |= {f"optimiser {number} {name}": value.clone() for name, value in state.items()}
    return found


def poison(monkeypatch, kind: str, iterations: set[int]) -> None:
    """Make the images of some iterations, or the gradient, not finite."""
    iterate = Trainer._iterate

    def changed(self, forward, batch):
        if self.iteration not in iterations:
            return iterate(self, forward, batch)
        if kind == "images":
            for view in batch.views:
                view[0, 0, 0, 0] = math.nan
            return iterate(self, forward, batch)
        handle = self.network.top_classifier.weight.register_hook(lambda gradient: gradient * math.inf)
        try:
            return iterate(self, forward, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "_iterate", changed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "preset", "clip"),
    [("images", {}, None), ("gradient", {}, 1.0), ("images", helpers.OFFICIAL, 1.0)],
    ids=["images", "gradient", "official"],
)
def test_a_bad_iteration_changes_nothing_and_the_next_one_goes_on(recipe, monkeypatch, kind, preset, clip):
    poison(monkeypatch, kind, {2})
    trainer = Trainer(load_config(["--config", str(recipe("run", preset, {"optim": {"clip_norm": clip}}))])[0], ALONE)
    states = [snapshot(trainer)]
    for _ in range(4):
        _, skipped = trainer._iterate(trainer.step, next(trainer.loader))
        states.append(snapshot(trainer))
        assert skipped.item() == (trainer.iteration == 3)
    trainer.close()
    for name, value in states[3].items():
        assert torch.equal(value, states[2][name]), name
        assert torch.isfinite(states[4][name]).all(), name
    for part in ("student", "teacher", "centres", "optimiser"):
        changed = [name for name in states[4] if name.startswith(part) and not torch.equal(states[4][name], value)]
        assert changed, part
    assert trainer.guard.counts.tolist() == [0.0, 1.0]


@pytest.mark.faults
def test_a_run_with_few_bad_iterations_ends_and_says_how_many(recipe, tmp_path, monkeypatch, record):
    poison(monkeypatch, "images", {1, 2, 4})
    train(["--config", str(recipe("run"))])
    lines = [line for line in read_metrics(tmp_path / "run") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert [line["loss/total"] is None for line in lines] == [False, True, True, False, True, False]
    assert (tmp_path / "run" / "summary.json").is_file()
    record(
        "loss or gradient is not finite, at most two iterations in a row",
        injected=3,
        lost="these iterations",
        outcome="skipped on the device, weights, optimiser, averages and centres untouched; counted in metrics.jsonl",
    )


@pytest.mark.faults
def test_three_bad_iterations_in_a_row_end_the_run_with_the_last_good_state(recipe, tmp_path, monkeypatch, record):
    path = recipe("run", {"run": {"log_every": 6, "checkpoint_every": 100}, "optim": {"iterations": 7}})
    with monkeypatch.context() as patch:
        poison(patch, "images", {2, 3, 4})  # finite again at 5, before anybody looks
        with pytest.raises(UserError, match="3 iterations in a row, found at iteration 6"):
            train(["--config", str(path)])
    state = read_checkpoint(tmp_path / "run")
    trainer = Trainer(load_config(["--config", str(recipe("short", {"optim": {"iterations": 7}}))])[0], ALONE)
    for _ in range(2):
        trainer._iterate(trainer.step, next(trainer.loader))
    trainer.close()
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, state["student"][name]), name
    train(["--config", str(path)])
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 4
    record(
        "three iterations in a row are not finite",
        injected=1,
        lost="nothing but the bad iterations",
        outcome="exit code 2 at the next log line, last good state saved; the same command goes on after them",
    )


def test_two_in_a_row_do_not_count_as_three_with_one_good_between():
    parameter = torch.nn.Parameter(torch.ones(2))
    guard = NonFiniteGuard(torch.optim.AdamW([parameter], fused=True), [torch.zeros(2)])
    guard.hold()
    verdicts = [guard.judge(torch.tensor(loss), torch.tensor(1.0)).item() for loss in [math.nan, math.inf, 1, math.nan]]
    assert verdicts == [True, True, False, True]
    assert guard.counts.tolist() == [1, 3]
    for _ in range(LIMIT - 1):
        guard.judge(torch.tensor(math.nan), torch.tensor(1.0))
    assert guard.judge(torch.tensor(1.0), torch.tensor(1.0)).item(), "the state is kept until somebody looks"


def test_nothing_is_read_from_the_device_between_log_lines():
    # values on the meta device cannot be read: whatever waits for the device would fail here
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    parameter.grad = torch.ones_like(parameter)
    guard = NonFiniteGuard(torch.optim.AdamW([parameter], fused=True), [torch.zeros(4, device="meta")])
    guard.hold()
    skipped = guard.judge(torch.zeros((), device="meta"), gradient_norm([parameter], 1.0))
    Averages().add({"total": torch.zeros((), device="meta")}, skipped)
    with pytest.raises(RuntimeError):
        skipped.item()


def test_averages_leave_skipped_iterations_out():
    averages = Averages()
    for values, skipped in (
        ({"a": 1.0}, False),
        ({"a": math.nan}, True),
        ({"a": 3.0, "b": 5.0}, False),
    ):
        averages.add({name: torch.tensor(value) for name, value in values.items()}, torch.tensor(skipped))
    means, counts = averages.take(torch.tensor([7.0, 8.0]))
    assert means == {"a": 2.0, "b": 5.0}
    assert counts == [7.0, 8.0]
    averages.add({"a": torch.tensor(math.inf)}, torch.tensor(True))
    assert math.isnan(averages.take(torch.zeros(2))[0]["a"])
