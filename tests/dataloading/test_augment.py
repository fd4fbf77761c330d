import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from fsr_fast.config import AugmentConfig
from fsr_fast.dataloading.augment import View, apply_view, build_erasing, build_policy, draw_view, isolated

WHOLE = View(0, 0, 40, 60, False, (), None, False, 0)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 40), Image.Resampling.BICUBIC)


def views(count: int, height: int = 300, width: int = 400, **changes: Any) -> list[View]:
    augment = AugmentConfig(**changes)
    return [draw_view(random.Random(seed), augment, height, width) for seed in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**63))
def test_a_crop_lies_in_the_image(height: int, width: int, seed: int) -> None:
    view = draw_view(random.Random(seed), AugmentConfig(), height, width)
    assert 0 <= view.top <= view.top + view.height <= height
    assert 0 <= view.left <= view.left + view.width <= width
    assert view.height >= 1
    assert view.width >= 1


def test_area_and_ratio_of_crops_fill_their_ranges_and_stay_in_them() -> None:
    drawn = views(600)
    areas = np.array([view.height * view.width / (300 * 400) for view in drawn])
    ratios = np.array([view.width / view.height for view in drawn])
    assert 0.315 < areas.min() < 0.36
    assert 0.9 < areas.max() <= 1
    assert 0.745 < ratios.min() < 0.80
    assert 1.25 < ratios.max() < 1.345
    assert len({(view.top, view.left) for view in drawn}) > 500


def test_a_long_image_gives_the_largest_central_crop() -> None:
    for view in views(20, height=20, width=2000):
        assert (view.top, view.height, view.width) == (0, 20, round(20 * 4 / 3))
        assert view.left == (2000 - view.width) // 2


@pytest.mark.parametrize(
    ("key", "applied"),
    [
        ("flip", lambda view: view.flip),
        ("jitter", lambda view: bool(view.jitter)),
        ("blur", lambda view: view.blur is not None),
        ("solarise", lambda view: view.solarise),
    ],
)
def test_every_step_has_its_probability(key: str, applied: Callable[[View], bool]) -> None:
    assert not any(map(applied, views(100, **{key: 0.0})))
    assert all(map(applied, views(100, **{key: 1.0})))
    assert 0.25 < np.mean(list(map(applied, views(600, **{key: 0.3})))) < 0.35


def test_jitter_has_the_ranges_of_the_configuration_and_any_order() -> None:
    drawn = views(400, jitter=1.0)
    assert len({tuple(name for name, _ in view.jitter) for view in drawn}) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        amounts = [dict(view.jitter)[name] for view in drawn]
        room = 0.05 * (high - low)
        assert low <= min(amounts) < low + room
        assert high - room < max(amounts) <= high


def test_blur_radius_is_between_a_tenth_and_two_pixels() -> None:
    radii = [view.blur or 0.0 for view in views(300, blur=1.0)]
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2.0


def test_the_whole_image_is_resized_bicubically_with_antialias(image: Image.Image) -> None:
    np.testing.assert_array_equal(
        np.asarray(apply_view(image, WHOLE, 24)), np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC))
    )


def test_crop_and_flip_take_the_right_pixels(image: Image.Image) -> None:
    view = WHOLE._replace(top=3, left=7, height=20, width=20)
    pixels = np.asarray(image)[3:23, 7:27]
    np.testing.assert_array_equal(np.asarray(apply_view(image, view, 20)), pixels)
    np.testing.assert_array_equal(np.asarray(apply_view(image, view._replace(flip=True), 20)), pixels[:, ::-1])


def test_blur_and_solarisation_are_applied(image: Image.Image) -> None:
    square = image.crop((0, 0, 40, 40))
    view = WHOLE._replace(width=40)
    blurred = square.filter(ImageFilter.GaussianBlur(1.5))
    np.testing.assert_array_equal(np.asarray(apply_view(square, view._replace(blur=1.5), 40)), np.asarray(blurred))
    np.testing.assert_array_equal(
        np.asarray(apply_view(square, view._replace(solarise=True), 40)), np.asarray(ImageOps.solarize(square, 128))
    )


def test_jitter_steps_change_what_they_name(image: Image.Image) -> None:
    def hsv(*jitter: tuple[str, float]) -> np.ndarray:
        return np.asarray(apply_view(image, WHOLE._replace(jitter=jitter), 32).convert("HSV")).astype(float)

    plain = hsv()
    assert hsv(("brightness", 0.5))[..., 2].mean() == pytest.approx(plain[..., 2].mean() / 2, abs=2)
    assert hsv(("contrast", 0.0))[..., 2].std() == 0
    assert hsv(("saturation", 0.0))[..., 1].max() == 0
    turned = (hsv(("hue", 0.1))[..., 0] - plain[..., 0]) % 256
    assert np.median(turned) == pytest.approx(25, abs=2)


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_a_policy_is_a_function_of_the_seed_and_leaves_the_global_generators_alone(
    image: Image.Image, policy: str
) -> None:
    augment = AugmentConfig.model_validate({"policy": policy})
    change = build_policy(augment, 32, (0.5, 0.5, 0.5))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    seeds = range(12)
    first = [np.asarray(apply_view(image, WHOLE._replace(seed=seed), 32, change)) for seed in seeds]
    again = [np.asarray(apply_view(image, WHOLE._replace(seed=seed), 32, change)) for seed in reversed(seeds)]
    np.testing.assert_array_equal(first, again[::-1])
    assert len({pixels.tobytes() for pixels in first}) > 8
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())


def test_no_policy_unless_asked_for() -> None:
    assert build_policy(AugmentConfig(), 32, (0.5, 0.5, 0.5)) is None
    assert build_erasing(AugmentConfig(policy="autoaugment")) is None


def test_randaugment_erases_a_quarter_of_the_views() -> None:
    erase = build_erasing(AugmentConfig(policy="randaugment"))
    assert erase is not None
    erased = []
    for seed in range(200):
        view = torch.full((3, 32, 32), 7.0)
        erase(view, seed)
        erased.append((view != 7).float().mean().item())
    assert 0.17 < np.mean([share > 0 for share in erased]) < 0.33
    assert max(erased) < 0.4


def test_isolated_restores_the_generators_after_an_error() -> None:
    def fail() -> None:
        with isolated(3):
            raise ValueError("inside")

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(state, torch.get_rng_state())
