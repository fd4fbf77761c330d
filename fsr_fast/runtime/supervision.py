"""What keeps a run alive, and ends it well: lock, log, signals, watchdog, checkpoints, profile."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from fsr_fast.config import RunConfig
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.guard import LIMIT, not_finite
from fsr_fast.runtime.log import LOGGER, rank_log
from fsr_fast.runtime.memory import explained_shortage
from fsr_fast.runtime.profile import profiled
from fsr_fast.runtime.run_folder import locked_run_folder
from fsr_fast.runtime.saving import Saver
from fsr_fast.runtime.signals import Signals, Stopped, Vote
from fsr_fast.runtime.watchdog import Watchdog

GRACE = 10.0
"""Seconds after a signal in which data may still come that several processes wait for, so that all of them stop at
the same iteration; schedulers wait 30 seconds and more before they kill."""


class Supervisor:
    """Stands around the loop; every process opens its context.

    Args:
        run: folder, checkpoints, time-out.
        process: this process.
        state: gives the state to save, as it is after the last whole iteration.
        saved: iteration of the checkpoint that the run goes on from; none: a new run.
    """

    def __init__(
        self, run: RunConfig, process: Process, state: Callable[[], dict[str, Any]], saved: int | None
    ) -> None:
        self._run, self._process, self._state, self._saved = run, process, state, saved
        self._signals = Signals()
        self._watchdog = Watchdog(run.timeout, process)
        self._saver: Saver | None = None
        self._began, self._waited = time.perf_counter(), 0.0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._process.is_main:
                stack.enter_context(locked_run_folder(self._run.output))
            stack.enter_context(rank_log(self._run.output, self._process.rank))
            stack.enter_context(explained_shortage(self._run.output, self._process))
            self._vote = Vote()
            stack.enter_context(self._watchdog)
            if self._process.is_main:
                self._saver = stack.enter_context(Saver(self._run, self._saved))
            self._profiler = stack.enter_context(profiled(self._run, self._process))
            stack.enter_context(self._signals)
            self._open = stack.pop_all()
        self._began = time.perf_counter()
        LOGGER.info("rank %d of %d starts", self._process.rank, self._process.world_size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.__exit__(kind, error, trace)

    def beat(self, place: str) -> None:
        """Tell the watchdog that the process is alive.

        Args:
            place: what follows.
        """
        self._watchdog.beat(place)

    def boundary(self, iteration: int) -> None:
        """Stand between two iterations, where a signal ends the loop.

        Args:
            iteration: iterations done.

        Raises:
            Stopped: a process got SIGTERM or SIGINT; the state is saved.
        """
        self._profiler.step()
        number = self._vote.cast(self._signals.caught)
        if number:
            stopped = Stopped(number)
            self.save_and_stop(stopped, iteration)
            raise stopped

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for data. A signal ends that: at once where this process is the only one, else after `GRACE`."""
        with self._signals.at_once(grace=GRACE if self._process.world_size > 1 else 0.0):
            yield

    def save_and_stop(self, stopped: Stopped, iteration: int, *, together: bool = True) -> None:
        """Save the state for a process that is about to end.

        Args:
            stopped: why.
            iteration: iterations done.
            together: all processes are here. Otherwise none waits for the others: the first one saves, unless it holds
                no more than its part of the state.
        """
        if together or not self._run.shard:
            self.save()
        if together:
            self.finish()
        elif self._saver is not None:
            self._saver.finish()
        saved = together or (self._saver is not None and not self._run.shard)
        LOGGER.warning(
            "stopped by signal %d at iteration %d; the same command goes on from %s",
            stopped.number,
            iteration,
            "there" if saved else "the newest checkpoint",
        )

    def check(self, in_row: float, iteration: int) -> None:
        """Stop the run after too many bad iterations.

        Args:
            in_row: of the guard's counts.
            iteration: iterations done.

        Raises:
            UserError: that many were not finite; the last good state is saved.
        """
        if in_row >= LIMIT:
            self.save()
            self.finish()
            raise not_finite(iteration, self._run.output)

    def save(self) -> None:
        """Save the state, beside the training."""
        if self._saver is not None or self._run.shard:
            began = time.perf_counter()
            state = self._state()
            if self._saver is not None:
                self._saver.save(state)
            self._waited += time.perf_counter() - began

    def saving_share(self) -> float:
        """Return the share of the time since the start that the training waited for `save`."""
        return self._waited / (time.perf_counter() - self._began)

    def finish(self) -> None:
        """Wait until the last state is on disk, in all processes.

        Raises:
            UserError: it could not be written.
        """
        with self._watchdog.paused():
            if self._saver is not None:
                self._saver.finish()
            self._vote.meet()

    @contextmanager
    def interlude(self) -> Iterator[None]:
        """Save, then let something take its time, such as an evaluation; a signal ends it at once."""
        self.save()
        with self._watchdog.paused(), self._signals.at_once():
            yield

    def mark_best(self, score: float) -> None:
        """Keep the state that was saved last as the best one, if it is.

        Args:
            score: higher is better.
        """
        if self._saver is not None:
            self._saver.mark_best(score)
