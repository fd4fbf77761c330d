"""The run folder: whose it is, and what lies in it."""

from pathlib import Path
from typing import Any

from fsr_fast.config import Config, dump_config, read_yaml
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import FOLDER, list_checkpoints

CONFIG_FILE = "config.yaml"

_MAY_DIFFER = (
    "evaluate",
    "data.root",
    "data.workers",
    *(f"run.{key}" for key in ("output", "device", "resume")),
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
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"run.output: {folder} is not empty and is no run (it has no {CONFIG_FILE}); give another folder"
        )
    key = _first_difference(read_yaml(folder / CONFIG_FILE), config.model_dump(mode="json"))
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
    """Make the run folder and write the resolved configuration into it."""
    folder = config.run.output
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_FILE).is_file():
        partial = folder / f".{CONFIG_FILE}.partial"
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(folder / CONFIG_FILE)


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
