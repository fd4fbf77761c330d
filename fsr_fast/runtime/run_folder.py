"""The run folder: whose it is, and what lies in it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsr_fast.config import Config, build_config, dump_config, read_yaml
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import FOLDER, list_checkpoints
from fsr_fast.runtime.files import write_text
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
    "run.shard",
    *(
        f"run.{key}"
        for key in ("output", "device", "resume", "keep_checkpoints", "keep_every", "timeout", "profile", "wandb")
    ),
    *(f"run.{key}_every" for key in ("log", "picture", "checkpoint", "evaluate")),
)
"""Sections and keys that do not change what is computed, so that a resumed run may differ in them."""


def claim_run_folder(config: Config) -> Path | None:
    """Check that the run folder is free or holds this very run, and find the checkpoint to go on from.

    Args:
        config: of the run that is about to start.

    Returns:
        The newest checkpoint, or none for a new run.

    Raises:
        UserError: the folder holds another run or something else, or a run where `run.resume` is off.
    """
    folder = config.run.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output: {folder} is a file; give a folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.output: {existing} cannot be written to; mend its permissions or give another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    with _locked(folder, fcntl.LOCK_SH):  # shared: all processes of this run look at once
        pass
    if not (folder / CONFIG_FILE).is_file():
        if {path.name for path in folder.iterdir()} <= _BEFORE:
            return None  # a run that was killed before it wrote anything else
        raise UserError(
            f"run.output: {folder} is not empty and is no run (it has no {CONFIG_FILE}); give another folder"
        )
    recorded = build_config(read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    key = _first_difference(recorded.model_dump(mode="json"), config.model_dump(mode="json"))
    if key is not None:
        raise UserError(
            f"run.output: {folder} holds another run: {key} differs; give another --run.output, "
            "or delete the folder, or repeat the command that made it"
        )
    checkpoints = list_checkpoints(folder)
    if checkpoints and not config.run.resume:
        raise UserError(f"run.output: {folder} holds checkpoints and run.resume is off; give another folder")
    return checkpoints[-1] if checkpoints else None


def open_run_folder(config: Config) -> None:
    """Make the run folder and write the resolved configuration of this start into it."""
    folder = config.run.output
    write_text(folder / CONFIG_FILE, dump_config(config))
    (folder / FOLDER).mkdir(exist_ok=True)


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Keep the run folder from other runs. The kernel lets go of it when this process ends, however it ends.

    Args:
        folder: made where it is missing.

    Raises:
        UserError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_FILE).touch()
    with _locked(folder, fcntl.LOCK_EX):
        yield


_held: set[int] = set()


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    path = folder / LOCK_FILE
    if not path.exists():
        yield
        return
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.output: another process trains in {folder} ({file.read().strip()}); "
                "wait for it, stop it, or give another folder"
            ) from None
        if kind == fcntl.LOCK_EX:
            file.truncate()
            file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
            file.flush()
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())


def _let_go() -> None:
    """Drop the locks in a forked process: a loader process that outlives its parent must not keep the folder."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


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
