"""A signal ends a run after a checkpoint; the same command finishes it as if nothing had happened."""

import os
import re
import signal

import pytest

from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.signals import Signals, Stopped, Vote
from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests.runtime import children
from tests.runtime.conftest import outcome
from tests.test_resume import assert_same

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def send_before(monkeypatch, number: int, method: str, at: int) -> None:
    """Send this process a signal before a method of the trainer does its work at an iteration."""
    original = getattr(Trainer, method)

    def changed(self, *arguments, **options):
        if self.iteration == at:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Trainer, method, changed)


@pytest.mark.faults
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_saves_at_the_next_boundary_and_the_same_command_goes_on(
    recipe, tmp_path, monkeypatch, whole, number, record, capsys
):
    path = recipe("run", {"run": {"checkpoint_every": 100}})
    with monkeypatch.context() as patch:
        send_before(patch, number, "_iterate", 2)
        with pytest.raises(SystemExit) as caught:
            train(["--config", str(path)])
    assert caught.value.code == CODES[number]
    assert f"stopped by signal {number.value} at iteration 3; the same command goes on" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "run")["iteration"] == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    train(["--config", str(path)])
    assert_same(outcome(tmp_path / "run"), whole)
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    record(
        f"{number.name} during an iteration",
        injected=1,
        lost="nothing",
        outcome=f"checkpoint at the next boundary, exit code {CODES[number]}; ends bit for bit like an undisturbed run",
    )


@pytest.mark.faults
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_during_an_evaluation_ends_it_at_once_behind_a_checkpoint(
    recipe, tmp_path, monkeypatch, whole, number, record
):
    path = recipe("run", {"run": {"evaluate_every": 3, "checkpoint_every": 100}})
    evaluations = []

    def evaluate_and_die(*arguments, **options):
        evaluations.append("begun")
        os.kill(os.getpid(), number)
        evaluations.append("went on")

    with monkeypatch.context() as patch:
        patch.setattr("fsr_fast.trainer.evaluate_network", evaluate_and_die)
        with pytest.raises(SystemExit) as caught:
            train(["--config", str(path)])
    assert caught.value.code == CODES[number]
    assert evaluations == ["begun"]
    assert read_checkpoint(tmp_path / "run")["iteration"] == 3
    train(["--config", str(path)])
    assert_same(outcome(tmp_path / "run"), whole)
    assert [line["iteration"] for line in read_metrics(tmp_path / "run") if "seg_miou" in line] == [3]
    record(
        f"{number.name} during an evaluation",
        injected=1,
        lost="nothing",
        outcome=f"exit code {CODES[number]} at once, checkpoint of this iteration on disk; made up for on resuming",
    )


@pytest.mark.faults
@pytest.mark.ddp
def test_a_signal_to_one_process_stops_all_at_the_same_boundary_and_they_go_on_together(recipe, tmp_path, record):
    whole, parts = recipe("whole"), recipe("parts", {"run": {"checkpoint_every": 100}})
    assert children.exit_codes(children.start_ranks(whole, 2)) == [0, 0]
    stopped = children.start_ranks(parts, 2, children.signal_one, 2, signal.SIGTERM, 1)
    assert children.exit_codes(stopped) == [143, 143]
    assert read_checkpoint(tmp_path / "parts")["iteration"] == 4  # known to all one iteration later
    assert children.exit_codes(children.start_ranks(parts, 2)) == [0, 0]
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    log = (tmp_path / "parts" / "logs" / "rank_1.log").read_text()
    assert re.findall(r"rank 1 of 2 starts|stopped by signal 15", log) == [
        "rank 1 of 2 starts",
        "stopped by signal 15",
        "rank 1 of 2 starts",
    ]
    record(
        "SIGTERM to one of two processes",
        injected=1,
        lost="nothing",
        outcome="both stop at the same iteration with exit code 143; they end bit for bit like an undisturbed run",
    )


def test_a_second_interrupt_ends_the_process_at_once():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_under_torchrun_which_repeats_it_a_second_interrupt_changes_nothing(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with Signals() as signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.caught == signal.SIGINT


def test_a_signal_before_something_long_prevents_it():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as caught, signals.at_once():
            raise AssertionError("it began")
    assert caught.value.code == 143


def test_what_is_waited_for_has_a_while_after_a_signal():
    with Signals() as signals:
        with signals.at_once(grace=1000.0):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        with pytest.raises(Stopped) as caught, signals.at_once(grace=0.01):
            signal.pause()
    assert caught.value.code == 143


def test_handlers_are_put_back():
    numbers = [*CODES, signal.SIGALRM]
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_alone_a_vote_is_one_s_own():
    vote = Vote()
    assert [vote.cast(number) for number in (0, 15, 2)] == [0, 15, 2]
    vote.meet()
