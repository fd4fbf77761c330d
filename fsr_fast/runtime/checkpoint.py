"""Checkpoints: everything that must survive, in one place, and the file that holds it.

A checkpoint is one file, `checkpoints/<iteration>.pt` of the run folder: a zip archive of tensors and plain values as
written by `torch.save`, whose comment holds the SHA-256 of all bytes before it. Loading it runs no pickled code.
Random draws need no state: they are functions of seed, process and iteration.
"""

import hashlib
import mmap
import os
import re
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from fsr_fast.errors import UserError
from fsr_fast.runtime.files import atomic_file
from fsr_fast.runtime.log import LOGGER
from fsr_fast.runtime.sharding import gather, scatter
from fsr_fast.runtime.tensors import read_tensors

FORMAT = "fsr_fast checkpoint 2"
FOLDER = "checkpoints"
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_COMMENT_LENGTH = struct.Struct("<H")
"""Last field of a zip archive without comment: 0."""


class Stateful(Protocol):
    """Something with a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Load the state."""
        ...


@dataclass(frozen=True)
class TrainState:
    """Everything that must survive an interruption, besides the number of iterations done."""

    student: Stateful
    """The network."""
    teacher: Stateful
    """Average of the projector, or of the whole network."""
    centres: Stateful
    """Patch centre and class centre."""
    optimiser: Stateful
    """Moments, step counts, base rates."""
    loader: Stateful
    """Position in the stream of images, over all processes."""
    guard: Stateful
    """Number of skipped steps."""

    def state(self, iteration: int, description: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint; with sharded weights, all processes call it.

        Args:
            iteration: iterations done.
            description: configuration and class names, from which the network can be rebuilt.
        """
        parts = {field.name: gather(getattr(self, field.name).state_dict()) for field in fields(self)}
        return {"format": FORMAT, "iteration": iteration, **description, **parts}

    def restore(self, state: dict[str, Any], origin: Path) -> int:
        """Load everything.

        Args:
            state: of a checkpoint.
            origin: its file, for messages.

        Returns:
            Iterations done.

        Raises:
            UserError: the state is not this run's.
        """
        try:
            for field in fields(self):
                owner = getattr(self, field.name)
                owner.load_state_dict(scatter(state[field.name], owner))
            return int(state["iteration"])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{origin}: does not fit this run ({' '.join(str(error).split()[:30])}); delete it"
            ) from None


def write_checkpoint(run: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint whole or not at all.

    Args:
        run: run folder.
        state: `iteration`, and whatever else must survive; only tensors and plain values.

    Returns:
        The file.

    Raises:
        OSError: no space, or no permission; no partial file is left.
    """
    path = run / FOLDER / f"{state['iteration']:07d}.pt"
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, **state}, file)
        file.seek(-_COMMENT_LENGTH.size, os.SEEK_END)
        file.write(_COMMENT_LENGTH.pack(_COMMENT))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        file.write(_MARK + digest.hexdigest().encode())
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    numbered = (path for path in (run / FOLDER).glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem))
    return sorted(numbered, key=lambda path: int(path.stem))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a run folder, whose newest intact checkpoint is read, or a file.

    Raises:
        UserError: there is none, or the file is damaged or not a checkpoint.
    """
    return read_newest(path)[0] if path.is_dir() else _read(path)


def read_newest(run: Path) -> tuple[dict[str, Any], Path]:
    """Read the newest intact checkpoint of a run folder, and warn of damaged ones.

    Args:
        run: run folder.

    Returns:
        Its content and its file.

    Raises:
        UserError: there is none.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(run)):
        try:
            state = _read(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            LOGGER.warning("%s; %s is read instead", message, path.name)
        return state, path
    if damaged:
        raise UserError(f"{damaged[0]}; no other checkpoint is left: delete the folder to start over")
    raise UserError(f"{run}: no checkpoint in this folder; expected {FOLDER}/<iteration>.pt of a run")


def has_checksum(path: Path) -> bool:
    """Return whether a file ends like a run's checkpoint; its content is not read."""
    if not path.is_file() or path.stat().st_size <= _COMMENT:
        return False
    with path.open("rb") as file:
        file.seek(-_COMMENT, os.SEEK_END)
        return file.read(len(_MARK)) == _MARK


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a run folder or a .pt file")
    summed = _check_sum(path)
    try:
        state = read_tensors(path)
    except Exception as error:  # a broken file can raise anything
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {first_line})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of a run; expected the format {FORMAT!r}")
    if type(state.get("iteration")) is not int or not 0 <= state["iteration"] < 2**63:
        raise UserError(f"{path}: not a readable checkpoint (its iteration is {state.get('iteration')!r})")
    if not summed:
        raise UserError(f"{path}: not a readable checkpoint (its checksum is gone)")
    return state


def _check_sum(path: Path) -> bool:
    """Compare the file with its checksum; return whether it has one."""
    if path.stat().st_size <= _COMMENT:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        comment = content[-_COMMENT:]
        if not comment.startswith(_MARK):
            return False
        with memoryview(content) as view, view[:-_COMMENT] as summed:
            digest = hashlib.sha256(summed).hexdigest()
    if comment != _MARK + digest.encode():
        raise UserError(f"{path}: not a readable checkpoint (its bytes differ from its checksum)")
    return True
