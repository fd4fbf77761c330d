"""The record of a run: metrics.jsonl, TensorBoard, pictures, environment.json and summary.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fsr_fast.errors import UserError
from fsr_fast.reporting.wandb_mirror import Mirror
from fsr_fast.runtime.files import finite, write_json, write_png, write_text

PACKAGES = ("fsr_fast", "torch", "torchvision", "triton", "timm", "xformers", "nvidia-dali-cuda130", "numpy", "pillow")


class Tracker:
    """Writes the record of a run; create it on rank 0 alone.

    What the folder holds beyond `iteration` is dropped, so that a resumed run tells one story.

    Args:
        folder: run folder; made where it is missing.
        iteration: iterations that are done already; 0 for a new run.
        clock: seconds; replaced in tests.
        mirror: takes the scalars, too.

    Raises:
        UserError: metrics.jsonl of an earlier start is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        iteration: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        mirror: Mirror | None = None,
    ) -> None:
        self._mirror = mirror
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        lines = [line for line in read_metrics(folder) if line["iteration"] <= iteration]
        write_text(_metrics_path(folder), "".join(map(_json_line, lines)))
        self._metrics = _metrics_path(folder).open("a", encoding="utf-8")
        self._clock = clock
        self._began = clock() - (lines[-1]["wall_seconds"] if lines else 0.0)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        write_json(folder / "environment.json", environment())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, iteration: int, values: Mapping[str, float | Tensor]) -> None:
        """Write one line of metrics.jsonl and the same scalars to TensorBoard.

        Args:
            iteration: iterations done.
            values: scalars by name, e.g. `loss/total`; what is not finite becomes null in the file.
        """
        scalars = {name: float(value) for name, value in values.items()}
        line = {"iteration": iteration, "wall_seconds": round(self._clock() - self._began, 3), **scalars}
        self._metrics.write(_json_line(line))
        self._metrics.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, iteration)
        if self._mirror is not None:
            self._mirror.log(scalars, step=iteration)

    def pictures(self, iteration: int, grid: Image.Image, name: str = "pictures") -> Path:
        """Write a picture to TensorBoard and to `pictures/<name>_<iteration>.png` of the run folder.

        Args:
            iteration: iterations done.
            grid: picture, e.g. of `figures.picture_grid`.
            name: name of the series.

        Returns:
            The file.
        """
        path = self._folder / "pictures" / f"{name}_{iteration:06d}.png"
        write_png(path, grid)
        self._board.add_image(name, np.asarray(grid.convert("RGB")), iteration, dataformats="HWC")
        return path

    def summary(self, values: Mapping[str, Any]) -> Path:
        """Write summary.json, whole or not at all.

        Args:
            values: anything that JSON holds; what is not finite becomes null.

        Returns:
            The file.
        """
        return write_json(self._folder / "summary.json", {**values, "wall_seconds": self._clock() - self._began})

    def close(self) -> None:
        """Write out what is buffered."""
        self._metrics.close()
        self._board.close()
        if self._mirror is not None:
            self._mirror.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run.

    Args:
        folder: run folder.

    Returns:
        One mapping a line, in order; none where there is no file. A last line that a crash cut short is left out.

    Raises:
        UserError: a line before the last is not a JSON object with an iteration.
    """
    path = _metrics_path(folder)
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({**line, "iteration": int(line["iteration"]), "wall_seconds": float(line["wall_seconds"])})
        except (ValueError, TypeError, KeyError):
            if number < len(texts):
                raise UserError(
                    f"{path}: line {number} is not a JSON object with iteration and wall_seconds; "
                    "mend or remove the line, or move the file away"
                ) from None
    return lines


def environment() -> dict[str, Any]:
    """Return what a result depends on beside the configuration: versions, devices, commit (None where unknown)."""
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


def _metrics_path(folder: Path) -> Path:
    return folder / "metrics.jsonl"


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
    tracked = _git(here.parent, "ls-files", here.name)  # installed below somebody else's repository: not tracked there
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
