"""Programs that show scalars and pictures during a run: TensorBoard, Weights & Biases, MLflow.

`run.loggers` names them, and a package is imported only if it is named. Environment variables say where each sends
its data: `WANDB_MODE=offline` keeps everything on this machine, and without `MLFLOW_TRACKING_URI` MLflow writes to the
folder `mlruns` beside the run folder.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fsr_fast.errors import UserError
from fsr_fast.runtime.files import write_text

PROJECT = "fsr_fast"
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
"""For each logger that is not always installed: module, and package to install."""


class Logger(Protocol):
    """Shows a run. On failure it raises one of `errors`; the training then goes on without the logger."""

    errors: tuple[type[Exception], ...]

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by name."""
        ...

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Take a picture."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...


def check_loggers(loggers: Sequence[str]) -> None:
    """Import the packages that loggers need.

    Args:
        loggers: `run.loggers` of the configuration.

    Raises:
        UserError: one is not installed.
    """
    for name in (logger.partition(":")[0] for logger in loggers):
        module, package = PACKAGES.get(name, (None, ""))
        try:
            if module:
                importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"run.loggers: {name} needs a package that is not installed ({error}); pip install {package}, or leave "
                f"{name} out"
            ) from None


def open_logger(logger: str, folder: Path, iteration: int, config: Mapping[str, Any]) -> Logger:
    """Start the record of a run in a logger, or continue it.

    Args:
        logger: an entry of `run.loggers`.
        folder: run folder. Its name is the run's; it stores the logger's id for the next start.
        iteration: iterations that are done already.
        config: the whole configuration.

    Raises:
        UserError: the logger does not start, for example without an account.
        OSError: TensorBoard's folder cannot be written.
    """
    kind, _, project = logger.partition(":")
    if kind == "tensorboard":
        from fsr_fast.reporting.board import Board  # reading a record needs no TensorBoard

        return Board(folder / "tensorboard", purge_step=iteration + 1)
    made = WandbLogger if kind == "wandb" else MlflowLogger
    path = folder / f".{kind}_id"
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    try:
        opened = made(project or PROJECT, folder, known, config)
    except Exception as error:  # of any kind, network errors included
        first = " ".join(str(error).split()[:40])
        raise UserError(
            f"run.loggers: {kind} does not start: {type(error).__name__}: {first}; to go on without a network: "
            f"{made.offline}; or leave {kind} out"
        ) from None
    write_text(path, f"{opened.id}\n")
    return opened


class WandbLogger:
    """A run of Weights & Biases."""

    offline = "WANDB_MODE=offline in the environment"

    def __init__(self, project: str, folder: Path, known: str | None, config: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        self.errors: tuple[type[Exception], ...] = (OSError, self._wandb.Error)
        self._run = self._wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            id=known,
            resume="allow" if known else None,
            config=dict(config),
        )
        self.id: str = self._run.id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""
        self._run.log(dict(values), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Take a picture."""
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Send or write what is buffered."""
        self._run.finish()


class MlflowLogger:
    """A run of an MLflow experiment."""

    offline = "leave MLFLOW_TRACKING_URI out of the environment"

    def __init__(self, project: str, folder: Path, known: str | None, config: Mapping[str, Any]) -> None:
        tracking = importlib.import_module("mlflow.tracking")
        entities = importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        self.errors: tuple[type[Exception], ...] = (
            OSError,
            importlib.import_module("mlflow.exceptions").MlflowException,
        )
        if (place := os.environ.get("MLFLOW_TRACKING_URI")) is None:
            place = (folder.absolute().parent / "mlruns").as_uri()
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # folders are no longer its default, but need least
        self._client = tracking.MlflowClient(place)
        if known is None:
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            known = self._client.create_run(number, run_name=folder.name).info.run_id
            params = [entities.Param(key, str(value)[:500]) for key, value in _flat(config)]
            for start in range(0, len(params), 100):  # as many as the service takes at once
                self._client.log_batch(known, params=params[start : start + 100])
        else:
            self._client.update_run(known, status="RUNNING")
        self.id: str = known

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""
        now = int(time.time() * 1000)
        names = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}  # it takes no `+`
        self._client.log_batch(self.id, [self._metric(name, value, now, step) for name, value in names.items()])

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Take a picture."""
        self._client.log_image(self.id, picture, key=name, step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.id)


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in config.items():
        for key, value in values.items():
            yield f"{section}.{key}", value
