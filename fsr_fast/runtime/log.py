"""Messages of a run: warnings on the terminal, everything in one file per process."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from fsr_fast.errors import printable

LOGGER = logging.getLogger("fsr_fast")
FOLDER = "logs"


class _Terminal(logging.Handler):
    """Warnings of the first process and errors of all, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or not dist.is_initialized() or dist.get_rank() == 0:
            print(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr, flush=True)


LOGGER.setLevel(logging.INFO)
LOGGER.addHandler(_Terminal(logging.WARNING))


class _RankLog(logging.FileHandler):
    """A log file that is given up if it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the base class's name
        LOGGER.removeHandler(self)
        LOGGER.warning("%s: cannot be written (%s); the log ends here", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):  # from what could not be written before
            super().close()


@contextmanager
def rank_log(run: Path, rank: int) -> Iterator[Path]:
    """Also write all messages of this process to `logs/rank_<rank>.log` of the run folder.

    Args:
        run: run folder.
        rank: of this process.

    Returns:
        A context that yields the file. An error that leaves the context is recorded with its stack.
    """
    path = run / FOLDER / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = _RankLog(path, encoding="utf-8")
    except OSError as error:
        LOGGER.warning("%s: cannot be written (%s); this start has no log", path, error.strerror)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield path
    except Exception as error:
        LOGGER.info("ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
