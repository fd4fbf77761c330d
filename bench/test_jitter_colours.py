"""Colour jitter of both views and their normalisation, half of the views jittered."""

import random

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from bench.harness import Floor, compare, size
from fsr_fast.kernels import jitter_colours
from fsr_fast.kernels.colour_jitter import STEPS

ADJUST = {name: getattr(F, f"adjust_{name}") for name in STEPS[1:]}
AMOUNTS = {"brightness": 1.31, "contrast": 0.63, "saturation": 1.17, "hue": -0.08}


def plain(pixels: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """One picture after another, by torchvision's functions of tensors, which round the hue differently."""
    found = []
    for picture, own in zip(pixels.movedim(4, 2).flatten(0, 1), steps.flatten(0, 1).tolist(), strict=True):
        for kind, amount in own:
            if kind:
                picture = ADJUST[STEPS[int(kind)]](picture, amount)
        found.append(picture)
    views = torch.stack(found).view(*pixels.shape[:2], 3, *pixels.shape[2:4])
    return (views.float() / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("jittered", [0.0, 0.5])
def test_jitter_colours(benchmark: object, device: torch.device, jittered: float) -> None:
    V, B, side = 2, size(device, gpu=16, cpu=2), 448

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (V, B, side, side, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        steps, draws = torch.zeros(V * B, 4, 2, dtype=torch.float64), random.Random(0)
        for own in steps[: int(jittered * V * B)]:
            order = draws.sample(sorted(AMOUNTS), 4)
            own[:] = torch.tensor([(STEPS.index(name), AMOUNTS[name]) for name in order], dtype=torch.float64)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return pixels, steps.view(V, B, 4, 2), mean.to(device), std.to(device)

    floor = Floor(forward_bytes=15 * V * B * side * side, forward_flops=0)
    name = f"jitter_colours, {jittered:.0%} of the views"
    compare(benchmark, device, name, ours=jitter_colours, eager=plain, inputs=inputs, floor=floor)
