"""Compared with the official scripts' steps, written out one by one with the reference's network."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast import reference
from fsr_fast.commands.evaluate import main
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.official_protocol import infer_officially
from tests import helpers

NETWORK = helpers.network(helpers.config()).eval()
STATE, SIZES = NETWORK.state_dict(), {"heads": 2, "patch_size": helpers.PATCH}
LABELS = torch.tensor([1.0, 0.0, 1.0])
OPTIONS = {"cam_scales": (1.0, 0.5, 1.5), "scales": (1.0, 1.25), "flip": True, "amp": "off"}
IMAGE = F.interpolate(torch.randn(1, 3, 5, 6, generator=helpers.generator()), size=(43, 37), mode="bicubic")[0]


def stretch(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def test_the_segmentation_cuts_off_what_is_left_of_a_patch_and_stretches_the_rest():
    merged = []
    for height, width in ((43, 37), (53, 46)):  # rounded down to whole pixels
        scaled = stretch(IMAGE[None], (height, width))
        logits = [
            stretch(reference.forward_network(STATE, view, **SIZES).seg_logits, (43, 37))
            for view in (scaled, scaled.flip(-1))
        ]
        merged.append(logits[0] + logits[1].flip(-1))
    actual = infer_officially(NETWORK, IMAGE, LABELS, **OPTIONS).seg_logits
    torch.testing.assert_close(actual, torch.maximum(*merged), rtol=1e-4, atol=1e-5)
    assert (actual - infer(NETWORK, IMAGE[None], LABELS[None], **OPTIONS).seg_logits).abs().max() > 0.01


@torch.no_grad()
def test_the_maps_are_those_of_a_square_stretched_to_the_picture():
    square = stretch(IMAGE[None], (32, 32))
    maps = reference.multi_scale_cams(STATE, square, scales=OPTIONS["cam_scales"], **SIZES)
    expected = reference.merge_cams(
        maps.cams, maps.flipped, LABELS[None], max_classes=2, size=(32, 32), output_size=(43, 37)
    )
    actual = infer_officially(NETWORK, IMAGE, LABELS, **OPTIONS).cams
    assert torch.equal(actual.classes, expected.classes)
    torch.testing.assert_close(actual.values, expected.values, rtol=1e-4, atol=1e-4)
    assert (actual.values - infer(NETWORK, IMAGE[None], LABELS[None], **OPTIONS).cams.values).abs().max() > 0.01


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from fsr_fast.train import main as train

    folder = tmp_path_factory.mktemp("protocol")
    recipe = helpers.values(root=helpers.write_dataset(folder / "data"), output=folder / "run")
    train(["--config", str(helpers.write_config(folder / "recipe.yaml", recipe))])
    return folder / "run"


def test_the_verb_scores_by_both_and_says_by_which(run, tmp_path):
    scores = {}
    for protocol in ("own", "official"):
        main(["--checkpoint", str(run), "--protocol", protocol, "--output", str(tmp_path / protocol)])
        scores[protocol] = json.loads((tmp_path / protocol / "metrics.json").read_text())
        assert scores[protocol]["protocol"] == protocol
        assert f"* protocol: `{protocol}`" in (tmp_path / protocol / "report.md").read_text()
    assert scores["own"]["confusion"] != scores["official"]["confusion"]
