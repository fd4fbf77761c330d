import io
import logging
import unicodedata

import pytest
import torch
from rich.console import Console
from rich.text import Text

from fsr_fast.reporting.tables import score_table
from fsr_fast.runtime.terminal import TrainingProgress, duration, track, working


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:  # within the test: pytest sets stdout anew before it
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def run(progress: TrainingProgress, clock: Clock, steps: int) -> None:
    for _ in range(steps):
        clock.now += 0.5
        progress.step(images=8, data_seconds=0.125)


def is_plain(text: str) -> bool:
    return all(character == "\n" or unicodedata.category(character) != "Cc" for character in text)


def test_without_a_terminal_every_report_is_one_plain_line(capsys, clock):
    with TrainingProgress(40, clock=clock) as progress:
        run(progress, clock, 10)
        progress.report(torch.tensor(0.75))
        run(progress, clock, 10)
        progress.report(0.5)
    text = capsys.readouterr().out
    estimate, first, second = text.splitlines()
    assert estimate == "first iteration: 0.5 s, about 20 s for all 40"
    assert first == "iteration 10/40  loss 0.7500  16.0 pictures/s  15 s left  waiting for data 25%"
    assert second == "iteration 20/40  loss 0.5000  16.0 pictures/s  10 s left  waiting for data 25%"
    assert is_plain(text)


def test_rates_are_those_since_the_last_report(clock):
    with TrainingProgress(100, start=50, clock=clock) as progress:
        clock.now += 1000
        run(progress, clock, 1)
        progress.report(1.0)
        run(progress, clock, 4)
        rates = progress.report(1.0)
    assert rates["images_per_second"] == pytest.approx(16)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["seconds_left"] == pytest.approx(45 * 0.5)
    assert 0.01 < rates["memory_gib"] < 1000


def test_arithmetic_stands_in_the_log_beside_what_the_devices_reach(clock, capsys, caplog):
    caplog.set_level(logging.INFO, "fsr_fast")
    with TrainingProgress(100, clock=clock, ceiling=16e12) as progress:
        for _ in range(2):
            clock.now += 0.5
            progress.step(images=8, data_seconds=0.1, flops=2e12)
        rates = progress.report(1.0)
        progress.step(images=8, data_seconds=0.1)
        clock.now += 0.5
        unknown = progress.report(1.0)
    assert (rates["tflops_per_second"], rates["of_ceiling"]) == pytest.approx((4.0, 0.25))
    assert "16.0 pictures/s, 4 TFLOP/s (25%), waiting for data 20%" in caplog.text
    assert "TFLOP" not in capsys.readouterr().out
    assert not unknown.keys() & {"tflops_per_second", "of_ceiling"}


def test_a_share_above_the_ceiling_is_not_told(clock, caplog):
    caplog.set_level(logging.INFO, "fsr_fast")
    with TrainingProgress(100, clock=clock, ceiling=1e12) as progress:
        clock.now += 0.5
        progress.step(images=8, data_seconds=0.1, flops=2.37e12)
        rates = progress.report(1.0)
    assert "of_ceiling" not in rates
    assert "4.74 TFLOP/s, waiting" in caplog.text


def test_a_training_of_weeks_on_a_cpu_is_announced_after_its_first_iteration(clock, capsys, caplog):
    with TrainingProgress(20_000, clock=clock) as progress:
        clock.now += 155
        progress.step(images=8, data_seconds=0.1)
        assert capsys.readouterr().out == "first iteration: 155.0 s, about 35 days for all 20000\n"
        assert "about 35 days on this CPU" in caplog.text
        assert "--config own_small" in caplog.text
        clock.now += 155
        progress.step(images=8, data_seconds=0.1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1 min 30 s"), (600, "10 min"), (4000, "1 h 7 min"), (90_000, "1 day 1 h")],
)
def test_lengths_of_time_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_pause_counts_in_no_rate(clock):
    with TrainingProgress(100, clock=clock) as progress:
        run(progress, clock, 2)
        with progress.paused():
            clock.now += 500
        run(progress, clock, 2)
        assert progress.report(1.0)["images_per_second"] == pytest.approx(16)


def test_a_terminal_gets_a_live_bar_with_the_same_figures(clock, monkeypatch):
    terminal = open_terminal(monkeypatch)
    with TrainingProgress(40, clock=clock) as progress:
        run(progress, clock, 10)
        progress.report(0.75)
        with progress.paused():
            assert list(track("abc", "evaluating")) == ["a", "b", "c"]
    text = terminal.getvalue()
    assert "\x1b[" in text
    assert "10/40" in text
    assert "loss 0.7500  16.0 pictures/s  15 s left" in text
    assert text.count("10/40") >= 2  # drawn anew after the pause


def test_a_terminal_shows_the_estimate_until_the_first_report(clock, monkeypatch):
    terminal = open_terminal(monkeypatch)
    with TrainingProgress(40, clock=clock) as progress:
        run(progress, clock, 1)
    assert "1/40 first iteration: 0.5 s, about 20 s for all 40" in terminal.getvalue()


def test_ci_gets_plain_lines_even_on_a_terminal(clock, monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("CI", "true")
    with TrainingProgress(40, clock=clock) as progress:
        run(progress, clock, 10)
        progress.report(0.75)
    list(track(range(3), "evaluating"))
    assert terminal.getvalue().startswith("first iteration: 0.5 s, about 20 s for all 40\niteration 10/40  loss 0.7500")
    assert is_plain(terminal.getvalue())


def test_other_ranks_print_nothing_but_measure(capsys, clock, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with TrainingProgress(40, clock=clock) as progress:
        run(progress, clock, 4)
        assert progress.report(0.75)["images_per_second"] == pytest.approx(16)
    assert list(track([1, 2], "evaluating")) == [1, 2]
    assert capsys.readouterr().out == ""


def test_track_yields_everything_and_prints_a_line_an_interval_and_one_at_the_end(capsys, clock):
    def images():
        for number in range(10):
            clock.now += 10
            yield number

    assert list(track(images(), "evaluating", total=10, interval=30, clock=clock)) == list(range(10))
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "evaluating 3/10",
        "evaluating 6/10",
        "evaluating 9/10",
        "evaluating 10/10  1 min 40 s",
    ]


def test_names_of_files_are_no_markup(monkeypatch):
    terminal = open_terminal(monkeypatch)
    described = []
    monkeypatch.setattr(
        "fsr_fast.runtime.terminal.rich_track", lambda items, text, **_: described.append(text) or items
    )
    assert list(track([1, 2], "packing a[/b]")) == [1, 2]
    assert Text.from_markup(*described).plain == "packing a[/b]"
    with working("exporting to [/c]/[red]"):
        pass
    assert "exporting to [/c]/[red]" in terminal.getvalue()


def test_track_takes_the_total_from_the_length_or_does_without(capsys):
    list(track([1, 2], "evaluating"))
    list(track(iter([1, 2]), "predicting"))
    assert capsys.readouterr().out == "evaluating 2/2  0 s\npredicting 2  0 s\n"


def test_score_table_has_a_row_a_class_and_the_mean_last():
    seg = {"mean_iou": 62.5, "classes": {"background": {"iou": 85.04}, "cat": {"iou": 40.0}, "cow": {"iou": None}}}
    crf = {"mean_iou": 70.0, "classes": {"background": {"iou": 90.0}, "cat": {"iou": 50.0}, "cow": {"iou": None}}}
    stream = io.StringIO()
    Console(file=stream, width=80, force_terminal=False).print(score_table({"seg": seg, "seg + CRF": crf}))
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in stream.getvalue().splitlines()]
    assert [row for row in rows if len(row) == 3] == [
        ["IoU (%)", "seg", "seg + CRF"],
        ["background", "85.0", "90.0"],
        ["cat", "40.0", "50.0"],
        ["cow", "-", "-"],
        ["mean", "62.5", "70.0"],
    ]
    assert stream.getvalue().isascii()
