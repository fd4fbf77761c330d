"""Two steps of AutoAugment on both views of a batch, every kind of operation in turn."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from bench.harness import Floor, compare
from fsr_fast.kernels import apply_policy
from fsr_fast.kernels.learned_policy import NUMBERS, OPERATIONS

ANGLE, FILL = 20.0, [124, 116, 104]
PLAIN = {
    "posterize": lambda picture, bits: F.posterize(picture, int(bits)),
    "solarize": F.solarize,
    "invert": lambda picture, _: F.invert(picture),
    "contrast": F.adjust_contrast,
    "autocontrast": lambda picture, _: F.autocontrast(picture),
    "equalize": lambda picture, _: F.equalize(picture),
    "color": F.adjust_saturation,
    "sharpness": F.adjust_sharpness,
    "affine": lambda picture, _: F.rotate(picture, ANGLE, InterpolationMode.BILINEAR, fill=FILL),
}
"""By torchvision's functions of tensors, which round some levels differently and have no cubic rotation."""
AMOUNTS = {"posterize": 4.0, "solarize": 128.0, "contrast": 1.4, "color": 0.6, "sharpness": 1.5}


def plain(pixels: Tensor, steps: Tensor) -> Tensor:
    """One picture after another."""
    pictures = list(pixels.movedim(4, 2).flatten(0, 1))
    for step in steps.flatten(1, 2).tolist():
        for number, (kind, amount, *_) in enumerate(step):
            if kind:
                pictures[number] = PLAIN[OPERATIONS[int(kind)]](pictures[number], amount)
    return torch.stack(pictures).movedim(1, 3).view(pixels.shape)


def rotation(side: int) -> list[float]:
    """Where the pixels of a rotated picture come from."""
    cos, sin, middle = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE)), side / 2
    return [cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - sin - cos)]


def draw(generator: torch.Generator, V: int, B: int, side: int) -> tuple[Tensor, Tensor]:
    """Pictures, and two steps for each."""
    pixels = torch.randint(0, 256, (V, B, side, side, 3), dtype=torch.uint8, generator=generator)
    steps = torch.zeros(2 * V * B, NUMBERS, dtype=torch.float64)
    for number, step in enumerate(steps):
        name = OPERATIONS[1 + number % (len(OPERATIONS) - 1)]
        step[0] = OPERATIONS.index(name)
        if name == "affine":
            step[1:] = torch.tensor(rotation(side), dtype=torch.float64)
        else:
            step[1] = AMOUNTS.get(name, 0.0)
    return pixels, steps.view(2, V, B, NUMBERS)


def test_apply_policy(benchmark: object, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("on a CPU the loader calls Pillow")
    V, B, side = 2, 16, 448

    def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels, steps = draw(generator, V, B, side)
        return pixels.to(device), steps

    floor = Floor(forward_bytes=2 * 6 * V * B * side * side, forward_flops=0)
    ours = partial(apply_policy, fill=FILL)
    compare(benchmark, device, "apply_policy, two steps", ours=ours, eager=plain, inputs=inputs, floor=floor)
