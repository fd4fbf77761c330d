"""The random draws that make a view of an image, and their application.

Source: paper, implementation details and Table 5; official code for `rand-m9-mstd0.5-inc1` with random erasing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fsr_fast.config import AugmentConfig

BLUR_RADIUS = (0.1, 2.0)  # pixels
SOLARISE_THRESHOLD = 128
ERASING = 0.25  # probability, with RandAugment

Policy = Callable[[Image.Image], Image.Image]
ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


class View(NamedTuple):
    """All random draws of one view."""

    top: int  # of the crop, in pixels
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # steps in their order, with factor (hue: turns)
    blur: float | None  # radius in pixels
    solarise: bool
    seed: int  # of the learned policy and the erasing


def draw_view(draws: random.Random, augment: AugmentConfig, height: int, width: int) -> View:
    """Draw a view.

    Args:
        draws: source of randomness.
        augment: probabilities and ranges.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    crop = _draw_crop(draws, augment, height, width)
    flip = draws.random() < augment.flip
    jitter: list[tuple[str, float]] = []
    if draws.random() < augment.jitter:
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(augment, name)
            jitter.append((name, draws.uniform(max(0.0, 1 - strength), 1 + strength)))
        jitter.append(("hue", draws.uniform(-augment.hue, augment.hue)))
        draws.shuffle(jitter)
    blur = draws.uniform(*BLUR_RADIUS) if draws.random() < augment.blur else None
    solarise = draws.random() < augment.solarise
    return View(*crop, flip, tuple(jitter), blur, solarise, draws.getrandbits(31))


def draw_view_at(seed: int, position: int, number: int, augment: AugmentConfig, height: int, width: int) -> View:
    """Draw a view of the image at a position of the stream; the same in every pipeline.

    Args:
        seed: of the run.
        position: of the image, counted over all ranks and epochs.
        number: of the view.
        augment: probabilities and ranges.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    return draw_view(random.Random((seed << 72) + (position << 8) + number), augment, height, width)


def _draw_crop(draws: random.Random, augment: AugmentConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Area uniform, logarithm of the ratio uniform; after ten misfits the largest central crop within the ratios."""
    lowest, highest = augment.crop_ratio
    for _ in range(10):
        area = height * width * draws.uniform(*augment.crop_scale)
        ratio = math.exp(draws.uniform(math.log(lowest), math.log(highest)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.randint(0, height - h), draws.randint(0, width - w), h, w
    ratio = min(max(width / height, lowest), highest)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def apply_view(image: Image.Image, view: View, size: int, policy: Policy | None = None) -> Image.Image:
    """Make a view of an image: crop, flip, learned policy, colour jitter, blur, solarisation.

    Args:
        image: RGB.
        view: its draws.
        size: side of the view, in pixels.
        policy: learned policy, see `build_policy`.

    Returns:
        An RGB picture of size × size pixels.
    """
    crop = (view.top, view.left, view.height, view.width)
    picture = F.resized_crop(image, *crop, [size, size], interpolation=InterpolationMode.BICUBIC)
    if view.flip:
        picture = F.horizontal_flip(picture)
    if policy is not None:
        with isolated(view.seed):
            picture = policy(picture)
    for name, amount in view.jitter:
        picture = ADJUST[name](picture, amount)
    if view.blur is not None:
        picture = picture.filter(ImageFilter.GaussianBlur(view.blur))
    if view.solarise:
        picture = F.solarize(picture, SOLARISE_THRESHOLD)
    return picture


def apply_view_to_channels(pixels: NDArray[np.uint8], view: View, size: int) -> NDArray[np.uint8]:
    """Make a view of a picture with other than three colours.

    Crop, flip, brightness, contrast, blur and solarisation are as for colours, with contrast about the mean of all
    channels; saturation and hue are meaningless there and left out.

    Args:
        pixels: (H, W, C).
        view: its draws.
        size: side of the view, in pixels.

    Returns:
        (size, size, C).
    """
    part = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    side = (size, size)
    bands = [
        Image.fromarray(np.ascontiguousarray(part[..., channel])).resize(side, Image.Resampling.BICUBIC)
        for channel in range(pixels.shape[2])
    ]
    if view.flip:
        bands = [F.horizontal_flip(band) for band in bands]
    for name, amount in view.jitter:
        if name in ("brightness", "contrast"):
            mean = np.mean([np.asarray(band).mean() for band in bands]) if name == "contrast" else 0
            base = Image.new("L", side, int(mean + 0.5))
            bands = [Image.blend(base, band, amount) for band in bands]
    if view.blur is not None:
        bands = [band.filter(ImageFilter.GaussianBlur(view.blur)) for band in bands]
    if view.solarise:
        bands = [F.solarize(band, SOLARISE_THRESHOLD) for band in bands]
    return np.stack([np.asarray(band) for band in bands], 2)


def build_policy(augment: AugmentConfig, size: int, mean: Sequence[float]) -> Policy | None:
    """Build the learned policy of the configuration: AutoAugment, RandAugment or none.

    Args:
        augment: names the policy.
        size: side of the views, in pixels.
        mean: of the normalisation; fills areas that a policy moves into the picture.
    """
    fill = tuple(round(255 * value) for value in mean)
    if augment.policy == "autoaugment":
        return v2.AutoAugment(interpolation=InterpolationMode.BICUBIC, fill=list(fill))
    if augment.policy == "randaugment":
        from timm.data.auto_augment import rand_augment_transform  # slow to import

        options = {"translate_const": int(0.45 * size), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        return rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    return None


def build_erasing(augment: AugmentConfig) -> Callable[[Tensor, int], None] | None:
    """Build the random erasing that goes with RandAugment: it fills a rectangle of a normalised view with noise."""
    if augment.policy != "randaugment":
        return None
    from timm.data.random_erasing import RandomErasing

    erasing = RandomErasing(ERASING, mode="pixel", device="cpu")

    def erase(view: Tensor, seed: int) -> None:
        with isolated(seed):
            erasing(view)

    return erase


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU), and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
