"""Weights & Biases beside the run folder; the package is imported only where a project is named."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fsr_fast.errors import UserError
from fsr_fast.runtime.files import write_text

ID_FILE = ".wandb_id"


class Mirror(Protocol):
    """What takes the scalars of a run, too."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of an iteration."""
        ...

    def finish(self) -> None:
        """Write out what is buffered."""
        ...


def open_mirror(project: str | None, folder: Path, config: dict[str, Any]) -> Mirror | None:
    """Start or go on with a run of Weights & Biases.

    Args:
        project: its name; none: nothing is imported and nothing sent.
        folder: run folder; its name is the run's, and it keeps the run's id for the next start.
        config: the whole configuration.

    Raises:
        UserError: the package is not installed.
    """
    if project is None:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "run.wandb: the package wandb is not installed; pip install wandb, or leave the key out"
        ) from None
    path = folder / ID_FILE
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    run = wandb.init(
        project=project, name=folder.name, dir=str(folder), id=known, resume="allow" if known else None, config=config
    )
    write_text(path, f"{run.id}\n")
    mirror: Mirror = run
    return mirror
