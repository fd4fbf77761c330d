"""A loader that outlives its processes."""

import signal
import threading

from fsr_fast.dataloading.batch import Batch, TrainLoader
from fsr_fast.errors import UserError
from fsr_fast.runtime.log import LOGGER

LIMIT = 3
"""Deaths of loader processes in a run after which it gives up."""


class RestartingLoader:
    """Starts the loader's processes again where one of them has died; the stream goes on without a gap.

    Args:
        loader: whose position is exact.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self._deaths = 0
        self._alone = False

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: an image cannot be read, or loader processes die again and again.
        """
        while True:
            try:
                batch = next(self._loader)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                self._restart(" ".join(str(error).split()))
                continue
            if not self._alone and threading.current_thread() is threading.main_thread():
                # torch's handler would raise in the middle of a step; here, the death shows when the next batch is due
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._alone = True
            return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Stop the processes."""
        self._loader.close()

    def _restart(self, message: str) -> None:
        self._deaths += 1
        if self._deaths > LIMIT:
            raise UserError(
                f"a loader process died for the {self._deaths}th time ({message}); often the memory is short: "
                "lower data.workers, or look at the kernel's log"
            )
        LOGGER.warning("%s; the loader starts again at the same batch", message)
        state = self._loader.state_dict()
        self._loader.close()
        self._loader.load_state_dict(state)
