"""What keeps a run safe and ends it cleanly: lock, log, signals, watchdog, checkpoints, profile."""

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
"""Seconds after a signal during which several processes still wait for data, so that all of them stop at the same
iteration; schedulers wait at least 30 seconds before they kill."""


class Supervisor:
    """Surrounds the loop; every process opens its context.

    Args:
        run: folder, checkpoints, time-out.
        process: this process.
        state: returns the state to save, as of the last whole iteration.
        saved: iteration of the checkpoint that the run resumes from; None: a new run.
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
            place: what comes next.
        """
        self._watchdog.beat(place)

    def boundary(self, iteration: int) -> None:
        """Mark the boundary between two iterations, where a signal ends the loop.

        Args:
            iteration: iterations done.

        Raises:
            Stopped: a process received SIGTERM or SIGINT; the state is saved.
        """
        self._profiler.step()
        number = self._vote.cast(self._signals.caught)
        if number:
            stopped = Stopped(number)
            self.save_and_stop(stopped, iteration)
            raise stopped

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for data. A signal ends the wait: at once if this is the only process, else after `GRACE`."""
        with self._signals.at_once(grace=GRACE if self._process.world_size > 1 else 0.0):
            yield

    def save_and_stop(self, stopped: Stopped, iteration: int, *, together: bool = True) -> None:
        """Save the state for a process that is about to end.

        Args:
            stopped: why.
            iteration: iterations done.
            together: all processes are here. Otherwise none waits for the others: the first one saves, unless it
                holds only its part of the state.
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
            UserError: too many were not finite; the last good state is saved.
        """
        if in_row >= LIMIT:
            self.save()
            self.finish()
            raise not_finite(iteration, self._run.output)

    def save(self) -> None:
        """Save the state in the background."""
        if self._saver is not None or self._run.shard:
            began = time.perf_counter()
            state = self._state()
            if self._saver is not None:
                self._saver.save(state)
            self._waited += time.perf_counter() - began

    def saving_share(self) -> float:
        """Return the share of the time since the start that the training has waited for `save`."""
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
        """Save, then run something long, such as an evaluation, without the watchdog; a signal ends it at once."""
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
