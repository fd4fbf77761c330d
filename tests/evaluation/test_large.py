"""Pictures in tiles: compared with the plain form, in float64 where a label depends on it."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fsr_fast import reference, segment
from fsr_fast.config import EvaluateConfig
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.regions import read_scaled
from fsr_fast.errors import UserError
from fsr_fast.evaluation import activations, evaluator, large, predictions, tiling
from fsr_fast.evaluation.crf import CrfPool, dense_crf
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.large import LargePicture, plan_picture
from fsr_fast.runtime.distributed import Process
from tests import helpers

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE).eval()
CPU = torch.device("cpu")
SCALES = {"cam_scales": (1.0, 0.5, 1.5), "scales": (1.0, 1.25), "flip": True, "amp": "off"}
LABELS = torch.tensor([0.0, 1.0, 1.0])


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth enough to hold shapes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def cut_of(pixels: np.ndarray, network=NETWORK, **evaluate) -> large.Cut:
    cut = plan_picture(EvaluateConfig(**evaluate), network, pixels.shape[:2])
    assert cut is not None
    return cut


def collect(source: LargePicture, kinds, threshold=0.4, **options):
    """Join the strips of each kind."""
    found = {kind: [] for kind in kinds}
    for strip in source.strips(kinds, threshold, **options):
        assert strip.rows.start == sum(len(part.labels) for part in found[strip.kind])
        found[strip.kind].append(strip.map)
    return {kind: np.concatenate([part.labels for part in parts]) for kind, parts in found.items()}


@pytest.fixture
def wide():
    """A network in float64, with everything else in float64, too."""
    with helpers.float64():
        yield helpers.network(RECIPE).double().eval()


def plain_tiles(network, pixels, cut):
    """Logits, raw activations and class logits of a picture, tile by tile and weight by weight, in plain torch."""
    height, width = pixels.shape[:2]
    state = network.state_dict()
    logits, raw = torch.zeros(4, height, width), torch.zeros(2, height, width)
    peaks = []
    for number, (rows, columns) in enumerate(cut.network.regions()):
        row, column = divmod(number, len(cut.network.columns))
        weight = cut.network.rows.weights(row)[:, None] * cut.network.columns.weights(column)
        tile = network.normalise(torch.tensor(pixels[rows, columns]).permute(2, 0, 1))[None]
        result = infer(network, tile, LABELS[None], **SCALES)
        logits[:, rows, columns] += weight * result.seg_logits[0]
        for scale in SCALES["cam_scales"]:
            size = tuple(max(1, round(side * scale / 8)) * 8 for side in tile.shape[2:])
            scaled = F.interpolate(tile, size=size, mode="bilinear", align_corners=False)
            maps = [
                F.interpolate(found.cam, size=tile.shape[2:], mode="bilinear", align_corners=False)[0, 1:]
                for found in (
                    reference.forward_network(state, view, heads=2, patch_size=8) for view in (scaled, scaled.flip(3))
                )
            ]
            raw[:, rows, columns] += weight * torch.maximum(maps[0], maps[1].flip(-1))
        peaks.append(network(tile).patch_features.amax((2, 3)))
    class_logits = torch.stack(peaks).amax(0) @ network.top_classifier.weight.flatten(1).T
    return logits, raw, class_logits[0]


# --- the plan


def test_a_side_is_applied_first_and_tiles_cut_what_is_then_larger():
    size = (900, 1200)
    assert plan_picture(EvaluateConfig(side=None, tile=None), NETWORK, size) is None
    assert plan_picture(EvaluateConfig(side=None, tile=1200), NETWORK, size) is None
    cut = plan_picture(EvaluateConfig(tile=300), NETWORK, size)  # a number: every pixel
    assert (cut.factor, cut.network.rows.side) == (1, 304)  # whole patches of 8
    cut = plan_picture(EvaluateConfig(side=600, tile=300), NETWORK, size)
    assert (cut.factor, cut.network.rows.side) == (2, 608)
    assert plan_picture(EvaluateConfig(side=288, tile=300), NETWORK, size) is None
    assert plan_picture(EvaluateConfig(tile=300, protocol="official"), NETWORK, size) is None


def test_auto_cuts_pictures_of_more_patches_than_stated_and_none_of_ordinary_size():
    assert plan_picture(EvaluateConfig(), NETWORK, (3000, 4000)) is None
    assert plan_picture(EvaluateConfig(side=None), NETWORK, (1024, 1024)) is None  # 128 by 128 patches
    cut = plan_picture(EvaluateConfig(side=None), NETWORK, (1024, 1032))
    assert (cut.network.rows.side, cut.network.columns.side) == (512, 512)


def test_results_of_many_pixels_leave_in_bands_though_the_picture_passes_whole():
    cut = plan_picture(EvaluateConfig(), NETWORK, (8000, 10_000))
    assert len(cut.network) == 1
    assert cut.factor == pytest.approx(10_000 / 512)
    assert cut.crf.rows.side == 512


# --- against the plain form


def test_tiles_are_blended_to_the_logits_and_activations_of_the_plain_form(wide, monkeypatch):
    monkeypatch.setattr(tiling, "BAND_VALUES", 6 * 70 * 11)  # several bands
    monkeypatch.setattr(large, "BATCH_PIXELS", {"cpu": 3 * 32 * 32})  # and batches
    pixels = picture(90, 70)
    cut = cut_of(pixels, wide, tile=32, overlap=0.3)
    assert (len(cut.network.rows), len(cut.network.columns)) == (5, 4)
    source = LargePicture(wide, pixels, cut, LABELS, cams="all", **SCALES)
    found = torch.cat([logits for _, logits in source.bands()], 1)
    logits, raw, class_logits = plain_tiles(wide, pixels, cut)
    assert (found - logits).abs().max() < 1e-9 * logits.abs().max()
    cams = torch.cat([values.values[0] for _, values in source.activations.bands()], 1)
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    assert (cams - (raw - low) / (high - low + 1e-5)).abs().max() < 1e-9  # extremes of the whole picture
    assert torch.equal(source.activations.preview(), cams)
    assert (source.class_logits - class_logits).abs().max() < 1e-9 * class_logits.abs().max()


def test_a_picture_of_one_tile_is_what_it_is_whole(wide, monkeypatch):
    pixels = picture(45, 70)
    monkeypatch.setattr(large, "WHOLE_PIXELS", 1000)
    cut = cut_of(pixels, wide)
    assert len(cut.network) == 1
    images = wide.normalise(torch.tensor(pixels).permute(2, 0, 1))[None]
    for labels in (LABELS, None):
        source = LargePicture(wide, pixels, cut, labels, cams="all", **SCALES)
        logits = torch.cat([values for _, values in source.bands()], 1)
        whole = infer(wide, images, None if labels is None else labels[None], **SCALES)
        assert (logits - whole.seg_logits[0]).abs().max() < 1e-9
        assert (source.class_logits - whole.class_logits[0]).abs().max() < 1e-9
        cams = torch.cat([values.values[0] for _, values in source.activations.bands()], 1)
        assert (cams - whole.cams.values[0]).abs().max() < 1e-9
        assert torch.equal(source.activations.classes[None], whole.cams.classes)


def test_scaled_pictures_are_cut_in_their_own_pixels():
    pixels = picture(96, 144)
    cut = cut_of(pixels, side=72, tile=32, overlap=0.25)
    assert cut.network.rows.side == 64
    seen = []
    hook = NETWORK.encoder.patch_embed["proj"].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[-2:])
    )
    found = collect(LargePicture(NETWORK, pixels, cut, LABELS, **SCALES), ["seg"])["seg"]
    hook.remove()
    assert found.shape == (96, 144)
    assert set(seen) == {(32, 32), (16, 16), (48, 48), (40, 40)}


# --- what is held


class Regions:
    """A picture that is read by region, and remembers the largest."""

    def __init__(self, pixels):
        self.pixels, self.largest = pixels, 0

    def __getitem__(self, key):
        region = self.pixels[key]
        self.largest = max(self.largest, region.shape[0] * region.shape[1])
        return region


def test_a_picture_is_read_by_regions_of_a_tile(monkeypatch):
    monkeypatch.setattr(activations, "SPOOL_BYTES", 100)  # so that the maps go to a file
    pixels = picture(200, 150)
    cut = cut_of(pixels, tile=48)
    read = Regions(pixels)
    found = collect(LargePicture(NETWORK, read, cut, LABELS, cams="all", **SCALES), ["pseudo", "seg"])
    assert read.largest == 48 * 48
    held = collect(LargePicture(NETWORK, pixels, cut, LABELS, cams="all", **SCALES), ["pseudo", "seg"])
    assert all(np.array_equal(found[kind], held[kind]) for kind in held)


def test_a_much_larger_region_is_read_in_parts_and_averaged_first():
    smooth = picture(1200, 2400)
    read = Regions(smooth)
    tracemalloc.start()
    small = read_scaled(read, slice(0, 1200), slice(0, 2400), (60, 120))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.largest <= 256 * 2400
    assert held < smooth.nbytes / 2
    plain = np.asarray(Image.fromarray(smooth).resize((120, 60), Image.Resampling.LANCZOS))
    assert np.abs(small.astype(int) - plain).mean() < 3
    same = read_scaled(smooth, slice(10, 50), slice(20, 90), (30, 60))
    assert np.array_equal(
        same, np.asarray(Image.fromarray(smooth[10:50, 20:90]).resize((60, 30), Image.Resampling.LANCZOS))
    )


# --- the dense CRF


def test_the_crf_takes_the_blended_segmentation_tile_by_tile():
    pixels = picture(100, 60)
    cut = cut_of(pixels, tile=48)
    with CrfPool("pydensecrf", CPU, workers=0, images=1) as pool:
        source = LargePicture(NETWORK, pixels, cut, LABELS, **SCALES)
        found = collect(source, ["seg", "seg+crf"], pool=pool)
    logits = torch.cat([values for _, values in LargePicture(NETWORK, pixels, cut, LABELS, **SCALES).bands()], 1)
    expected = np.zeros((4, 100, 60))
    for number, (rows, columns) in enumerate(cut.crf.regions()):
        row, column = divmod(number, len(cut.crf.columns))
        weight = (cut.crf.rows.weights(row)[:, None] * cut.crf.columns.weights(column)).numpy()
        probabilities = logits[:, rows, columns].softmax(0).numpy()
        expected[:, rows, columns] += weight * dense_crf(pixels[rows, columns], probabilities)
    assert (found["seg+crf"] == expected.argmax(0)).mean() > 0.999  # sums in another order
    assert not np.array_equal(found["seg"], found["seg+crf"])


# --- the commands' ways in


def test_a_list_is_labelled_in_tiles_as_single_pictures_are(tmp_path):
    root = helpers.write_dataset(tmp_path / "data")
    evaluate = {"tile": 24, "overlap": 0.4, "crf": True, "scales": [1.0, 1.25]}
    config = helpers.config({"data": {"root": str(root)}, "evaluate": evaluate})
    _, dataset = build_datasets(config.data)
    kinds = ["pseudo", "seg", "seg+crf"]
    results = list(predictions.predict_images(NETWORK, dataset, [0, 1], config, CPU, kinds, confidence=True))
    assert [result.sample.index for result in results] == [0, 1]
    for result in results:
        pixels, labels = result.sample.image, torch.from_numpy(result.sample.labels)
        cut = cut_of(pixels, **evaluate)
        options = {**SCALES, "cam_scales": config.cam.scales}
        with CrfPool("pydensecrf", CPU, workers=0, images=1) as pool:
            source = LargePicture(NETWORK, pixels, cut, labels, cams="all", **options)
            expected = collect(source, kinds, 0.5, pool=pool)
        for kind, found in result.maps.items():
            assert np.array_equal(found.labels, expected[kind])
            assert found.confidence.shape == found.labels.shape
            assert 0 <= found.confidence.min() <= found.confidence.max() <= 1
        assert np.array_equal(result.class_logits, source.class_logits.numpy())


def test_of_a_large_picture_every_nth_pixel_is_kept_for_the_report(tmp_path, monkeypatch):
    for module in (activations, evaluator):
        monkeypatch.setattr(module, "PREVIEW", 16)
    root = helpers.write_dataset(tmp_path / "data", val=1)
    config = helpers.config({"data": {"root": str(root)}, "evaluate": {"tile": 24}})
    _, dataset = build_datasets(config.data)
    process = Process(0, 1, CPU)
    (example,) = evaluator.evaluate_network(NETWORK, dataset, config, process, examples=1).examples
    shapes = {part.shape[:2] for part in (example.image, example.truth, example.cam, example.pseudo, example.seg)}
    assert shapes == {(14, 12)}  # of 40 by 36
    assert np.array_equal(example.truth, dataset.mask(0)[::3, ::3])


def test_a_picture_of_a_list_that_cannot_be_done_is_a_failure_of_its_own(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "data")
    config = helpers.config({"data": {"root": str(root)}, "evaluate": {"tile": 24}})
    _, dataset = build_datasets(config.data)
    broken = SimpleNamespace(calls=0)
    blend = large.blend

    def fail_once(*arguments):
        broken.calls += 1
        if broken.calls <= 2:  # with the other picture, and by itself
            raise RuntimeError("out of memory")
        return blend(*arguments)

    monkeypatch.setattr(large, "blend", fail_once)
    first, second = predictions.predict_images(NETWORK, dataset, [0, 1], config, CPU, ["seg"])
    assert first.message == "RuntimeError: out of memory"
    assert second.maps["seg"].labels.shape == (40, 36)


def test_segment_takes_tiles():
    pixels = picture(60, 80)
    found = segment(NETWORK, pixels, tile=32, overlap=0.5)
    cut = cut_of(pixels, tile=32, overlap=0.5)
    options = {"cam_scales": (1.0, 0.5, 1.5), "scales": (1.0, 1.25, 1.5), "flip": True, "amp": "auto"}
    source = LargePicture(NETWORK, pixels, cut, None, **options)
    assert np.array_equal(found.mask, collect(source, ["seg"])["seg"])
    assert found.scores == source.scores()
    assert np.array_equal(found.mask, found.probabilities.argmax(0))
    assert {cam.shape for cam in found.cams.values()} == {(60, 80)}
    assert [float(cam.max()) for cam in found.cams.values()] == pytest.approx([1] * len(found.cams), abs=1e-3)
    for options, message in (({"tile": 0}, "tile: 0; expected"), ({"overlap": 0.9}, "overlap: 0.9; expected 0 to")):
        with pytest.raises(UserError, match=message):
            segment(NETWORK, pixels, **options)


def test_with_a_tile_pictures_that_are_no_larger_pass_whole_and_at_their_size(tmp_path):
    wide = picture(40, 520)  # more than the 512 pixels of `side: auto`
    seen = []
    embed = NETWORK.encoder.patch_embed["proj"]
    hook = embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    segment(NETWORK, wide, tile=520)
    root = helpers.write_dataset(tmp_path / "data")
    Image.fromarray(wide).save(root / "JPEGImages/picture_8.jpg")
    Image.fromarray(np.zeros((40, 520), np.uint8)).save(root / "SegmentationClass/picture_8.png")
    config = helpers.config({"data": {"root": str(root)}, "evaluate": {"tile": 520}})
    _, dataset = build_datasets(config.data)
    list(predictions.predict_images(NETWORK, dataset, [0], config, CPU, []))
    hook.remove()
    assert max(seen[:-2]) == 784  # 1.5 times 520, in whole patches
    assert seen[-2:] == [520, 520]
