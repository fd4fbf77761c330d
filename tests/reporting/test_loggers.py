"""What TensorBoard, Weights & Biases and MLflow are shown of a run."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fsr_fast.config import build_config
from fsr_fast.errors import UserError
from fsr_fast.reporting.tracking import Tracker, read_metrics
from fsr_fast.train import main as train
from tests import helpers


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    root = helpers.write_dataset(tmp_path / "data")

    def write(*loggers: str) -> str:
        run = {"loggers": list(loggers), "log_every": 1, "picture_every": 2}
        values = helpers.values({"run": run, "optim": {"iterations": 3}}, root=root, output=tmp_path / "runs/first")
        return str(helpers.write_config(tmp_path / "recipe.yaml", values))

    return write


class FakeRun:
    def __init__(self, **options) -> None:
        self.id, self.options, self.lines, self.finished = "abc123", options, [], False

    def log(self, values, step):
        self.lines.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the package, whose service nobody can reach here."""
    module = ModuleType("wandb")
    module.runs, module.Error = [], type("Error", (Exception,), {})
    module.init = lambda **options: module.runs.append(FakeRun(**options)) or module.runs[-1]
    module.Image = lambda picture: ("picture", picture.size)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_scalars_and_pictures_and_goes_on_with_the_same_run(recipe, tmp_path, wandb):
    path = recipe("wandb:weeds")
    train(["--config", path])
    train(["--config", path])
    first, second = wandb.runs
    assert first.finished
    assert (first.options["project"], first.options["name"], first.options["id"]) == ("weeds", "first", None)
    assert first.options["config"]["optim"]["iterations"] == 3
    assert first.options["dir"] == str(tmp_path / "runs/first")
    assert (second.options["id"], second.options["resume"]) == ("abc123", "allow")
    lines = read_metrics(tmp_path / "runs/first")
    assert [(step, values["loss/total"]) for step, values in first.lines if "loss/total" in values] == [
        (line["iteration"], line["loss/total"]) for line in lines
    ]
    assert [(step, *values) for step, values in first.lines if "loss/total" not in values] == [
        (2, "training"),
        (3, "validation"),
    ]
    assert not (tmp_path / "runs/first/tensorboard").exists(), "only what is named is written"


def test_mlflow_gets_settings_scalars_and_pictures_and_goes_on_with_the_same_run(recipe, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    path = recipe("tensorboard", "mlflow:weeds")
    train(["--config", path])
    train(["--config", path])
    client = tracking.MlflowClient((tmp_path / "runs/mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("weeds").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["optim.iterations"] == "3"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss/total")]
    assert history == [(line["iteration"], line["loss/total"]) for line in read_metrics(tmp_path / "runs/first")]
    pictures = [Path(file.path).name for file in client.list_artifacts(run.info.run_id, "images")]
    assert {re.split("[%+]", name)[0] for name in pictures} == {"training", "validation"}
    assert any((tmp_path / "runs/first/tensorboard").iterdir())


def test_mlflow_takes_names_and_values_that_it_has_no_form_for(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    with Tracker(tmp_path / "run", loggers=["mlflow"], config={"run": {}}) as tracker:
        tracker.log(3, {"seg+crf_miou": 50.0, "loss/total": math.nan})
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fsr_fast").experiment_id])
    assert run.data.metrics["seg_crf_miou"] == 50.0
    assert math.isnan(run.data.metrics["loss/total"])


def test_mlflow_writes_where_its_own_variable_says_and_keeps_one_experiment(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    place = (tmp_path / "elsewhere").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("first", "second"):
        with Tracker(tmp_path / name, loggers=["mlflow"], config={"run": {"long": "x" * 10_000}}):
            pass
    client = tracking.MlflowClient(place)
    runs = client.search_runs([client.get_experiment_by_name("fsr_fast").experiment_id])
    assert {run.info.run_name for run in runs} == {"first", "second"}
    assert {len(run.data.params["run.long"]) for run in runs} == {500}, "the most that older servers take"
    assert not (tmp_path / "mlruns").exists()


def test_a_run_of_mlflow_that_goes_on_is_running_and_one_that_fails_is_given_up(tmp_path, monkeypatch, caplog):
    tracking, exceptions = pytest.importorskip("mlflow.tracking"), pytest.importorskip("mlflow.exceptions")

    def fail(*_):
        raise exceptions.MlflowException("no answer")

    with Tracker(tmp_path / "run", loggers=["mlflow"], config={"run": {}}):
        pass
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    identity = (tmp_path / "run/.mlflow_id").read_text().strip()
    assert client.get_run(identity).info.status == "FINISHED"
    with Tracker(tmp_path / "run", loggers=["mlflow"], config={"run": {}}) as tracker:
        assert client.get_run(identity).info.status == "RUNNING"
        monkeypatch.setattr(tracking.MlflowClient, "log_batch", fail)
        tracker.log(1, {"loss/total": 0.5})
    assert "mlflow: cannot be written (no answer); the training goes on without" in caplog.text


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("mlflow:weeds", "mlflow-skinny")])
def test_a_logger_whose_package_is_missing_is_one_error_and_leaves_no_run_folder(
    recipe, tmp_path, monkeypatch, logger, package
):
    monkeypatch.setitem(sys.modules, logger.partition(":")[0], None)
    with pytest.raises(UserError, match=rf"run\.loggers: \w+ needs a package .*pip install {package}, or leave"):
        train(["--config", recipe(logger)])
    assert not (tmp_path / "runs").exists()


def test_a_logger_that_does_not_start_says_how_to_go_on_without_a_network(recipe, wandb):
    def refuse(**options):
        raise wandb.Error("no API key\n  configured")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"wandb does not start: Error: no API key configured; .*WANDB_MODE=offline"):
        train(["--config", recipe("wandb")])


def test_a_logger_that_fails_on_the_way_is_given_up_and_the_others_go_on(tmp_path, wandb, caplog):
    def fail(self, values, step):
        raise wandb.Error("connection lost")

    with Tracker(tmp_path / "run", loggers=("wandb", "tensorboard")) as tracker:
        wandb.runs[0].log = fail.__get__(wandb.runs[0])
        for iteration in (1, 2):
            tracker.log(iteration, {"loss/total": 0.5})
    assert caplog.text.count("wandb: cannot be written (connection lost); the training goes on without") == 1
    assert len(read_metrics(tmp_path / "run")) == 2
    assert any((tmp_path / "run/tensorboard").iterdir())


def test_a_logger_that_cannot_write_at_the_start_is_given_up_too(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with Tracker(tmp_path, loggers=("tensorboard",)) as tracker:
        tracker.log(1, {"loss/total": 0.5})
    assert "tensorboard: cannot be written" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


def test_an_unknown_logger_is_refused():
    with pytest.raises(
        UserError, match=r"run\.loggers\.0: expected tensorboard, wandb or mlflow, .*wandb:PROJECT, not 'tensorbord'"
    ):
        build_config(helpers.values({"run": {"loggers": ["tensorbord"]}}), "the test")


@pytest.mark.parametrize(("project", "loggers"), [("weeds", ("tensorboard", "wandb:weeds")), (None, ("tensorboard",))])
def test_the_project_that_version_0_1_0_named_is_still_read(project, loggers):
    assert helpers.config({"run": {"wandb": project}}).run.loggers == loggers
