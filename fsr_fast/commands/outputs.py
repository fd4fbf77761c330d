"""Where the results of a verb go without --output: to the run that the checkpoint belongs to."""

from pathlib import Path

from fsr_fast.runtime.checkpoint import FOLDER
from fsr_fast.runtime.run_folder import CONFIG_FILE


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder of a checkpoint, itself a run folder or a file; None where there is no run."""
    folder = checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint
    return folder if (folder / CONFIG_FILE).is_file() else None


def default_output(checkpoint: Path, name: str) -> Path:
    """Return where results of this name go: into the run, else into the current folder."""
    return (run_of(checkpoint) or Path()) / name


def evaluation_folder(checkpoint: Path) -> Path:
    """Return where an evaluation goes: a run's into the run, a file's into a folder there, or beside the file."""
    if checkpoint.is_dir():
        return run_of(checkpoint) or checkpoint
    return (run_of(checkpoint) or checkpoint.parent) / "evaluations" / checkpoint.stem
