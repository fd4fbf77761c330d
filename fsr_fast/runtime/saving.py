"""Saving in the background: a copy in host memory, a thread that writes, and which checkpoints are kept."""

import errno
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fsr_fast.config import RunConfig
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import FOLDER, list_checkpoints, write_checkpoint
from fsr_fast.runtime.files import atomic_path, write_json
from fsr_fast.runtime.log import LOGGER

BEST = "best.pt"
BEST_SCORE = "best.json"
_CANNOT_LINK = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error numbers of file systems without links, such as FAT and some object stores."""


class Saver:
    """Writes the checkpoints of a run; create it on rank 0 only, once the run folder is locked.

    A save copies the state and returns; a thread writes it. A save that fails is reported, the training goes on, and
    the next one tries again.

    Args:
        run: folder, and which checkpoints are kept.
        saved: iteration of the checkpoint that the run resumed from; None: a new run.
    """

    def __init__(self, run: RunConfig, saved: int | None = None) -> None:
        self._run = run.output
        self._keep, self._keep_every = run.keep_checkpoints, run.keep_every
        self._copy = _HostCopy()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._saved = saved
        self._failure: OSError | None = None
        for partial in (self._run / FOLDER).glob("*.partial"):
            partial.unlink()  # left by a process that was killed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._join()
        self._writer.shutdown()

    def save(self, state: dict[str, Any]) -> None:
        """Copy the state and write it in the background.

        Args:
            state: from `TrainState.state`. An iteration that is already saved is skipped.
        """
        if state["iteration"] == self._saved:
            return
        self._join()
        copied, event = self._copy.take(state)
        self._saved = state["iteration"]
        self._pending = self._writer.submit(self._write, copied, event)

    def finish(self) -> None:
        """Wait until the last state is on disk.

        Raises:
            UserError: it could not be written.
        """
        self._join()
        if self._failure is not None:
            raise UserError(
                f"{self._run / FOLDER}: the last checkpoint could not be written ({self._failure.strerror}); "
                "free space or fix the permissions, and repeat the command: it resumes from the last good checkpoint"
            )

    def mark_best(self, score: float) -> None:
        """Keep the last saved checkpoint as `best.pt` if its score is the highest of the run.

        Args:
            score: of the network saved last; higher is better, nan the worst.
        """
        link, record = self._run / FOLDER / BEST, self._run / FOLDER / BEST_SCORE
        self._join()
        if self._failure is not None or (link.exists() and not score > _read_score(record)):
            return
        try:
            with atomic_path(link) as partial:
                self._link(f"{self._saved:07d}.pt", partial)
            write_json(record, {"iteration": self._saved, "seg_miou": score})
        except OSError as error:
            LOGGER.warning("%s: cannot be written (%s); the training goes on without", link, error.strerror)

    def _link(self, name: str, link: Path) -> None:
        try:
            link.symlink_to(name)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            LOGGER.warning("the file system has no links (%s): %s is a copy", error.strerror, BEST)
            shutil.copyfile(link.parent / name, link)

    def _join(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            LOGGER.info("checkpoint %s", pending.result())
            self._failure = None
        except OSError as error:
            self._failure, self._saved = error, None
            LOGGER.warning(
                "%s: no checkpoint at this iteration (%s); the training goes on", self._run / FOLDER, error.strerror
            )

    def _write(self, state: dict[str, Any], event: torch.cuda.Event | None) -> Path:
        if event is not None:
            event.synchronize()
        path = write_checkpoint(self._run, state)
        self._prune(path)
        return path

    def _prune(self, newest: Path) -> None:
        found = list_checkpoints(self._run)
        position = found.index(newest)
        best = (newest.parent / BEST).resolve()
        for path in found[: max(position + 1 - self._keep, 0)]:
            lasting = self._keep_every > 0 and int(path.stem) % self._keep_every == 0
            if not lasting and path.resolve() != best:
                path.unlink()
        for path in found[position + 1 :]:
            path.unlink()  # this run resumed from before them, because they are damaged


class _HostCopy:
    """Copies states into reusable host memory."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """Copy a state; from a GPU, the copy is complete once the event has occurred."""
        copied = self._walk(state, ())
        if not any(buffer.is_pinned() for buffer in self._buffers.values()):
            return copied, None
        event = torch.cuda.Event()
        event.record()
        return copied, event

    def _walk(self, value: Any, key: tuple[object, ...]) -> Any:
        if isinstance(value, Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {name: self._walk(part, (*key, name)) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._walk(part, (*key, index)) for index, part in enumerate(value))
        return value


def _read_score(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["seg_miou"])
    except (OSError, ValueError, TypeError, KeyError):
        return float("-inf")
