"""Official checkpoints: loading, and starting a training from them."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from fsr_fast import load_network, reference
from fsr_fast.commands import evaluate, predict
from fsr_fast.config import build_config
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.errors import UserError
from fsr_fast.method.cam import merge_passes, multi_scale_passes
from fsr_fast.models import build_network
from fsr_fast.models.official import IMAGENET, Normalisation, count_heads, official_state_dict, renormalise
from tests import helpers, official

MODEL = official.MODEL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return official.write_official(tmp_path / "student.pth")


def start(file: Path, **model):
    """Build the network of the tiny recipe, starting from a file; its hub is unreachable, and must not be contacted."""
    recipe = build_config(helpers.values({"model": {**MODEL, "pretrained": "hub", "initial": str(file), **model}}), "")
    torch.manual_seed(1)
    return build_network(recipe.model, helpers.CLASSES, recipe.data.image_size)


# --- loading


def test_the_sizes_of_the_network_are_read_off_the_tensors(file):
    network = load_network(file)
    encoder, projector = network.encoder, network.projector
    assert (encoder.depth, encoder.width, encoder.patch_size, encoder.aux_block) == (4, 64, 8, 1)
    assert (count_heads(network), len(encoder.cls_blocks), network.image_size) == (1, 2, 32)
    assert (projector.head.shape, projector.last_layer.weight_g.shape) == ((16, 12), (16, 1))
    assert encoder.mask_mode == "none"
    assert not network.training


def test_images_are_normalised_as_by_the_official_code(file):
    network = load_network(file)
    assert (network.mean, network.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_all_outputs_are_those_of_the_reference_on_the_same_tensors(file, size):
    images = torch.randn(2, 3, *size, generator=helpers.generator()).double()
    weights = {name: value.double() for name, value in official.official_weights().items()}
    with torch.no_grad():
        actual = load_network(file).double()(images)
        expected = reference.forward_network(weights, images, heads=1, patch_size=8)
    grid = (size[0] // 8, size[1] // 8)
    shapes = {
        "class_logits": (2, 3),
        "aux_class_logits": (2, 3),
        "seg_logits": (2, 4, *grid),
        "patch_features": (2, 64, *grid),
        "aux_features": (2, 64, *grid),
        "class_token": (2, 64),
        "cam": (2, 3, *grid),
        "aux_cam": (2, 3, *grid),
    }
    assert {name: tuple(getattr(actual, name).shape) for name in actual._fields} == shapes
    for name in shapes:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("count", "names"), [(20, VOC_CLASSES), (80, COCO_CLASSES), (3, ("class_1", "class_2", "class_3"))]
)
def test_the_number_of_classes_gives_their_names(tmp_path, count, names):
    assert load_network(official.write_official(tmp_path / "student.pth", classes=count)).classes == names


def test_the_way_there_and_back_changes_no_bit(file):
    before, after = official.official_weights(), official_state_dict(load_network(file))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- files that are something else


def without(name):
    return lambda weights: weights.pop(name)


def cut(name, *parts):
    return lambda weights: weights.update({name: weights[name][parts].clone()})


def add(name):
    return lambda weights: weights.update({name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without("top_classifier.weight"), "top_classifier.weight"),
        (without("encoder.pos_embed"), "encoder.pos_embed"),
        (without("encoder.blocks.2.attn.proj.bias"), "encoder.blocks.2.attn.proj.bias"),
        (without("projector.last_layer.weight_g"), "projector.last_layer.weight_g"),
        (cut("encoder.cls_blocks.1.attn.k.weight", slice(32)), "encoder.cls_blocks.1.attn.k.weight"),
        (cut("encoder.pos_embed", slice(1), slice(12)), "11 patches"),
        (cut("encoder.patch_embed.proj.weight", slice(48)), "width 48"),
        (cut("projector.last_layer.weight_v", 0), "projector.last_layer.weight_v"),
        (add("encoder.blocks.0.ls1.gamma"), "encoder.blocks.0.ls1.gamma"),
    ],
)
def test_tensors_that_do_not_make_a_network_are_refused_by_name(tmp_path, damage, named):
    weights = official.official_weights()
    damage(weights)
    torch.save(weights, tmp_path / "student.pth")
    with pytest.raises(UserError, match=r"student\.pth.*" + named):
        load_network(tmp_path / "student.pth")


def test_the_weights_of_another_network_are_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1, 1, 8), "head.weight": torch.zeros(2, 8)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"vit\.pth.*not of this method's network"):
        load_network(tmp_path / "vit.pth")


def test_a_file_that_was_cut_short_is_refused(file):
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"student\.pth: not a readable checkpoint"):
        load_network(file)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 2))])
def test_no_code_of_a_file_is_run(tmp_path, write):
    marker = tmp_path / "marker"
    write({"top_classifier.weight": Bomb(marker)}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_network(tmp_path / "student.pth")
    assert not marker.exists()


# --- normalisation


def test_a_patch_projection_gives_the_same_for_images_of_another_normalisation():
    source = Normalisation((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    images = torch.rand(2, 3, 8, 8, generator=helpers.generator(), dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, generator=helpers.generator(1), dtype=torch.float64)
    bias = torch.randn(5, generator=helpers.generator(2), dtype=torch.float64)
    expected, actual = (
        torch.nn.functional.conv2d(
            (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1), *layer, 4
        )
        for (mean, std), layer in (
            (source, (weight, bias)),
            (IMAGENET, renormalise(weight, bias, source, IMAGENET)),
        )
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- starting a training


def test_a_training_starts_from_all_tensors(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fsr_fast.models.build.class_names", lambda count: helpers.CLASSES)
    network = start(official.write_official(tmp_path / "student.pth"), normalisation="imagenet")
    weights = official.official_weights()
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not caplog.records


def test_what_does_not_fit_keeps_its_random_start_and_is_said(file, caplog):
    with caplog.at_level(logging.WARNING):
        network = start(file, normalisation="imagenet", prototypes=10, aggregator_blocks=1)
    weights, left = official.official_weights(), caplog.text.partition("sizes: ")[2].strip().split(", ")
    assert left == [
        "decoder.conv8.weight",
        "projector.last_layer.weight_v",
        "projector.last_layer.weight_g",
        "top_classifier.weight",
        "aux_classifier.weight",
    ]
    for name, value in network.state_dict().items():
        assert (name in left) != (value.shape == weights[name].shape and torch.equal(value, weights[name]))


def test_a_start_without_aggregator_takes_the_trunk(file):
    network = start(file, normalisation="imagenet", aggregation="gap")
    weights = official.official_weights()
    assert torch.equal(network.encoder.blocks[3].attn.qkv.weight, weights["encoder.blocks.3.attn.qkv.weight"])


def test_the_start_sees_pictures_as_its_source_did(file):
    picture = 255 * torch.rand(1, 3, 32, 32, generator=helpers.generator())
    outputs = []
    for network in (load_network(file), start(file, normalisation="checkpoint").eval()):
        with torch.no_grad():
            outputs.append(network(helpers.normalised(picture, network)).patch_features)
    assert load_network(file).mean != network.mean
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_the_position_embedding_is_resized_to_the_views_of_the_training(file):
    recipe = build_config(helpers.values({"model": {**MODEL, "initial": str(file)}, "data": {"image_size": 48}}), "")
    network = build_network(recipe.model, helpers.CLASSES, 48)
    table = official.official_weights()["encoder.pos_embed"][0, 1:].T.reshape(1, 64, 4, 4)
    expected = torch.nn.functional.interpolate(table, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(network.encoder.pos_embed[:, 1:], expected)


@pytest.mark.parametrize(
    "change", [{"depth": 3}, {"depth": 5}, {"embed_dim": 128}, {"patch_size": 4}, {"num_heads": 2}, {"mlp_ratio": 2.0}]
)
def test_a_start_from_another_encoder_is_refused(file, change):
    with pytest.raises(UserError, match=r"model\.initial: .*student\.pth has a different encoder"):
        start(file, backbone_options={**MODEL["backbone_options"], **change})


def test_a_whole_network_given_as_pretrained_encoder_is_sent_to_the_right_key(file):
    with pytest.raises(UserError, match=r"give it as model\.initial"):
        start(file, initial=None, pretrained=str(file))


# --- commands


def test_evaluation_takes_data_and_settings_from_a_recipe(file, tmp_path):
    root = helpers.write_dataset(tmp_path / "data")
    recipe = helpers.write_config(tmp_path / "recipe.yaml", helpers.values())
    evaluate.main(["--checkpoint", str(file), "--config", str(recipe), "--root", str(root), "--limit", "2"])
    metrics = json.loads((file.parent / "evaluations/student/metrics.json").read_text())
    assert metrics["iteration"] is None
    assert list(metrics["results"]["seg"]["classes"]) == ["background", *helpers.CLASSES]
    assert all(0 <= metrics["results"][kind]["mean_iou"] <= 100 for kind in ("pseudo", "seg"))


def test_evaluation_without_a_recipe_says_what_is_missing(file):
    with pytest.raises(UserError, match="--config voc_official --root"):
        evaluate.main(["--checkpoint", str(file)])


def test_evaluation_refuses_data_of_another_number_of_classes(tmp_path):
    file = official.write_official(tmp_path / "student.pth", classes=4)
    recipe = helpers.write_config(
        tmp_path / "recipe.yaml", helpers.values(root=helpers.write_dataset(tmp_path / "data"))
    )
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        evaluate.main(["--checkpoint", str(file), "--config", str(recipe)])


def test_pictures_are_segmented_by_an_official_checkpoint(file, tmp_path):
    Image.new("RGB", (40, 36), (200, 30, 30)).save(tmp_path / "picture.png")
    output = tmp_path / "results"
    predict.main([str(tmp_path / "picture.png"), "--checkpoint", str(file), "--output", str(output)])
    assert Image.open(output / "masks" / "picture.png").size == (40, 36)
    found = json.loads((output / "scores.json").read_text())[str(tmp_path / "picture.png")]
    assert list(found["scores"]) == ["class_1", "class_2", "class_3"]


# --- numbers to compare with the official code: functions on plain tensors


@pytest.mark.parametrize("classifier", ["top", "aux"])
def test_multi_scale_maps_of_all_classes_are_those_of_the_reference(file, classifier):
    images = torch.randn(2, 3, 32, 48, generator=helpers.generator())
    network = load_network(file)
    with torch.no_grad():
        passes = multi_scale_passes(network.encoder, images, (1.0, 0.5, 1.5))
        every_class = torch.ones(2, 3)
        actual = merge_passes(network, passes, every_class, classifier=classifier, max_classes=3, size=(32, 48)).values
    maps = reference.multi_scale_cams(official.official_weights(), images, heads=1, patch_size=8)
    scales = (maps.cams, maps.flipped) if classifier == "top" else (maps.aux_cams, maps.aux_flipped)
    expected = reference.merge_cams(*scales, torch.ones(2, 3), max_classes=3, size=(32, 48)).values
    assert actual.shape == (2, 3, 32, 48)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert expected.amax() > 0.99
