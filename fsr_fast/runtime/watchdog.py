"""A watchdog: a process that hangs reports its stack and ends."""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.log import LOGGER

EXIT_CODE = 124


class Watchdog:
    """Ends this process with exit code 124 if too long passes between two signs of life.

    Its message names the process and its place, with the stack of every thread. All processes wait for
    one that hangs, so all report; the one whose stack is not in a collective operation is the culprit.

    Args:
        seconds: longest time between two signs; 0: no watching.
        process: this process.
    """

    def __init__(self, seconds: float, process: Process) -> None:
        self._seconds = seconds
        self._name = f"rank {process.rank} of {process.world_size} (host {socket.gethostname()}, process {os.getpid()})"
        self._paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("the start")

    def __enter__(self) -> Self:
        self.beat("the start")
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, place: str) -> None:
        """Show that the process is alive.

        Args:
            place: what comes next, e.g. `the data of iteration 7`.
        """
        self._place, self._beaten = place, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the watch for something of any length, such as an evaluation."""
        self._paused = True
        try:
            yield
        finally:
            self.beat(self._place)
            self._paused = False

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 10, 5.0)):
            if self._paused:
                faulthandler.cancel_dump_traceback_later()
                continue
            if time.monotonic() - self._beaten > self._seconds:
                LOGGER.critical(
                    "%s has not moved for %g s at %s\n%s", self._name, self._seconds, self._place, _stacks()
                )
                os._exit(EXIT_CODE)
            # if a hang holds the interpreter, this thread cannot run either, and faulthandler's timer reports
            faulthandler.dump_traceback_later(2 * self._seconds + 10, exit=True, file=sys.__stderr__ or 2)


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frame))}"
        for identity, frame in sys._current_frames().items()
        if identity != threading.get_ident()
    )
