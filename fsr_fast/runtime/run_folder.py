"""The run folder: which run owns it, and its contents."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from fsr_fast.config import Config, build_config, dump_config, read_yaml
from fsr_fast.errors import UserError
from fsr_fast.runtime import locks
from fsr_fast.runtime.checkpoint import FOLDER, list_checkpoints, read_newest
from fsr_fast.runtime.files import naming, write_text
from fsr_fast.runtime.locks import BusyError
from fsr_fast.runtime.log import FOLDER as LOGS

CONFIG_FILE = "config.yaml"
PARTIAL_CONFIG = f".{CONFIG_FILE}.partial"
LOCK_FILE = ".lock"
_BEFORE = {LOCK_FILE, PARTIAL_CONFIG, LOGS}
"""What a run folder may hold before the configuration."""

_MAY_DIFFER = (
    "evaluate",
    "data.root",
    "data.workers",
    "data.max_bad_fraction",
    "data.fingerprint",
    "run.shard",
    *(
        f"run.{key}"
        for key in ("output", "device", "resume", "keep_checkpoints", "keep_every", "timeout", "profile", "loggers")
    ),
    *(f"run.{key}_every" for key in ("log", "picture", "checkpoint", "evaluate")),
)
"""Sections and keys that do not change what is computed, so that a resumed run may differ in them."""


def claim_run_folder(config: Config, *, locked: bool = False) -> Path | None:
    """Check that the run folder is free or holds this very run, and find the checkpoint to resume from.

    Args:
        config: of the run that is about to start.
        locked: this process holds the lock of the folder.

    Returns:
        The newest checkpoint, or None for a new run.

    Raises:
        UserError: the folder holds another run or something else, or a run where `run.resume` is off.
    """
    folder = config.run.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output: {folder} is a file; give a folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.output: {existing} cannot be written to; fix its permissions or give another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not locked and os.path.lexists(folder / LOCK_FILE):
        with _locked(folder, shared=True):  # shared: all processes of this run check at the same time
            pass
    if not (folder / CONFIG_FILE).is_file():
        if {path.name for path in folder.iterdir()} <= _BEFORE:
            return None  # a run that was killed before it wrote anything else
        raise UserError(
            f"run.output: {folder} is not empty and not a run (it has no {CONFIG_FILE}); give another folder"
        )
    checkpoints = list_checkpoints(folder)
    recorded: Any = read_yaml(folder / CONFIG_FILE, whole=True)
    if not recorded:  # empty, as after a power failure
        if not checkpoints:
            return None
        recorded = read_newest(folder)[0]["config"]
    recorded = build_config(recorded, str(folder / CONFIG_FILE)).model_dump(mode="json")
    key = _first_difference(recorded, config.model_dump(mode="json"))
    if key is not None:
        raise UserError(
            f"run.output: {folder} holds another run: {key} differs; give another --run.output, "
            "or delete the folder, or repeat the command that made it"
        )
    if checkpoints and not config.run.resume:
        raise UserError(f"run.output: {folder} holds checkpoints and run.resume is off; give another folder")
    return checkpoints[-1] if checkpoints else None


def open_run_folder(config: Config) -> None:
    """Create the run folder and write the resolved configuration of this start to it."""
    folder = config.run.output
    write_text(folder / CONFIG_FILE, dump_config(config))
    (folder / FOLDER).mkdir(exist_ok=True)


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Lock the run folder. The kernel releases the lock however this process ends.

    Args:
        folder: created if missing.

    Raises:
        UserError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as file:
        with naming(folder / LOCK_FILE):
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        yield


@contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[FileIO]:
    try:
        with locks.locked(folder / LOCK_FILE, shared=shared) as file:
            yield file
    except BusyError as error:
        raise UserError(
            f"run.output: another process trains in {folder} ({error}); wait for it, stop it, or give another folder"
        ) from None


def _first_difference(recorded: Any, present: Any, path: str = "") -> str | None:
    if path in _MAY_DIFFER:
        return None
    if isinstance(recorded, dict) and isinstance(present, dict):
        for key in {**recorded, **present}:
            found = _first_difference(recorded.get(key), present.get(key), f"{path}.{key}".removeprefix("."))
            if found:
                return found
        return None
    return None if recorded == present else f"{path} ({recorded!r} there, {present!r} now)"
