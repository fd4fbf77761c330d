"""The record of a run: metrics.jsonl, pictures, environment.json, summary.json, and what `run.loggers` names."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from fsr_fast.errors import UserError
from fsr_fast.reporting.loggers import Logger, open_logger
from fsr_fast.runtime.files import finite, naming, write_json, write_png, write_text
from fsr_fast.runtime.log import LOGGER

METRICS_FILE = "metrics.jsonl"
PACKAGES = ("fsr_fast", "torch", "torchvision", "triton", "timm", "xformers", "nvidia-dali-cuda130", "numpy", "pillow")


class Tracker:
    """Writes the record of a run; create it on rank 0 only.

    Entries beyond `iteration` are dropped, so that a resumed run has one consistent record. Output that is only for
    display (loggers, pictures, environment.json) is given up with a warning if it cannot be written. Lines of
    metrics.jsonl wait until there is room again.

    Args:
        folder: run folder; created if missing.
        iteration: iterations that are done already; 0 for a new run.
        clock: seconds; replaced in tests.
        loggers: `run.loggers` of the configuration.
        config: the whole configuration, for the loggers.

    Raises:
        UserError: metrics.jsonl of an earlier start is damaged, or a logger does not start.
        OSError: metrics.jsonl cannot be written at the start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        iteration: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        lines = [line for line in read_metrics(folder) if line["iteration"] <= iteration]
        write_text(folder / METRICS_FILE, "".join(map(_json_line, lines)))
        self._metrics = _Lines(folder / METRICS_FILE)
        self._clock = clock
        self._began = clock() - (lines[-1]["wall_seconds"] if lines else 0.0)
        self._loggers: dict[str, Logger] = {}
        for name in loggers:
            with _only_shown(name):
                self._loggers[name] = open_logger(name, folder, iteration, config or {})
        with _only_shown("environment.json"):
            write_json(folder / "environment.json", environment())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, iteration: int, values: Mapping[str, float | Tensor]) -> None:
        """Write one line of metrics.jsonl, and the same scalars to the loggers.

        Args:
            iteration: iterations done.
            values: scalars by name, e.g. `loss/total`; non-finite values become null in the file.
        """
        scalars = {name: float(value) for name, value in values.items()}
        line = {"iteration": iteration, "wall_seconds": round(self._clock() - self._began, 3), **scalars}
        self._metrics.add(_json_line(line))
        self._show(lambda logger: logger.scalars(scalars, iteration))

    def pictures(self, iteration: int, grid: Image.Image, name: str = "pictures") -> Path | None:
        """Write a picture to the loggers and to `pictures/<name>_<iteration>.png` of the run folder.

        Args:
            iteration: iterations done.
            grid: picture, e.g. of `figures.picture_grid`.
            name: name of the series.

        Returns:
            The file; None if it could not be written.
        """
        path = self._folder / "pictures" / f"{name}_{iteration:06d}.png"
        self._show(lambda logger: logger.picture(name, grid, iteration))
        with _only_shown(str(path)):
            return write_png(path, grid)
        return None

    def summary(self, values: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all.

        Args:
            values: anything that JSON can hold; non-finite values become null.

        Returns:
            The file.
        """
        return write_json(self._folder / "summary.json", {**values, "wall_seconds": self._clock() - self._began})

    def close(self) -> None:
        """Write out what is buffered."""
        self._show(lambda logger: logger.close())
        self._metrics.close()

    def _show(self, write: Callable[[Logger], object]) -> None:
        loggers, self._loggers = self._loggers, {}
        for name, logger in loggers.items():
            with _only_shown(name, logger.errors):
                write(logger)
                self._loggers[name] = logger  # one that fails is dropped


class _Lines:
    """Appends whole lines to a file; lines that cannot be written wait for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("r+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def add(self, line: str) -> None:
        """Write the waiting lines and a new one."""
        held_up = bool(self._waiting)
        self._waiting += line.encode()
        try:
            self._write()
        except OSError as error:
            if not held_up:
                LOGGER.warning("%s: cannot be written (%s); its lines wait for room", self._path, error.strerror)

    def close(self) -> None:
        """Write the waiting lines.

        Raises:
            OSError: there is still no room.
        """
        with self._file, naming(self._path):
            self._write()

    def _write(self) -> None:
        written = 0
        try:
            self._file.seek(self._size)
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError:
            self._file.truncate(self._size)  # leave no partial line in the file
            raise
        self._size, self._waiting = self._size + written, b""


@contextmanager
def _only_shown(what: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or error
        LOGGER.warning("%s: cannot be written (%s); the training goes on without", what, reason)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run.

    Args:
        folder: run folder.

    Returns:
        One mapping per line, in order; empty without a file. A last line cut short by a crash is left out.

    Raises:
        UserError: a line before the last is not a JSON object with an iteration.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "iteration": int(line["iteration"]), "wall_seconds": float(line["wall_seconds"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if number < len(texts):
                raise UserError(
                    f"{path}: line {number} is not a JSON object with iteration and wall_seconds; "
                    "repair or remove the line, or move the file away"
                ) from None
    return lines


def environment() -> dict[str, Any]:
    """Return what a result depends on besides the configuration: versions, devices, commit (None if unknown)."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": _commit(),
    }


def _json_line(values: Mapping[str, Any]) -> str:
    return json.dumps(finite(values), allow_nan=False) + "\n"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", here.name)  # not tracked if installed inside another repository
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
