"""The record of a run, read back from its folder for reports and model cards."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fsr_fast.config import read_yaml
from fsr_fast.errors import UserError
from fsr_fast.models.pretrained import StartWeights
from fsr_fast.reporting.tracking import METRICS_FILE, read_metrics
from fsr_fast.runtime.run_folder import CONFIG_FILE


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True)


class _ClassScores(_Checked):
    iou: float | None = None


class _Scores(_Checked):
    mean_iou: float | None = None
    classes: dict[str, _ClassScores]


class _ClassLabels(_Checked):
    ap: float | None
    f1: float | None
    images: int


class _Labels(_Checked):
    mean_ap: float | None
    mean_f1: float | None
    images: int
    classes: dict[str, _ClassLabels]


class _Summary(_Checked):
    iterations: int | None = None
    images_per_second: float | None = None
    wall_seconds: float | None = None
    results: dict[str, _Scores] = {}
    labels: _Labels | None = None
    start_weights: StartWeights | None = None


class _Environment(_Checked):
    packages: dict[str, Any] = {}


@dataclass(frozen=True)
class RunRecord:
    """The record of one run; whatever it has not reached yet is empty."""

    name: str
    """Name of the folder."""
    folder: Path
    config: dict[str, Any]
    """The resolved configuration, sections by name."""
    environment: dict[str, Any]
    """environment.json."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    summary: dict[str, Any]
    """summary.json; empty before the run's end."""
    pictures: list[tuple[int, Path]]
    """Training pictures, by iteration."""

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Scores of the final evaluation by kind (`pseudo`, `seg`, …); empty before the run's end."""
        return self.summary.get("results", {})

    @property
    def labels(self) -> dict[str, Any]:
        """Scores of the image labels, for a run without masks; else empty."""
        return self.summary.get("labels") or {}


def read_run(folder: Path) -> RunRecord:
    """Read the record of a run.

    Args:
        folder: run folder.

    Raises:
        UserError: it is not a run folder, or one of its files is damaged.
    """
    if not _holds(folder, folder / CONFIG_FILE):
        raise UserError(f"{folder}: not a run (it has no {CONFIG_FILE}); give the folder of a run, its run.output")
    paths = (path for path in (folder / "pictures").glob("*.png") if _holds(folder, path))
    numbered = ((re.fullmatch(r"training_(\d{1,18})", path.stem), path) for path in paths)
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        config=_read_config(folder / CONFIG_FILE),
        environment=_read_json(folder, "environment.json", _Environment),
        metrics=read_metrics(folder) if _holds(folder, folder / METRICS_FILE) else [],
        summary=_read_json(folder, "summary.json", _Summary),
        pictures=sorted((int(match[1]), path) for match, path in numbered if match),
    )


def _holds(folder: Path, path: Path) -> bool:
    """Return whether a file exists inside the run: a page must not show targets of links in an untrusted folder."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _read_config(path: Path) -> dict[str, Any]:
    sections = read_yaml(path, whole=True)
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name}: expected a section; fix the file")
    return sections


def _read_json(folder: Path, name: str, form: type[_Checked]) -> dict[str, Any]:
    path = folder / name
    if not _holds(folder, path):
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fix the file or move it away") from None
    try:
        form.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{path}: {place}: {first['msg']}; fix the file or move it away") from None
    return content
