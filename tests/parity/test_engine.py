import json

import pytest
import torch

from fsr_fast.config import build_config
from fsr_fast.method.step import FSRStep
from fsr_fast.runtime.distributed import Process
from fsr_fast.trainer import Trainer
from tests.helpers import OFFICIAL, values, write_dataset

from .harness import KERNELS

pytestmark = pytest.mark.usefixtures("precise")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.mark.parametrize("preset", [{}, OFFICIAL], ids=["paper", "official"])
def test_a_run_by_the_reference_logs_the_losses_of_the_fast_run(preset, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_finish", lambda self: None)
    logged = {}
    for engine in ("fast", "reference"):
        change = {"run": {"engine": engine, "log_every": 1, "picture_every": 1}, "optim": {"iterations": 2}}
        recipe = values(preset, change, root=dataset, output=tmp_path / engine)
        trainer = Trainer(build_config(recipe, "the test"), Process(0, 1, torch.device("cpu")))
        assert (type(trainer.step) is FSRStep) == (engine == "fast")
        trainer.run()
        trainer.close()
        lines = (tmp_path / engine / "metrics.jsonl").read_text().splitlines()
        losses = [{key: value for key, value in json.loads(line).items() if "loss" in key} for line in lines]
        logged[engine] = [line for line in losses if line]
    assert len(logged["fast"]) == 2
    for ours, theirs in zip(logged["fast"], logged["reference"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if KERNELS else 1e-9)
