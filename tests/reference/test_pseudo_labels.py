import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsr_fast.reference import (
    denormalise_images,
    generate_pseudo_labels,
    pixel_adaptive_refinement,
    refine_pseudo_labels,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31))
def test_weights_sum_to_a_hundredth_above_one(height, width, iterations, seed):
    images = draw(1, 3, height, width, seed=seed)
    refined = pixel_adaptive_refinement(images, torch.full_like(images[:, :2], 3.0), iterations=iterations)
    torch.testing.assert_close(refined, torch.full_like(refined, 3.0 * 1.01**iterations), rtol=1e-12, atol=0)


def refine_by_hand(images: Tensor, maps: Tensor, dilations: tuple[int, ...], iterations: int) -> list[list[float]]:
    _, h, w = images.shape
    offsets = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distances = [math.hypot(*offset) for offset in offsets]
    spread = statistics.stdev(distances)
    place = [math.exp(-((distance / spread / 0.3) ** 2)) for distance in distances]

    def neighbours(y: int, x: int) -> list[tuple[int, int]]:
        return [(min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)) for dy, dx in offsets]

    def weigh(y: int, x: int) -> list[float]:
        squares = [0.0] * len(offsets)
        for channel in images.tolist():
            colours = [channel[v][u] for v, u in neighbours(y, x)]
            deviation = statistics.stdev(colours)
            for n, colour in enumerate(colours):
                squares[n] += (abs(colour - channel[y][x]) / (deviation + 1e-8) / 0.3) ** 2 / 3
        colour_weight = [math.exp(-square) for square in squares]
        return [c / sum(colour_weight) + 0.01 * p / sum(place) for c, p in zip(colour_weight, place, strict=True)]

    current = maps.tolist()
    for _ in range(iterations):
        current = [
            [sum(a * current[v][u] for a, (v, u) in zip(weigh(y, x), neighbours(y, x), strict=True)) for x in range(w)]
            for y in range(h)
        ]
    return current


def test_refinement_agrees_with_loops_over_pixels_and_neighbours():
    images, maps = draw(2, 3, 3, 4), draw(2, 2, 3, 4, seed=1)
    refined = pixel_adaptive_refinement(images, maps, iterations=2, dilations=(1, 3, 9))
    for b in range(2):
        for m in range(2):
            expected = torch.tensor(refine_by_hand(images[b], maps[b, m], (1, 3, 9), 2), dtype=torch.float64)
            torch.testing.assert_close(refined[b, m], expected, rtol=1e-6, atol=0)  # the 1e-8 beside spread


def label_constant(
    values: list[float], live: list[bool], high: float, low: float, side: int = 8, **options: int
) -> set[int]:
    cams = torch.tensor(values, dtype=torch.float64)[None, :, None, None].expand(1, -1, 4, 4)
    classes = torch.tensor([[4, 7][: len(values)]])
    result = refine_pseudo_labels(
        draw(1, 3, 4, 4), cams, classes, torch.tensor([live]), high=high, low=low, size=(side, side), **options
    )
    assert result.dtype == torch.uint8
    assert result.shape == (1, side, side)
    return set(result.flatten().tolist())


@pytest.mark.parametrize(("value", "expected"), [(0.9, 5), (0.5, 255), (0.1, 0)])
def test_labels_are_kept_where_both_backgrounds_agree(value, expected):
    assert label_constant([value], [True], high=0.7, low=0.25) == {expected}


def test_equal_scores_go_to_the_lower_channel():
    exact = {"side": 4, "iterations": 0}  # the equal scores stay two halves: nothing is averaged, nothing rounds
    assert label_constant([0.75], [True], high=0.75, low=0.25, **exact) == {255}
    assert label_constant([0.25], [True], high=0.75, low=0.25, **exact) == {0}
    assert label_constant([1.0, 1.0], [True, True], high=-1000.0, low=-2000.0, **exact) == {5}


def test_the_stronger_class_wins_and_dead_slots_do_not_take_part():
    assert label_constant([0.8, 0.9], [True, True], high=0.7, low=0.25) == {8}
    assert label_constant([0.8, 0.9], [True, False], high=0.7, low=0.25) == {5}
    assert label_constant([0.8, 0.9], [False, False], high=0.7, low=0.25) == {0}


def test_images_are_refined_by_themselves():
    images, cams = draw(2, 3, 5, 6), draw(2, 1, 5, 6, seed=1)
    classes, live = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    together = refine_pseudo_labels(images, cams, classes, live, size=(10, 12), high=0.55, low=0.45)
    assert together.unique().tolist() == [0, 1, 255]
    for b in range(2):
        one = slice(b, b + 1)
        alone = refine_pseudo_labels(
            images[one], cams[one], classes[one], live[one], size=(10, 12), high=0.55, low=0.45
        )
        assert torch.equal(together[one], alone)


def test_denormalising_rounds_down_to_grey_levels():
    images = torch.tensor([-2.0, 0.0, 0.01, 0.5, 3.0], dtype=torch.float64).expand(1, 3, 1, 5)
    grey = denormalise_images(images, (0.5, 0.5, 0.5), (0.25, 0.25, 0.2))
    assert grey[0, 0, 0].tolist() == [0, 127, 128, 159, 255]  # of 0, 127.5, 128.1, 159.4 and 318.8
    assert grey[0, 2, 0].tolist() == [25, 127, 128, 153, 255]


def test_pseudo_labels_follow_the_image_and_only_the_present_classes():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    images[..., 8:] = 1.0
    cam = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    cam[0, 2, :, :8] = 1.0
    cam[0, 0] = 1.0  # absent
    labels = generate_pseudo_labels(images, cam, torch.tensor([[0, 1, 1]]), mean=[0.5] * 3, std=[0.5] * 3)
    assert set(labels[0, :, :7].flatten().tolist()) == {3}
    assert set(labels[0, :, 9:].flatten().tolist()) == {0}


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="maps has shape"):
        pixel_adaptive_refinement(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match="live has shape"):
        refine_pseudo_labels(
            torch.zeros(1, 3, 4, 4),
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 2, dtype=torch.int64),
            torch.ones(1, 1, dtype=torch.bool),
            size=(8, 8),
        )
