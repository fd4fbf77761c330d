import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import CrfPool, dense_crf
from fsr_fast.kernels import dense_crf as mean_field

HEIGHT, WIDTH, EDGE = 40, 60, 37


def two_colour_image() -> np.ndarray:
    image = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:, :EDGE] = (40, 90, 160)
    image[:, EDGE:] = (210, 120, 50)
    return image


def probabilities_of(foreground: np.ndarray) -> np.ndarray:
    return np.stack([1 - foreground, foreground]).astype(np.float32)


def truth() -> np.ndarray:
    return np.broadcast_to(np.arange(WIDTH) >= EDGE, (HEIGHT, WIDTH))


def test_a_confident_segmentation_that_follows_the_edge_is_kept():
    refined = dense_crf(two_colour_image(), probabilities_of(np.where(truth(), 0.99, 0.01)))
    assert refined.shape == (2, HEIGHT, WIDTH)
    assert refined.dtype == np.float32
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(refined.argmax(0), truth())


def test_a_noisy_segmentation_with_a_displaced_border_moves_to_the_edge():
    displaced = np.broadcast_to(np.arange(WIDTH) >= EDGE - 6, (HEIGHT, WIDTH))
    noise = np.random.default_rng(0).normal(0, 0.15, (HEIGHT, WIDTH))
    foreground = np.clip(np.where(displaced, 0.65, 0.35) + noise, 0.1, 0.9)
    wrong = ((foreground > 0.5) != truth()).mean()
    assert wrong > 0.15
    refined = dense_crf(two_colour_image(), probabilities_of(foreground)).argmax(0)
    np.testing.assert_array_equal(refined, truth())


def test_without_pairwise_terms_the_probabilities_come_back_clipped():
    foreground = np.random.default_rng(1).random((HEIGHT, WIDTH))
    foreground[0, 0] = 0
    probabilities = probabilities_of(foreground)
    refined = dense_crf(two_colour_image(), probabilities, gaussian_weight=0, bilateral_weight=0, iterations=1)
    np.testing.assert_allclose(refined, np.clip(probabilities, 1e-5, 1), atol=2e-5)


def test_read_only_and_transposed_arrays_give_the_same_result():
    image, probabilities = two_colour_image(), probabilities_of(np.where(truth(), 0.7, 0.3))
    expected = dense_crf(image, probabilities, iterations=2)
    image.flags.writeable = False
    strided = np.asfortranarray(probabilities)
    strided.flags.writeable = False
    np.testing.assert_array_equal(dense_crf(image, strided, iterations=2), expected)


@pytest.mark.parametrize(
    ("image", "probabilities", "error", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), np.zeros((2, 4, 5), np.float32), TypeError, "image is float32"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((2, 4, 5), np.float64), TypeError, "probabilities are float64"),
        (np.zeros((4, 5), np.uint8), np.zeros((2, 4, 5), np.float32), ValueError, r"expected \(H,W,3\)"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((2, 5, 4), np.float32), ValueError, r"expected \(C\+1,4,5\)"),
    ],
)
def test_bad_arrays_are_refused(image, probabilities, error, message):
    with pytest.raises(error, match=message):
        dense_crf(image, probabilities)


def test_a_missing_package_is_named_with_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match=r"pip install pydensecrf2.*--evaluate\.crf_backend exact"):
        dense_crf(two_colour_image(), probabilities_of(np.where(truth(), 0.7, 0.3)))


# --- exact


def noisy() -> np.ndarray:
    displaced = np.broadcast_to(np.arange(WIDTH) >= EDGE - 6, (HEIGHT, WIDTH))
    noise = np.random.default_rng(0).normal(0, 0.15, (HEIGHT, WIDTH))
    return probabilities_of(np.clip(np.where(displaced, 0.65, 0.35) + noise, 0.1, 0.9))


def test_exact_gaussians_find_the_edge_as_the_lattice_does():
    exact = dense_crf(two_colour_image(), noisy(), backend="exact")
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(exact.argmax(0), truth())
    assert np.abs(exact - dense_crf(two_colour_image(), noisy())).max() > 1e-4  # they are two ways


def test_exact_takes_the_same_parameters():
    options = {"iterations": 3, "gaussian_weight": 2.0, "gaussian_sigma": 2.0, "bilateral_weight": 5.0}
    options |= {"bilateral_sigma_xy": 30.0, "bilateral_sigma_rgb": 12.0}
    image, beliefs = torch.from_numpy(two_colour_image()).permute(2, 0, 1)[None], torch.from_numpy(noisy())[None]
    expected = mean_field(beliefs, image, **options)[0].numpy()
    np.testing.assert_allclose(dense_crf(two_colour_image(), noisy(), backend="exact", **options), expected, atol=1e-6)


def test_classes_that_are_nowhere_likely_are_left_out_of_the_lattice():
    beliefs = np.concatenate([0.99999 * noisy(), np.full((3, HEIGHT, WIDTH), 3e-6, np.float32)])
    refined = dense_crf(two_colour_image(), beliefs)
    assert refined.shape == (5, HEIGHT, WIDTH)
    assert not refined[2:].any()
    np.testing.assert_allclose(refined[:2], dense_crf(two_colour_image(), beliefs[:2]), atol=1e-3)


@pytest.mark.skipif("FSR_VOC_ANIMALS" not in os.environ, reason="FSR_VOC_ANIMALS names no folder of photographs")
def test_both_ways_agree_on_photographs():
    root = Path(os.environ["FSR_VOC_ANIMALS"])
    equal = []
    for name in (root / "ImageSets/Segmentation/val.txt").read_text().split()[:20:10]:
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as picture:
            image = np.asarray(picture.convert("RGB").resize((100, 75)))
        with Image.open(root / "SegmentationClassAug" / f"{name}.png") as picture:
            mask = np.asarray(picture.resize((100, 75), Image.Resampling.NEAREST))
        foreground = gaussian_filter((mask > 0).astype(np.float32), 4)
        beliefs = probabilities_of(0.1 + 0.8 * foreground)
        both = [dense_crf(image, beliefs, backend=backend).argmax(0) for backend in ("pydensecrf", "exact")]
        assert (both[0] != beliefs.argmax(0)).any()
        equal.append((both[0] == both[1]).mean())
    assert np.mean(equal) >= 0.985


# --- many images


def blocks(count: int):
    for number in range(count):
        yield number, two_colour_image(), probabilities_of(np.where(truth(), 0.5 + 0.08 * number, 0.3))


@pytest.mark.parametrize(
    ("backend", "workers", "device"),
    [
        ("pydensecrf", 2, "cpu"),
        ("pydensecrf", 0, "cpu"),
        ("pydensecrf", 1, "cuda"),  # the processes work beside the GPU, not on it
        ("exact", 2, "cpu"),
        ("exact", 0, "cpu"),
    ],
)
def test_a_pool_gives_in_order_what_one_call_gives(backend, workers, device):
    pool = CrfPool(backend, torch.device(device), workers=workers, images=5)
    with pool:
        found = list(pool.refine(blocks(5)))
    assert [(number, error) for number, _, error in found] == [(number, None) for number in range(5)]
    for (_, marginals, _), (_, image, beliefs) in zip(found, blocks(5), strict=True):
        np.testing.assert_allclose(marginals, dense_crf(image, beliefs, backend=backend), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fails_or_asks_for_nothing_keeps_its_place(workers):
    image, beliefs = two_colour_image(), noisy()
    items = [("a", image, beliefs), ("b", None, None), ("c", image, beliefs[:, 1:]), ("d", image, beliefs)]
    with CrfPool("pydensecrf", torch.device("cpu"), workers=workers, images=4) as pool:
        found = {name: (marginals, error) for name, marginals, error in pool.refine(items)}
    assert list(found) == ["a", "b", "c", "d"]
    assert found["b"] == (None, None)
    assert found["c"][0] is None
    assert "expected (C+1,40,60)" in str(found["c"][1])
    np.testing.assert_array_equal(found["a"][0], found["d"][0])


def test_a_process_that_dies_is_named():
    others = multiprocessing.active_children()  # loader processes that earlier tests left to the garbage collector
    with CrfPool("pydensecrf", torch.device("cpu"), workers=2, images=3) as pool:
        results = pool.refine(blocks(3))
        next(results)
        for process in set(multiprocessing.active_children()).difference(others):
            process.kill()
        with pytest.raises(UserError, match="a process of the dense CRF died"):
            list(results)


@pytest.mark.parametrize(("device", "ahead"), [("cuda", [5, 6, 7, 8, 9]), ("cpu", [2, 2, 4, 4, 6])])
def test_images_are_drawn_ahead_but_not_all_of_them(device, ahead):
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield len(drawn), None, None

    with CrfPool("pydensecrf", torch.device(device), workers=2, images=3) as pool:
        results = pool.refine(endless())
        assert [next(results) and len(drawn) for _ in ahead] == ahead
