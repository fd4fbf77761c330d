import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fsr_fast import reference
from fsr_fast.config import MaskConfig
from fsr_fast.errors import UserError
from fsr_fast.method.masking import (
    MaskShape,
    find_edges,
    mask_edges,
    mask_from_cam,
    mask_from_features,
    mask_randomly,
    mask_shape,
)
from tests import helpers

GRID = (4, 6)
N = 24


def uniform(batch: int, count: int, seed: int = 0):
    return torch.rand(batch, count, generator=helpers.generator(seed))


# --- how many


def test_of_784_patches_313_are_masked():
    assert mask_shape(MaskConfig(), (28, 28)) == MaskShape((28, 28), 784, 313)


def test_of_49_blocks_20_are_masked():
    assert mask_shape(MaskConfig(block=4), (28, 28)) == MaskShape((28, 28), 49, 20)


@pytest.mark.parametrize(("ratio", "patches", "blocks"), [(0.1, 78, 5), (0.25, 196, 13), (0.5, 392, 25), (0.0, 0, 0)])
def test_patches_are_rounded_down_and_blocks_up(ratio, patches, blocks):
    assert mask_shape(MaskConfig(ratio=ratio), (28, 28)).count == patches
    assert mask_shape(MaskConfig(ratio=ratio, block=4), (28, 28)).count == blocks


@pytest.mark.parametrize("block", [1, 2])
def test_a_whole_number_is_not_rounded(block):
    # 100 · 0.29 is 28.999999999999996 and 100 · 0.07 is 7.000000000000001 in floating point
    for ratio, count in ((0.29, 29), (0.07, 7)):
        assert mask_shape(MaskConfig(ratio=ratio, block=block), (10 * block, 10 * block)).count == count


def test_blocks_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(UserError, match=r"mask\.block: 4 does not divide the grid of 28 by 30"):
        mask_shape(MaskConfig(block=4), (28, 30))


# --- which


@settings(max_examples=25, deadline=None)
@given(ratio=st.floats(0, 0.99), seed=st.integers(0, 99), block=st.sampled_from([1, 2]))
def test_every_image_has_exactly_k_masked_blocks_whatever_the_draw(ratio, seed, block):
    config = MaskConfig(ratio=ratio, block=block)
    shape = mask_shape(config, GRID)
    cam = torch.rand(3, 2, 8, 9, generator=helpers.generator(seed))
    draw = uniform(3, shape.blocks, seed)
    for masked in (mask_from_cam(cam, torch.ones(3, 2), draw, shape, config), mask_randomly(draw, shape, config)):
        assert masked.mask.sum(1).tolist() == [shape.count * block**2] * 3
        assert torch.equal(masked.mask.nonzero()[:, 1].view(3, -1), masked.index)
        assert masked.weight is None


def test_random_masking_takes_the_largest_draws():
    config = MaskConfig(ratio=0.25)
    draw = uniform(2, N)
    masked = mask_randomly(draw, mask_shape(config, GRID), config)
    for row in range(2):
        assert draw[row][masked.mask[row]].min() > draw[row][~masked.mask[row]].max()


def test_random_blocks_are_whole():
    config = MaskConfig(ratio=0.5, block=2)
    masked = mask_randomly(uniform(4, 6), mask_shape(config, GRID), config)
    blocks = masked.mask.view(4, 2, 2, 3, 2)
    assert torch.equal(blocks.all(4).all(2), blocks.any(4).any(2))


def test_uncertain_patches_are_masked_first():
    config = MaskConfig(ratio=0.25)
    shape = mask_shape(config, GRID)
    cam = torch.zeros(1, 2, *GRID)
    cam[0, 0, 0, :4] = 0.5  # uncertain, of a present class
    cam[0, 1, 2, :] = 0.5  # uncertain, of an absent class
    masked = mask_from_cam(cam, torch.tensor([[1.0, 0.0]]), uniform(1, N), shape, config)
    assert masked.mask[0, :4].all()
    rest = uniform(1, N)[0].clone()
    rest[:4] = 2
    assert masked.index[0].tolist() == sorted(rest.topk(6).indices.tolist())


def test_the_single_scale_selection_is_that_of_eq_2_to_4():
    config = MaskConfig(ratio=0.4, low=0.3, high=0.6)
    shape = mask_shape(config, GRID)
    features = torch.randn(3, N, 5, generator=helpers.generator(1))
    weight = torch.randn(2, 5, generator=helpers.generator(2))
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    masked = mask_from_features(features, weight, labels, uniform(3, N), shape, config)
    expected = reference.uncertain_mask(features, weight, labels, uniform(3, N), k=9, low=0.3, high=0.6)
    assert torch.equal(masked.mask, expected.mask)
    assert torch.equal(masked.index, expected.masked)


def test_block_selection_is_that_of_the_reference():
    config = MaskConfig(ratio=0.4, block=2)
    shape = mask_shape(config, GRID)
    cam = torch.rand(3, 2, 16, 20, generator=helpers.generator(3))
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    masked = mask_from_cam(cam, labels, uniform(3, 6), shape, config)
    expected = reference.uncertain_mask_from_cam(cam, labels, uniform(3, 6), grid=GRID, k=3, block=2)
    assert torch.equal(masked.mask, expected.mask)


# --- strict strategies


def test_the_strict_strategy_masks_exactly_the_patches_between_the_thresholds():
    config = MaskConfig(strategy="cam_strict", low=0.25, high=0.75)
    shape = mask_shape(config, GRID)
    values = torch.tensor([0.0, 0.25, 0.250001, 0.5, 0.749999, 0.75, 1.0]).repeat(4)[:N].view(1, 1, *GRID)
    masked = mask_from_cam(values, torch.ones(1, 1), uniform(1, N), shape, config)
    assert torch.equal(masked.mask, ((values > 0.25) & (values < 0.75)).view(1, N))


def test_the_strict_strategy_reads_the_present_classes_alone():
    config = MaskConfig(strategy="cam_strict")
    cam = torch.zeros(2, 2, *GRID)
    cam[:, 0, 0], cam[:, 1, 1] = 0.5, 0.5
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    masked = mask_from_cam(cam, labels, uniform(2, N), mask_shape(config, GRID), config)
    assert masked.mask.view(2, *GRID).all(2).tolist() == [[True, False, False, False], [False, True, False, False]]


def test_the_strict_strategy_samples_a_finer_cam_at_the_nearest_pixel():
    config = MaskConfig(strategy="cam_strict")
    cam = torch.rand(2, 1, 12, 18, generator=helpers.generator(5))
    masked = mask_from_cam(cam, torch.ones(2, 1), uniform(2, N), mask_shape(config, GRID), config)
    value = cam[:, 0, ::3, ::3].reshape(2, N)
    assert torch.equal(masked.mask, (value > 0.2) & (value < 0.7))


def test_strict_masks_weigh_an_image_s_masked_patches_alike_and_every_image_alike():
    config = MaskConfig(strategy="cam_strict")
    cam = torch.zeros(3, 1, *GRID)
    cam[0, 0, 0, :2] = 0.5
    cam[1, 0, 1] = 0.5
    masked = mask_from_cam(cam, torch.ones(3, 1), uniform(3, N), mask_shape(config, GRID), config)
    assert masked.weight[0].tolist() == pytest.approx([1 / 6] * 2 + [0] * 22)
    assert masked.weight.sum(1).tolist() == pytest.approx([1 / 3, 1 / 3, 0])  # the third has none and counts 0
    assert masked.index.tolist() == [list(range(N))] * 3


# --- edges


def picture_of(grey: torch.Tensor) -> torch.Tensor:
    return grey.expand(1, 3, *grey.shape[-2:]).clone()


def edges_of(pictures: torch.Tensor) -> torch.Tensor:
    return find_edges(pictures, MaskConfig())


def test_a_flat_picture_has_no_edge():
    assert not edges_of(torch.full((2, 3, 20, 24), 130.0)).any()


def test_a_ramp_too_gentle_has_no_edge():
    assert not edges_of(picture_of(torch.arange(24.0).expand(20, 24))).any()


@pytest.mark.parametrize("transpose", [False, True])
def test_a_step_has_one_line_of_edge_pixels_along_it(transpose):
    grey = torch.zeros(24, 24)
    grey[:, 11:] = 200
    edges = edges_of(picture_of(grey.T if transpose else grey))[0]
    edges = edges.T if transpose else edges
    assert edges.sum(1).tolist() == [1] * 24
    assert set(edges.nonzero()[:, 1].tolist()) <= {10, 11}


def test_a_diagonal_step_has_a_thin_line():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    edges = edges_of(picture_of((rows > columns).float() * 200))[0]
    inner = edges[4:28, 4:28]
    distance = (rows - columns)[4:28, 4:28].abs()
    assert inner.any(1).all()
    assert (distance[inner] <= 2).all()


def test_a_weak_line_is_an_edge_only_where_a_strong_one_continues_it():
    height = torch.linspace(80, 25, 24).view(-1, 1)  # the gradient's peak falls from above the upper to between both
    fading = torch.where(torch.arange(24) >= 12, height, 0.0)
    weak = torch.where(torch.arange(24) >= 12, 30.0, 0.0).expand(24, 24)
    assert not edges_of(picture_of(weak)).any()
    assert not find_edges(picture_of(fading), MaskConfig(edge_low=99.9))[0, 16:].any()
    assert edges_of(picture_of(fading))[0].any(1).all()


def canny_of(grey: np.ndarray, sigma: float, low: float, high: float) -> np.ndarray:
    """Canny's detector from its description: smooth, differentiate, keep the ridges, grow them from strong pixels."""
    smooth = ndimage.gaussian_filter(grey, sigma, mode="mirror", radius=math.ceil(2 * sigma))
    down, right = (ndimage.sobel(smooth, axis=axis, mode="nearest") for axis in (0, 1))
    slope = np.hypot(right, down)
    angle = np.round(np.arctan2(down, right) / (np.pi / 4)) * (np.pi / 4)
    rows, columns = np.indices(grey.shape) + 1
    y, x = (np.round(part).astype(int) for part in (np.sin(angle), np.cos(angle)))
    padded = np.pad(slope, 1)
    ridge = (slope > padded[rows + y, columns + x]) & (slope > padded[rows - y, columns - x])
    lines, _ = ndimage.label(ridge & (slope > low), np.ones((3, 3)))
    return np.isin(lines, np.unique(lines[ridge & (slope > high)]))


@pytest.mark.parametrize("thresholds", [(1.4, 40.0, 100.0), (0.8, 60.0, 150.0), (1.0, 20.0, 25.0)])
def test_edges_are_those_of_canny_s_description(thresholds):
    sigma, low, high = thresholds
    recipe = MaskConfig(edge_sigma=sigma, edge_low=low, edge_high=high)
    with helpers.float64():
        pictures = 255 * torch.rand(4, 3, 5, 6, generator=helpers.generator(7))
        pictures = F.interpolate(pictures, size=(40, 48), mode="bicubic")
        found = find_edges(pictures, recipe).numpy()
    expected = np.stack([canny_of(picture, sigma, low, high) for picture in pictures.mean(1).numpy()])
    assert expected.any()
    assert np.array_equal(found, expected)


def test_only_patches_that_hold_an_edge_are_masked():
    grey = torch.zeros(32, 48)
    grey[:, 27:] = 200
    masked = mask_edges(edges_of(picture_of(grey)), mask_shape(MaskConfig(), GRID))
    assert masked.mask.view(GRID).any(0).tolist() == [False, False, False, True, False, False]
    assert masked.mask.view(GRID)[:, 3].all()
    assert masked.weight[0][masked.mask[0]].tolist() == pytest.approx([1 / 4] * 4)


def test_edges_of_one_image_do_not_depend_on_the_others():
    with helpers.float64():  # and no plateaus: of two pixels with the same gradient, rounding makes one the edge
        pictures = 255 * torch.rand(2, 3, 5, 6, generator=helpers.generator(6))
        pictures = F.interpolate(pictures, size=(40, 48), mode="bicubic")
        edges = edges_of(pictures)
        assert edges.any((1, 2)).all()
        assert torch.equal(edges[1:], edges_of(pictures[1:]))
