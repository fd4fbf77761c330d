"""Requests to stop: SIGTERM and SIGINT end a run after a checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist


class Stopped(SystemExit):
    """A signal requested the end; the exit code is 128 + its number, 143 for SIGTERM and 130 for SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Signals:
    """Records SIGTERM and SIGINT while its context is open.

    Outside torchrun, which forwards the terminal's signals itself, a second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.caught = 0
        """Number of the first signal; 0: none."""
        self._grace: float | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
            self._former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, *, grace: float = 0.0) -> Iterator[None]:
        """Within this context, before which the state must be saved, a signal raises `Stopped` immediately.

        Args:
            grace: seconds that the context then still has to end without an error.
        """
        self._grace = grace
        try:
            if self.caught:
                self._stop()
            yield
        finally:
            self._grace = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop()

    def _stop(self) -> None:
        if self._grace == 0:
            raise Stopped(self.caught)
        if self._grace and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, self._grace, self._grace)  # again, in case the error is swallowed

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._grace is not None:
            raise Stopped(self.caught)


class Vote:
    """A number per process and iteration; all processes learn the largest one, one iteration later.

    The exchange runs on the CPU while the next iteration is computed: nothing waits for a GPU.
    """

    def __init__(self) -> None:
        self._group: Any = (
            dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        )
        self._pending: tuple[Any, torch.Tensor] | None = None

    def cast(self, number: int) -> int:
        """Submit this process's number; return the largest of the previous iteration, or the number itself if alone."""
        if self._group is None:
            return number
        ballot = torch.tensor(number)
        earlier, self._pending = (
            self._pending,
            (dist.all_reduce(ballot, dist.ReduceOp.MAX, self._group, async_op=True), ballot),
        )
        if earlier is None:
            return 0
        earlier[0].wait()
        return int(earlier[1])

    def meet(self) -> None:
        """Wait until every process has arrived here."""
        if self._group is not None:
            dist.barrier(self._group)
