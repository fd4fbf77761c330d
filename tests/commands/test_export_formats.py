"""Export to safetensors, ONNX and torch.export; the card."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import fsr_fast
from fsr_fast import train
from fsr_fast.commands import export
from fsr_fast.errors import UserError
from fsr_fast.evaluation import portable
from fsr_fast.evaluation.inference import infer
from fsr_fast.models import Network
from fsr_fast.models.folder import DESCRIPTION, WEIGHTS
from tests import helpers, official

SIZES = ((1, 32, 32), (3, 45, 27), (2, 16, 70), (1, 100, 101))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    recipe = helpers.values(
        {"optim": {"iterations": 2}, "evaluate": {"limit": 2}},
        root=helpers.write_dataset(folder / "data"),
        output=folder / "run",
    )
    train.main(["--config", str(helpers.write_config(folder / "recipe.yaml", recipe))])
    return folder / "run"


@pytest.fixture(scope="module")
def network(run) -> Network:
    return fsr_fast.load_network(run)


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    coarse = torch.rand(batch, 3, 5, 5, generator=helpers.generator())
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def test_a_folder_is_read_back_bit_by_bit_and_segments_alike(run, network, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "net")])
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["README.md", DESCRIPTION, WEIGHTS]
    assert len({path.stat().st_mode for path in (tmp_path / "net").iterdir()}) == 1, "who may read them"
    copy = fsr_fast.from_pretrained(tmp_path / "net")
    assert copy.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in copy.state_dict().items())
    assert (copy.classes, copy.mean, copy.std, copy.training) == (
        network.classes,
        network.mean,
        network.std,
        False,
    )
    picture = Image.fromarray((pictures(1, 40, 36)[0] * 255).byte().permute(1, 2, 0).numpy())
    expected = fsr_fast.segment(network, picture).probabilities
    np.testing.assert_array_equal(fsr_fast.segment(copy, picture).probabilities, expected)


def test_a_folder_is_exported_again_and_an_official_file_becomes_one(run, network, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "one")])
    export.main(["--checkpoint", str(tmp_path / "one"), "--output", str(tmp_path / "two")])
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert (tmp_path / "one" / DESCRIPTION).read_text() == (tmp_path / "two" / DESCRIPTION).read_text()
    file = official.write_official(tmp_path / "student.pth")
    export.main(["--checkpoint", str(file), "--output", str(tmp_path / "three")])
    weights = fsr_fast.from_pretrained(tmp_path / "three").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in official.official_weights().items())


def test_the_card_gives_the_scores_of_the_run(run, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "net")])
    card = (tmp_path / "net/README.md").read_text()
    results = json.loads((run / "summary.json").read_text())["results"]
    for name in ("background", *helpers.CLASSES):
        cells = [results[kind]["classes"][name]["iou"] for kind in ("pseudo", "seg")]
        assert f"| {name} | {' | '.join('-' if value is None else f'{value:.1f}' for value in cells)} |" in card
    assert f"| **mean** | {results['pseudo']['mean_iou']:.1f} | {results['seg']['mean_iou']:.1f} |" in card
    assert str(run.parent) not in card
    (tmp_path / "bare").mkdir()
    shutil.copytree(run / "checkpoints", tmp_path / "bare/checkpoints")
    export.main(["--checkpoint", str(tmp_path / "bare"), "--output", str(tmp_path / "other")])
    assert "Not evaluated." in (tmp_path / "other/README.md").read_text()


@pytest.fixture(scope="module")
def onnx_file(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    export.main(["--checkpoint", str(run), "--output", str(path)])
    assert [item.name for item in path.parent.iterdir()] == ["network.onnx"]
    return path


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_onnx_runtime_gives_what_the_network_gives_at_any_size(onnx_file, network, size):
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    images = pictures(*size)
    found = [torch.from_numpy(value) for value in session.run(list(portable.OUTPUTS), {"images": images.numpy()})]
    expected = portable.PortableNetwork(network)(images)
    assert (found[0].argmax(1) == expected[0].argmax(1)).double().mean() >= 0.999
    for name, actual, wanted in zip(portable.OUTPUTS, found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_the_onnx_file_says_its_classes(onnx_file):
    properties = {item.key: item.value for item in onnx.load(onnx_file).metadata_props}
    assert properties["classes"] == ",".join(helpers.CLASSES)


@torch.no_grad()
@pytest.mark.parametrize("height", [32, 48])
def test_the_portable_network_is_one_scale_of_the_inference(network, height):
    images = pictures(2, height, 40)
    inference = infer(network, helpers.normalised(255 * images, network), scales=(1.0,), flip=False)
    segmentation, scores, cams = portable.PortableNetwork(network)(images)
    torch.testing.assert_close(segmentation, inference.seg_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, inference.class_logits.sigmoid())
    assert cams.shape == (2, len(helpers.CLASSES), height, 40)
    assert cams.amin() >= 0
    assert cams.amax() <= 1


@torch.no_grad()
def test_a_program_is_read_back_without_our_code(run, network, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "network.pt2")])
    described = {"classes": ""}
    program = torch.export.load(tmp_path / "network.pt2", extra_files=described)
    assert described["classes"] == ",".join(helpers.CLASSES)
    for size in SIZES:
        images = pictures(*size)
        for actual, expected in zip(program.module()(images), portable.PortableNetwork(network)(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_says_something_else_is_refused(network):
    with pytest.raises(UserError, match=r"agree on .* of the pixels"):
        portable.check(network, lambda images: -portable.PortableNetwork(network)(images)[0])


def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch):
    def fail(network, path):
        path.write_text("half")
        raise UserError("no")

    monkeypatch.setattr(export, "write_onnx", fail)
    with pytest.raises(UserError, match=r"^no$"):
        export.main(["--checkpoint", str(run), "--to", "onnx", "--output", str(tmp_path / "network.onnx")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DESCRIPTION).write_text("{"), "damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "damaged"),
        (lambda folder: (folder / DESCRIPTION).write_text('{"format": "x"}'), "another format"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"1234567"), "damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no checkpoint in this folder"),
        (
            lambda folder: (folder / DESCRIPTION).write_text(
                (folder / DESCRIPTION).read_text().replace('"bottleneck": 8', '"bottleneck": 9')
            ),
            "do not fit",
        ),
    ],
)
def test_a_damaged_folder_is_refused(run, tmp_path, damage, message):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "net")])
    damage(tmp_path / "net")
    with pytest.raises(UserError, match=message):
        fsr_fast.from_pretrained(tmp_path / "net")
