"""A loader that survives the death of its processes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fsr_fast.dataloading.batch import Batch, TrainLoader
from fsr_fast.errors import UserError
from fsr_fast.runtime.log import LOGGER

LIMIT = 3
"""Number of deaths of loader processes in a run after which it gives up."""


class RestartingLoader:
    """Restarts the loader's processes if one of them dies; the stream goes on without a gap.

    Args:
        loader: has an exact position.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self._deaths = Deaths()

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: an image cannot be read, or loader processes keep dying.
        """
        while True:
            position = self._loader.state_dict()
            try:
                with deaths_raise():
                    return next(self._loader)
            except RuntimeError as error:
                self._deaths.count(error)
                self._loader.close()
                self._loader.load_state_dict(position)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the processes."""
        self._loader.close()


class Deaths:
    """Counts the deaths of loader processes."""

    def __init__(self) -> None:
        self._number = 0

    def count(self, error: RuntimeError) -> None:
        """Note that a process has died.

        Raises:
            RuntimeError: the error is of another kind.
            UserError: too many have died.
        """
        message = " ".join(str(error).split())
        if "DataLoader worker" not in message:
            raise error
        self._number += 1
        if self._number > LIMIT:
            raise UserError(
                f"a loader process died for the {self._number}th time ({message}), often for lack of memory: "
                "lower data.workers, or look at the kernel's log"
            )
        LOGGER.warning("%s; the loader starts again at the same place", message)


_raises = False
_torch: Any = None
"""The SIGCHLD handler that torch installs with its first loader: it raises wherever the program is."""


@contextmanager
def deaths_raise() -> Iterator[None]:
    """Wait for a loader: the death of one of its processes raises RuntimeError here, and nowhere else.

    Without a handler, a process that dies while writing leaves its reader waiting for ever.
    """
    global _raises, _torch
    _raises = True
    try:
        _note_death(signal.SIGCHLD, None)  # for one that died earlier
        yield
    finally:
        _raises = False
        if threading.current_thread() is threading.main_thread():
            present = signal.getsignal(signal.SIGCHLD)
            if callable(present) and present is not _note_death:
                _torch = present
                signal.signal(signal.SIGCHLD, _note_death)


def _note_death(number: int, frame: FrameType | None) -> None:
    if _raises and _torch is not None:
        _torch(number, frame)
