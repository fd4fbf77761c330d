"""The colour jitter gives the pixels of torchvision on Pillow, to the bit, on both paths."""

from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fsr_fast.kernels import jitter_colours
from fsr_fast.kernels.colour_jitter import STEPS, jitter_colours_op
from tests.kernels.helpers import assert_close, compile_backend

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
AMOUNTS = {"brightness": 1.31, "contrast": 0.63, "saturation": 1.17, "hue": -0.0837}
ADJUST = {name: getattr(F, f"adjust_{name}") for name in AMOUNTS}
ORDERS = list(permutations(AMOUNTS))


def pictures(V: int = 2, B: int = 3, H: int = 41, W: int = 29, C: int = 3) -> Tensor:
    """Random pictures; grey pixels, black and white ones among them."""
    pixels = torch.randint(0, 256, (V, B, H, W, C), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[..., :5, :] = pixels[..., :5, :1]
    pixels[..., 5, :], pixels[..., 6, :] = 0, 255
    return pixels


def table(rows: list[tuple[tuple[str, float], ...]], V: int, B: int) -> Tensor:
    steps = torch.zeros(V * B, 4, 2, dtype=torch.float64)
    for picture, row in enumerate(rows):
        for number, (name, amount) in enumerate(row):
            steps[picture, number] = torch.tensor([STEPS.index(name), amount], dtype=torch.float64)
    return steps.view(V, B, 4, 2)


def by_pillow(pixels: Tensor, rows: list[tuple[tuple[str, float], ...]]) -> Tensor:
    """Grey levels (V, B, 3, H, W)."""
    found = []
    for array, row in zip(pixels.flatten(0, 1).numpy(), rows, strict=True):
        picture = Image.fromarray(array)
        for name, amount in row:
            picture = ADJUST[name](picture, amount)
        found.append(torch.from_numpy(np.array(picture)).movedim(2, 0))
    return torch.stack(found).view(*pixels.shape[:2], 3, *pixels.shape[2:4])


def levels(pixels: Tensor, steps: Tensor, device: torch.device) -> Tensor:
    """Grey levels that come out, exactly: std 1/255 and mean 0 leave them."""
    C = pixels.shape[4]
    std = torch.full((C,), 1 / 255, device=device)
    return jitter_colours(pixels.to(device), steps, torch.zeros(C, device=device), std).cpu()


@pytest.mark.parametrize("first", range(0, len(ORDERS), 6))
def test_every_order_of_the_steps_gives_the_pixels_of_pillow(first: int, path: torch.device) -> None:
    rows = [tuple((name, AMOUNTS[name]) for name in order) for order in ORDERS[first : first + 6]]
    pixels = pictures()
    assert torch.equal(levels(pixels, table(rows, 2, 3), path), by_pillow(pixels, rows).float())


@pytest.mark.parametrize("name", AMOUNTS)
def test_each_step_gives_the_pixels_of_pillow_for_small_and_large_amounts(name: str, path: torch.device) -> None:
    amounts = (-0.5, -0.0999, 0.0, 0.013, 0.25, 0.5) if name == "hue" else (0.0, 0.2, 0.999, 1.0, 1.4, 1.9)
    rows, pixels = [((name, amount),) for amount in amounts], pictures()
    assert torch.equal(levels(pixels, table(rows, 2, 3), path), by_pillow(pixels, rows).float())


def test_all_hues_turn_as_in_pillow(path: torch.device) -> None:
    """Every third level of each channel, all combinations with value 255 or 200 in one of them."""
    grid = torch.cartesian_prod(torch.arange(0, 256, 5), torch.arange(0, 256, 5)).to(torch.uint8)
    sides = []
    for value in (200, 255):
        for channel in range(3):
            full = torch.full((len(grid), 1), value, dtype=torch.uint8)
            sides.append(torch.cat([grid[:, :channel], full, grid[:, channel:]], 1))
    pixels = torch.stack(sides).view(2, 3, 52, 52, 3)
    rows = [(("hue", amount),) for amount in (0.0, 0.1, -0.1, 0.37, -0.5, 0.004)]
    assert torch.equal(levels(pixels, table(rows, 2, 3), path), by_pillow(pixels, rows).float())


def test_pictures_without_steps_are_normalised_alone(path: torch.device) -> None:
    pixels = pictures()
    found = jitter_colours(pixels.to(path), table([], 2, 3), MEAN.to(path), STD.to(path)).cpu()
    truth = (pixels.movedim(4, 2).double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
    assert found.is_contiguous()
    assert_close(found, truth, 1e-6)


def test_layouts_are_followed(path: torch.device) -> None:
    """Pictures come with their views side by side; and any other layout."""
    rows = [tuple(AMOUNTS.items())] * 6
    pixels, steps = pictures(), table(rows, 2, 3)
    expected = levels(pixels, steps, path)
    side_by_side = pixels.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(levels(side_by_side, steps, path), expected)
    planes = pixels.movedim(4, 2).contiguous().movedim(2, 4)
    assert torch.equal(levels(planes, steps, path), expected)


def test_other_channels_than_three_colours_have_brightness_and_contrast_alone(path: torch.device) -> None:
    pixels = pictures(C=5)
    rows = [(("hue", 0.3), ("saturation", 0.2), ("brightness", 0.7), ("contrast", 1.6))] * 6
    found = levels(pixels, table(rows, 2, 3), path)
    darker = (pixels.float() * 0.7).trunc().movedim(4, 2)
    mean = (darker.double().mean((2, 3, 4), keepdim=True) + 0.5).floor()
    assert torch.equal(found, (mean + 1.6 * (darker - mean)).clamp(0, 255).trunc().float())


def test_operator_passes_opcheck(path: torch.device) -> None:
    pixels = pictures(H=3, W=8).to(path).transpose(0, 1)
    steps = table([tuple(AMOUNTS.items())] * 6, 3, 2)
    torch.library.opcheck(jitter_colours_op, (pixels, steps, MEAN.to(path), STD.to(path)))


def test_function_is_traced_whole(path: torch.device) -> None:
    pixels, steps = pictures(H=3, W=8).to(path), table([tuple(AMOUNTS.items())] * 6, 2, 3)
    traced = torch.compile(jitter_colours, fullgraph=True, backend=compile_backend(path))
    arguments = (pixels, steps, MEAN.to(path), STD.to(path))
    assert torch.equal(traced(*arguments), jitter_colours(*arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 4, 5, 3)}, TypeError, "pixels is float32; expected uint8"),
        ({"pixels": torch.zeros(2, 4, 5, 3, dtype=torch.uint8)}, ValueError, "pixels has shape"),
        ({"steps": torch.zeros(2, 2, 4, 2, dtype=torch.float64)}, ValueError, "steps has shape"),
        ({"std": torch.ones(4)}, ValueError, "std has shape"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"pixels": pictures(H=4, W=8), "steps": table([], 2, 3), "mean": MEAN, "std": STD} | changes
    with pytest.raises(error, match=message):
        jitter_colours(**arguments)
