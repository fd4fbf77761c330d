import sys

import numpy as np
import pytest

from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf

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
    with pytest.raises(UserError, match=r"pip install pydensecrf2.*evaluate\.crf false"):
        dense_crf(two_colour_image(), probabilities_of(np.where(truth(), 0.7, 0.3)))
