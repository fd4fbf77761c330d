"""A training from weights of another family in a file, from the command line to the export."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import fsr_fast
from fsr_fast import train
from fsr_fast.commands import export
from fsr_fast.config import build_config
from fsr_fast.evaluation.portable import PortableNetwork
from fsr_fast.models.backbone import create_vit
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import start_process
from fsr_fast.trainer import Trainer
from tests import helpers
from tests.models.families import model_values


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("backbone")
    model = {**model_values("DINOv3"), "aux_block": 0, "pretrained": str(folder / "dinov3.pth")}
    changes = {"model": model, "optim": {"iterations": 2}, "evaluate": {"limit": 1}}
    values = helpers.values(changes, root=helpers.write_dataset(folder / "data"), output=folder / "run")
    torch.save(create_vit(build_config(values, "the test").model).state_dict(), folder / "dinov3.pth")
    return values


@pytest.fixture(scope="module")
def run(recipe) -> Path:
    folder = Path(recipe["run"]["output"])
    train.main(["--config", str(helpers.write_config(folder.parent / "recipe.yaml", recipe))])
    return folder


def digest(recipe: dict) -> str:
    return hashlib.sha256(Path(recipe["model"]["pretrained"]).read_bytes()).hexdigest()


def test_the_start_weights_of_a_backbone_stand_in_summary_log_and_card(recipe, run, tmp_path):
    start = json.loads((run / "summary.json").read_text())["start_weights"]
    assert start["name"] == "vit_small_patch16_dinov3.lvd1689m"
    assert (start["file"], start["sha256"]) == (recipe["model"]["pretrained"], digest(recipe))
    assert start["mean"] == [0.485, 0.456, 0.406]
    assert digest(recipe) in (run / "logs" / "rank_0.log").read_text()
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "network")])
    assert digest(recipe) in (tmp_path / "network" / "README.md").read_text()


def test_the_start_weights_of_a_backbone_are_known_to_a_run_that_goes_on(recipe, run):
    assert read_checkpoint(run)["start"]["sha256"] == digest(recipe)
    Path(recipe["model"]["pretrained"]).write_bytes(b"another file by now")
    trainer = Trainer(build_config(recipe, "the test"), start_process("cpu", 0))
    trainer.close()
    assert trainer.start.name == "vit_small_patch16_dinov3.lvd1689m"
    assert trainer.start.sha256 == read_checkpoint(run)["start"]["sha256"]


def test_the_start_weights_of_a_backbone_end_the_printed_configuration(capsys):
    train.main(["--config", "voc_dinov2_b", "--print-config"])
    printed = capsys.readouterr().out
    *_, last = printed.splitlines()
    assert last.startswith("# start weights: vit_base_patch14_reg4_dinov2.lvd142m, file timm/")
    assert "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)" in last


def test_a_backbone_with_rotary_positions_and_registers_says_the_same_in_onnx(run, tmp_path):
    export.main(["--checkpoint", str(run), "--to", "onnx", "--output", str(tmp_path / "network.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    own = PortableNetwork(fsr_fast.load_network(run))
    images = torch.rand(2, 3, 45, 61, generator=helpers.generator())
    (found,) = session.run(["segmentation"], {"images": images.numpy()})
    with torch.no_grad():
        expected = own(images)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
