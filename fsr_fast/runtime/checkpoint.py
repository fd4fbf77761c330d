"""Checkpoints: all that must survive, in one place.

A checkpoint is one file of tensors and plain values, `checkpoints/<iteration>.pt` of the run folder; loading it
runs no pickled code. It holds the student, the teacher (projector average, or the whole network), the centres,
the optimiser, the position of the loader, and the configuration and class names that describe the network.
Random draws need no state: they are functions of seed, process and iteration.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from fsr_fast.errors import UserError

FORMAT = "fsr_fast checkpoint 1"
FOLDER = "checkpoints"
KEPT = 2
"""Number of newest checkpoints that stay."""


def write_checkpoint(run: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint whole or not at all, then drop all but the newest.

    Args:
        run: run folder.
        state: `iteration`, and whatever else must survive; tensors and plain values alone.

    Returns:
        The file.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{state['iteration']:07d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    for old in list_checkpoints(run)[:-KEPT]:
        old.unlink()
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Give the checkpoints of a run folder, oldest first."""
    numbered = (path for path in (run / FOLDER).glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem))
    return sorted(numbered, key=lambda path: int(path.stem))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a run folder, whose newest checkpoint is read, or a file.

    Raises:
        UserError: there is none, or the file is damaged or something else.
    """
    if path.is_dir():
        found = list_checkpoints(path)
        if not found:
            raise UserError(f"{path}: no checkpoint in this folder; expected {FOLDER}/<iteration>.pt of a run")
        path = found[-1]
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a run folder or a .pt file")
    try:
        state = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a broken file raises whatever its bytes happen to mean
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {first_line})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of a run; expected the format {FORMAT!r}")
    return state
