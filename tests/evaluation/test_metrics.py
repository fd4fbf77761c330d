import json
import math

import numpy as np
import pytest
import torch

from fsr_fast.evaluation.metrics import ConfusionMatrix, scores

TRUTH = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 2], [2, 2, 255, 255]], dtype=torch.uint8)
PREDICTION = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2], [2, 1, 0, 1]], dtype=torch.uint8)
COUNTS = torch.tensor([[2, 1, 0], [1, 2, 0], [0, 1, 2]])


def matrix_of(prediction: torch.Tensor, truth: torch.Tensor, classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction, truth)
    return matrix


def test_counts_and_scores_of_a_small_image_are_those_counted_by_hand():
    matrix = matrix_of(PREDICTION, TRUTH, 2)
    assert torch.equal(matrix.counts, COUNTS)
    expected = torch.tensor([200 / 4, 200 / 5, 200 / 3], dtype=torch.float64)
    torch.testing.assert_close(matrix.iou(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        matrix.precision(), torch.tensor([200 / 3, 200 / 4, 200 / 2], dtype=torch.float64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(matrix.recall(), torch.full((3,), 200 / 3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert matrix.mean_iou() == pytest.approx(expected.mean().item(), rel=1e-12)
    assert matrix.pixel_accuracy() == pytest.approx(600 / 9, rel=1e-12)


def test_ignored_pixels_count_nowhere_whatever_is_predicted_there():
    other = PREDICTION.clone()
    other[TRUTH == 255] = (other[TRUTH == 255] + 1) % 3
    assert torch.equal(matrix_of(other, TRUTH, 2).counts, COUNTS)


def test_mean_is_over_the_classes_in_the_truth_even_if_others_are_predicted():
    truth = torch.tensor([[0, 0], [1, 1]])
    prediction = torch.tensor([[0, 3], [1, 1]])
    matrix = matrix_of(prediction, truth, 3)
    expected = torch.tensor([50, 100, math.nan, math.nan], dtype=torch.float64)
    torch.testing.assert_close(matrix.iou(), expected, rtol=0, atol=0, equal_nan=True)
    assert matrix.mean_iou() == 75
    assert matrix.precision()[3] == 0
    assert matrix.recall()[3].isnan()


def test_counts_add_up_over_images_batches_arrays_and_merged_parts():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (4, 13, 7), generator=generator)
    truth[:, 3] = 255
    prediction = torch.randint(0, 5, (4, 13, 7), generator=generator)
    whole = matrix_of(prediction, truth, 4)
    parts = ConfusionMatrix(4)
    for number in range(4):
        part = ConfusionMatrix(4)
        part.update(prediction[number].numpy().astype(np.uint8), truth[number].numpy())
        parts.merge(part)
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == (truth != 255).sum()
    for true in range(5):
        for predicted in range(5):
            assert whole.counts[true, predicted] == ((truth == true) & (prediction == predicted)).sum()


def test_nothing_counted_gives_no_score():
    matrix = matrix_of(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2, 2), 255, dtype=torch.uint8), 1)
    assert matrix.counts.sum() == 0
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())
    matrix.all_reduce()
    assert matrix.counts.sum() == 0


def test_all_reduce_sums_over_the_process_group(monkeypatch):
    matrix = matrix_of(PREDICTION, TRUTH, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    matrix.all_reduce()
    assert torch.equal(matrix.counts, 3 * COUNTS)


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8), ValueError, r"\(2, 3\).*\(3, 2\)"),
        (torch.full((2, 2), 3), torch.zeros(2, 2, dtype=torch.int64), ValueError, "prediction holds .* 3; .* 0 to 2"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 7), ValueError, "truth .* 7; .* 0 to 2"),
        (torch.full((2, 2), -1), torch.zeros(2, 2, dtype=torch.int64), ValueError, "prediction holds labels from -1"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.uint8), TypeError, "prediction is torch.float32"),
    ],
)
def test_bad_labels_are_refused_and_count_nothing(prediction, truth, error, message):
    matrix = ConfusionMatrix(2)
    with pytest.raises(error, match=message):
        matrix.update(prediction, truth)
    assert matrix.counts.sum() == 0


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="300 foreground classes"):
        ConfusionMatrix(300)
    with pytest.raises(ValueError, match="3 classes into counts over 2"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match="1 names for 2"):
        scores(ConfusionMatrix(2), ["cat"])


def test_scores_are_strict_json_and_undefined_ones_are_null():
    matrix = matrix_of(PREDICTION, TRUTH, 3)
    result = json.loads(json.dumps(scores(matrix, ["bird", "cat", "cow"]), allow_nan=False))
    assert list(result["classes"]) == ["background", "bird", "cat", "cow"]
    assert result["classes"]["bird"] == {"iou": 40, "precision": 50, "recall": pytest.approx(200 / 3), "pixels": 3}
    assert result["classes"]["cow"] == {"iou": None, "precision": None, "recall": None, "pixels": 0}
    assert result["mean_iou"] == pytest.approx((50 + 40 + 200 / 3) / 3)
    assert result["mean_precision"] == pytest.approx((200 / 3 + 50 + 100) / 3)
    assert result["mean_recall"] == pytest.approx(200 / 3)
    assert result["pixel_accuracy"] == pytest.approx(600 / 9)
