from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fsr_fast import load_network, reference, segment
from fsr_fast.config import build_config
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation import inference, passes, predictions
from fsr_fast.evaluation.evaluator import evaluate_network
from fsr_fast.evaluation.inference import infer, read_picture
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.distributed import Process
from tests import helpers

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE).eval()
STATE = NETWORK.state_dict()
IMAGES, _ = helpers.views()
LABELS = helpers.labels()
ALONE = Process(0, 1, torch.device("cpu"))


def decode(images: torch.Tensor) -> torch.Tensor:
    return reference.forward_network(STATE, images, heads=2, patch_size=8).seg_logits


# --- passes and merging


def test_logits_of_a_scale_and_its_mirror_image_are_added_and_scales_merged_by_the_maximum():
    result = infer(NETWORK, IMAGES, LABELS, scales=(1.0, 1.25, 1.5))
    scaled = []
    for size in (32, 40, 48):
        images = F.interpolate(IMAGES, size=(size, size), mode="bilinear", align_corners=False)
        logits = decode(images) + decode(images.flip(3)).flip(3)
        scaled.append(F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False))
    expected = torch.stack(scaled).amax(0)
    assert torch.allclose(result.seg_logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_without_flip_the_mirror_image_is_left_out_of_the_segmentation_alone():
    result = infer(NETWORK, IMAGES, LABELS, scales=(1.0,), flip=False)
    expected = F.interpolate(decode(IMAGES), size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(result.seg_logits, expected, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(result.cams.values, infer(NETWORK, IMAGES, LABELS, scales=(1.0,)).cams.values)


def test_cams_are_those_of_the_reference():
    result = infer(NETWORK, IMAGES, LABELS, cam_scales=(1.0, 0.5, 1.5), scales=(1.0,))
    maps = reference.multi_scale_cams(STATE, IMAGES, heads=2, patch_size=8)
    expected = reference.merge_cams(maps.cams, maps.flipped, LABELS, max_classes=2, size=(32, 32))
    assert torch.allclose(result.cams.values, expected.values, atol=5e-5)
    assert torch.equal(result.cams.live, expected.live)


def test_a_scale_that_cams_and_segmentation_share_is_passed_once():
    images = Counter()
    hook = NETWORK.encoder.patch_embed["proj"].register_forward_pre_hook(
        lambda _, inputs: images.update({inputs[0].shape[-1]: len(inputs[0])})
    )
    infer(NETWORK, IMAGES, LABELS, cam_scales=(1.0, 0.5, 1.5), scales=(1.0, 1.25, 1.5))
    hook.remove()
    assert images == {16: 4, 32: 4, 40: 4, 48: 4}


def test_without_labels_the_cams_are_those_of_the_classes_that_the_classifier_finds():
    result = infer(NETWORK, IMAGES)
    found = (NETWORK(IMAGES).class_logits > 0).float()
    assert 0 < found.sum() < found.numel()
    assert torch.equal(result.labels, found)
    assert torch.allclose(result.class_logits, NETWORK(IMAGES).class_logits, atol=1e-5)
    assert result.cams.live.sum() == found.sum()


@pytest.mark.parametrize("size", [(29, 43), (5, 7), (64, 24)])
def test_results_have_the_image_s_own_size_whatever_it_is(size):
    images = torch.randn(1, 3, *size, generator=helpers.generator())
    result = infer(NETWORK, images, LABELS[:1])
    assert result.seg_logits.shape == (1, 4, *size)
    assert result.cams.values.shape == (1, 1, *size)
    assert result.seg_logits.isfinite().all()


def test_bfloat16_passes_stay_near_those_of_float32():
    exact, rough = (infer(NETWORK, IMAGES, LABELS, scales=(1.0,), amp=amp).seg_logits for amp in ("off", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.1 * exact.abs().max()


# --- three lines of Python


def test_a_picture_is_segmented_in_three_lines(tmp_path):
    write_checkpoint(
        tmp_path / "run",
        {
            "iteration": 1,
            "config": RECIPE.model_dump(mode="json"),
            "classes": list(helpers.CLASSES),
            "student": STATE,
        },
    )
    root = helpers.write_dataset(tmp_path / "data", train=1, val=1)
    network = load_network(tmp_path / "run")
    prediction = segment(network, root / "JPEGImages" / "picture_0.jpg")
    assert prediction.mask.shape == (40, 36)
    assert prediction.mask.dtype == np.uint8
    assert set(prediction.scores) == set(helpers.CLASSES)
    assert all(0 <= score <= 1 for score in prediction.scores.values())
    assert set(prediction.cams) == {name for name, score in prediction.scores.items() if score > 0.5}
    assert prediction.probabilities.shape == (4, 40, 36)
    assert np.allclose(prediction.probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(prediction.mask, prediction.probabilities.argmax(0))


def test_a_picture_is_normalised_as_in_training():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    prediction = segment(NETWORK, Image.fromarray(pixels))
    expected = infer(NETWORK, helpers.normalised(pixels.transpose(2, 0, 1), NETWORK)[None])
    assert torch.allclose(torch.from_numpy(prediction.probabilities), expected.seg_logits[0].softmax(0), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "picture.png")
    picture = read_picture(tmp_path / "picture.png")
    assert (picture.dtype, picture.shape) == (np.uint8, (12, 9, 3))
    assert segment(NETWORK, tmp_path / "picture.png").mask.shape == (12, 9)


def test_a_picture_that_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"lost\.jpg: no such file; give another"):
        segment(NETWORK, tmp_path / "lost.jpg")
    (tmp_path / "notes.jpg").write_text("not a picture")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("notes.jpg", "cut.png"):
        with pytest.raises(UserError, match="cannot be decoded") as caught:
            segment(NETWORK, tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


# --- evaluation of a list


def evaluate(root, *changes, network=NETWORK, process=ALONE, **options):
    config = build_config(helpers.values(*changes, root=root), "the test")
    _, dataset = build_datasets(config.data)
    return evaluate_network(network, dataset, config, process, **options)


def test_scores_are_those_of_the_predictions_of_each_image(tmp_path):
    root = helpers.write_dataset(tmp_path / "data")
    evaluation = evaluate(root, {"evaluate": {"threshold": 0.3}}, examples=4)
    assert list(evaluation.results) == ["pseudo", "seg"]
    hits = {"pseudo": np.zeros(4), "seg": np.zeros(4)}
    unions = {"pseudo": np.zeros(4), "seg": np.zeros(4)}
    for example in evaluation.examples:
        for name in hits:
            prediction = getattr(example, name)
            for label in range(4):
                known = example.truth != 255
                hits[name][label] += ((prediction == label) & (example.truth == label)).sum()
                unions[name][label] += (((prediction == label) | (example.truth == label)) & known).sum()
    for name, result in evaluation.results.items():
        found = [result["classes"][label]["iou"] for label in ("background", *helpers.CLASSES)]
        assert found == pytest.approx(list(100 * hits[name] / unions[name]))


def test_pseudo_labels_are_the_cam_of_the_true_classes_above_the_threshold(tmp_path):
    root = helpers.write_dataset(tmp_path / "data")
    config = build_config(helpers.values(root=root), "the test")
    _, dataset = build_datasets(config.data)
    (example,) = evaluate(root, {"evaluate": {"threshold": 0.3}}, examples=1).examples
    image = helpers.normalised(example.image.transpose(2, 0, 1).copy(), NETWORK)
    result = infer(NETWORK, image[None], torch.from_numpy(dataset.labels[:1]), cam_scales=config.cam.scales)
    value, slot = result.cams.values[0].max(0)
    expected = torch.where(value > 0.3, result.cams.classes[0][slot] + 1, 0)
    assert (torch.from_numpy(example.pseudo) == expected).float().mean() > 0.99  # pixels at the threshold may differ
    assert set(np.unique(example.pseudo)) <= {0, *np.unique(example.truth)}
    assert (example.pseudo > 0).any()


def test_images_of_several_sizes_score_as_they_do_alone(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "data", train=2, val=5)
    for name, size in (("picture_3", (20, 28)), ("picture_4", (20, 28)), ("picture_6", (50, 33))):
        for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            path = root / folder / f"{name}.{ending}"
            with Image.open(path) as picture:
                picture.resize(size, Image.Resampling.NEAREST).save(path)
    together = evaluate(root)
    monkeypatch.setattr(predictions, "BATCH_PIXELS", {"cpu": 1})
    assert together.results == evaluate(root).results


def test_the_shares_of_all_processes_make_the_whole_list(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=5)
    shares = [evaluate(root, process=Process(rank, 2, torch.device("cpu")), examples=9).examples for rank in (0, 1)]
    assert [example.name for example in shares[0]] == ["picture_8", "picture_10", "picture_12"]
    assert [example.name for example in shares[1]] == ["picture_9", "picture_11"]


def test_only_the_first_images_are_evaluated_where_a_limit_is_set(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=5)
    evaluation = evaluate(root, {"evaluate": {"limit": 3}}, examples=9)
    assert [example.name for example in evaluation.examples] == ["picture_8", "picture_9", "picture_10"]
    assert sum(row["pixels"] for row in evaluation.results["seg"]["classes"].values()) == 3 * 40 * 36


def test_the_crf_is_reported_beside_the_others_where_it_is_asked_for(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=1)
    evaluation = evaluate(root, {"evaluate": {"crf": True}})
    assert list(evaluation.results) == ["pseudo", "seg", "seg+crf"]


def test_evaluation_leaves_the_network_in_its_mode(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=1)
    network = helpers.network(RECIPE)
    for training in (True, False):
        evaluate(root, network=network.train(training))
        assert network.training is training


# --- large pictures


def test_a_large_picture_passes_small_and_its_results_have_its_own_size(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    seen = []
    monkeypatch.setattr(
        inference, "pass_scales", lambda *args, run=inference.pass_scales: seen.append(args[1]) or run(*args)
    )
    found = segment(NETWORK, picture, side=48)
    assert [tuple(image.shape[-2:]) for image in seen[0]] == [(36, 48)]
    assert found.mask.shape == (90, 120)
    assert {cam.shape for cam in found.cams.values()} == {(90, 120)}
    small = segment(NETWORK, picture.resize((48, 36), Image.Resampling.LANCZOS))
    assert found.scores == pytest.approx(small.scores)
    segment(NETWORK, picture, side=None)
    assert tuple(seen[2][0].shape[-2:]) == (90, 120)


def test_evaluation_scales_large_pictures_down_and_labels_every_pixel(tmp_path):
    root = {"data": {"root": str(helpers.write_dataset(tmp_path / "data"))}}
    cams = {}
    for side in (24, None):
        recipe = helpers.config(root, {"evaluate": {"side": side}})
        _, dataset = build_datasets(recipe.data)
        kinds = ["pseudo", "seg"]
        (result,) = predictions.predict_images(NETWORK, dataset, [0], recipe, torch.device("cpu"), kinds)
        assert {found.labels.shape for found in result.maps.values()} == {(40, 36)}
        cams[side] = result.cam
    assert not np.allclose(cams[24], cams[None], atol=1e-3)


def test_the_longest_side_follows_the_training_size():
    assert passes.largest_side("auto", NETWORK) == 512
    assert passes.largest_side(None, NETWORK) is None
    assert passes.working_size((3000, 4000), 512) == (384, 512)
    assert passes.working_size((300, 400), 512) == (300, 400)
    assert passes.working_size((10_000, 3), 512) == (512, 1)


def test_arrays_and_lists_of_pictures_are_segmented():
    array = np.random.default_rng(0).integers(0, 256, (20, 26, 3), dtype=np.uint8)
    one, two = segment(NETWORK, [array, Image.fromarray(array)])
    assert np.array_equal(one.mask, two.mask)
    assert segment(NETWORK, array[..., 0]).mask.shape == (20, 26)
    with pytest.raises(UserError, match=r"an array \(20, 26, 3\) of float64; expected .* uint8"):
        segment(NETWORK, array / 255)
    with pytest.raises(UserError, match="side: 0; expected 'auto', None, or a number of pixels"):
        segment(NETWORK, array, side=0)
