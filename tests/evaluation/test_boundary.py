import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fsr_fast.evaluation import boundary
from fsr_fast.evaluation.boundary import band_width, boundary_counts, boundary_iou, contour_band


def written_out(labels: Tensor, width: int) -> Tensor:
    """Each class by itself: the mask less its erosion, nothing beyond the image (as in Boundary IoU)."""
    band = np.zeros(labels.shape, bool)
    for label in labels.unique().tolist():
        mask = labels.numpy() == label
        square = np.ones((3, 3), bool)
        band |= mask & ~ndimage.binary_erosion(mask, square, iterations=width, border_value=0)
    return torch.from_numpy(band)


def blobs(seed: int, height: int = 61, width: int = 83, classes: int = 4) -> Tensor:
    noise = np.random.default_rng(seed).random((classes, height, width))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 7, 7)).argmax(0).astype(np.uint8))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_band_is_what_erosion_takes_from_each_class(width):
    labels = blobs(0)
    labels[10:14, 20:50] = 255
    band = contour_band(labels, width)
    assert 0.05 < band.float().mean() < 1
    assert torch.equal(band, written_out(labels, width))


def test_the_band_is_two_percent_of_the_diagonal_wide():
    assert band_width(375, 500) == round(0.02 * 625) == 12
    assert band_width(3, 4) == 1


@pytest.mark.parametrize("pixels", [1, 2**22])
def test_counts_are_those_of_the_masks_of_each_class_whatever_the_parts(monkeypatch, pixels):
    monkeypatch.setattr(boundary, "PIXELS", pixels)
    truth, prediction = blobs(1), blobs(1).roll((1, 2), (0, 1))
    truth[:, :9] = 255
    counts = boundary_counts(prediction, truth, 4)
    seen = torch.where(truth == 255, truth, prediction)
    width = band_width(*truth.shape)
    for label in range(5):
        bands = [written_out(labels, width) & (labels == label) for labels in (truth, seen)]
        expected = [(bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum()]
        assert counts[label].tolist() == [int(value) for value in expected]


def test_a_shift_costs_the_boundary_more_than_the_area():
    truth = torch.zeros(200, 200, dtype=torch.uint8)
    truth[50:150, 50:150] = 1
    shifted = truth.roll(2, 1)
    counts = boundary_counts(shifted, truth, 1)
    iou = boundary_iou(counts)
    area = 100 * ((truth == 1) & (shifted == 1)).sum() / ((truth == 1) | (shifted == 1)).sum()
    assert 40 < iou[1] < area - 5
    assert boundary_iou(boundary_counts(truth, truth, 1)).tolist() == [100, 100]


def test_a_class_that_is_absent_from_the_truth_has_no_boundary_iou():
    truth = torch.zeros(20, 20, dtype=torch.uint8)
    prediction = truth.clone()
    prediction[5:9, 5:9] = 2
    iou = boundary_iou(boundary_counts(prediction, truth, 2))
    assert [math.isnan(value) for value in iou.tolist()] == [False, True, True]
