"""Progress on the terminal: a live bar, or plain lines where the output goes to a file or a CI log."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import track as rich_track
from rich.table import Column
from torch import Tensor

from fsr_fast.runtime.log import LOGGER

Item = TypeVar("Item")
LONG_WAIT = 0.1
"""Share of the time above which waiting for data is worth showing."""
LONG_TRAINING = 24 * 3600.0
"""Seconds of training on a CPU above which alternatives are worth naming."""


def duration(seconds: float) -> str:
    """Format a duration for people, with at most two units."""
    for unit, length, part, of_part in (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            whole, rest = divmod(round(seconds / of_part), length // of_part)
            name = "day" if unit == "days" and whole == 1 else unit
            return f"{whole} {name} {rest} {part}" if whole < 10 and rest else f"{whole} {name}"
    return f"{round(seconds)} s"


def on_main_process() -> bool:
    """Return whether this process is rank 0, or the only one."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not grouped or torch.distributed.get_rank() == 0


def is_quiet() -> bool:
    """Return whether to print plain lines: stdout is not a (capable) terminal, or CI is set in the environment."""
    return not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or bool(os.environ.get("CI"))


class TrainingProgress:
    """Progress and rates of a training; shown by rank 0 only.

    Use as a context manager around the loop: `step` after every iteration, `report` at every log interval.

    Args:
        iterations: length of the training.
        start: iterations already done, when resuming.
        device: device of the training; its peak memory is shown, on the CPU that of the process.
        ceiling: floating-point operations per second of all devices together; None: not shown.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        iterations: int,
        *,
        start: int = 0,
        device: torch.device | None = None,
        ceiling: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total, self._done = iterations, start
        self._device = device or torch.device("cpu")
        self._ceiling = ceiling
        self._clock = clock
        self._shown = on_main_process()
        self._announced = False
        self._bar: Progress | None = None
        if self._shown and not is_quiet():
            self._bar = Progress(
                BarColumn(bar_width=None, table_column=Column(ratio=1)),  # the remaining width
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rates]}"),
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("training", total=iterations, completed=start, rates="")
        self._open_window()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        self._open_window()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, *, images: int, data_seconds: float, flops: float = 0.0) -> None:
        """Count one iteration. Never waits for the device.

        Args:
            images: images of the iteration, over all processes.
            data_seconds: time that the iteration waited for its data.
            flops: floating-point operations of the trunk, over all processes; 0: unknown.
        """
        self._done += 1
        self._steps += 1
        if (
            self._steps == 1 and not self._announced and self._device.type == "cpu"
        ):  # on a GPU the work has only been queued so far
            self._announce(self._clock() - self._opened)
        self._images += images
        self._data_seconds += data_seconds
        self._flops += flops
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    def report(self, loss: float | Tensor) -> dict[str, float]:
        """Show the loss and the rates since the last report.

        Args:
            loss: scalar; reading it from a GPU waits for the device.

        Returns:
            `images_per_second`, `data_wait` (share, 0 to 1), `memory_gib` (peak), `seconds_left`; if
            known, `tflops_per_second` of the trunk and `of_ceiling`, their share (0 to 1) of what the devices reach.
        """
        loss = float(loss)  # before the clock is read, since queued work belongs to this window
        seconds = max(self._clock() - self._opened, 1e-9)
        rates = {
            "images_per_second": self._images / seconds,
            "data_wait": self._data_seconds / seconds,
            "memory_gib": peak_memory(self._device) / 2**30,
            "seconds_left": (self._total - self._done) * seconds / max(self._steps, 1),
        }
        speed, arithmetic = f"{rates['images_per_second']:.1f} pictures/s", ""
        if self._flops:
            rates["tflops_per_second"] = self._flops / seconds / 1e12
            arithmetic = f", {rates['tflops_per_second']:.3g} TFLOP/s"
            share = self._flops / seconds / self._ceiling if self._ceiling else 1.0
            if share < 1:  # otherwise something else was running while the ceiling was measured
                rates["of_ceiling"] = share
                arithmetic += f" ({share:.0%})"
        text = f"loss {loss:.4f}  {speed}  {duration(rates['seconds_left'])} left"
        waiting = f"waiting for data {rates['data_wait']:.0%}"
        if rates["data_wait"] > LONG_WAIT:
            text += f"  {waiting}"
        whole = f"loss {loss:.4f}, {speed}{arithmetic}, {waiting}, {rates['memory_gib']:.1f} GiB"
        LOGGER.info("iteration %d: %s", self._done, whole)
        if self._bar:
            self._bar.update(self._task, rates=text)
        elif self._shown:
            with suppress(OSError):  # output to a full disk does not end a training
                print(f"iteration {self._done:>{len(str(self._total))}}/{self._total}  {text}", flush=True)
        self._open_window()
        return rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the bar and stop the clock, for an evaluation or a checkpoint within the training."""
        if self._bar:
            self._bar.stop()
        began = self._clock()
        try:
            yield
        finally:
            self._opened += self._clock() - began
            if self._bar:
                self._bar.start()

    def _announce(self, seconds: float) -> None:
        """Report after the first iteration how long the training will take; on a CPU it may be weeks."""
        self._announced = True
        left = (self._total - self._done) * seconds
        if not self._shown or not self._total > self._done:
            return
        text = f"first iteration: {seconds:.1f} s, about {duration(left)} for all {self._total}"
        if self._bar:
            self._bar.update(self._task, rates=text)  # until the first line of the log
        else:
            print(text, flush=True)
        if left > LONG_TRAINING:
            LOGGER.warning(
                "this training takes about %s on this CPU: use a GPU, a smaller recipe (--config own_small; synthetic "
                "for simple pictures), or fewer and smaller views (--optim.iterations, --optim.batch_size, "
                "--data.image_size)",
                duration(left),
            )

    def _open_window(self) -> None:
        self._opened = self._clock()
        self._steps = self._images = 0
        self._data_seconds = self._flops = 0.0


def track(
    iterable: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    interval: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Item]:
    """Show the progress of a loop, on rank 0 only.

    Args:
        iterable: what to loop over.
        description: what the loop does, e.g. `evaluating`.
        total: number of items; None: the length of `iterable`, if it has one.
        interval: seconds between two lines without a terminal; the last item always prints one.
        clock: seconds; replaced in tests.

    Returns:
        An iterator over the same items.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not on_main_process():
        return iter(iterable)
    if not is_quiet():
        return iter(rich_track(iterable, escape(description), total=total, transient=True))
    return _lines(iterable, description, total, interval, clock)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that something of unknown length is in progress, on rank 0 only.

    Args:
        description: what is done, e.g. `exporting`.
    """
    if not on_main_process() or is_quiet():
        yield
        return
    with Console().status(escape(description)):
        yield


def _lines(
    iterable: Iterable[Item], description: str, total: int | None, interval: float, clock: Callable[[], float]
) -> Iterator[Item]:
    began = printed = clock()
    done = 0
    of = f"/{total}" if total is not None else ""
    for item in iterable:
        yield item
        done += 1
        now = clock()
        if now - printed >= interval and done != total:
            print(f"{description} {done}{of}", flush=True)
            printed = now
    print(f"{description} {done}{of}  {duration(clock() - began)}", flush=True)


def peak_memory(device: torch.device) -> int:
    """Return the largest memory so far, in bytes: on a GPU what torch holds there, else of this process.

    What torch holds, not what its tensors need: replayed CUDA graphs use memory that no tensor is counted for.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
