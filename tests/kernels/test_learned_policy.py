"""The operations of AutoAugment give the pixels of torchvision on Pillow, to the bit."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from bench.launches import launches
from fsr_fast.kernels import apply_policy
from fsr_fast.kernels.learned_policy import OPERATIONS, apply_policy_op
from tests.kernels.helpers import compile_backend

FILL = (124, 116, 104)
TURN = math.cos(0.4), math.sin(0.4)
COEFFICIENTS = {
    "turned": (TURN[0], TURN[1], -7.3, -TURN[1], TURN[0], 9.1),
    "slanted": (1.0, -0.3, 0.0, 0.0, 1.0, 0.0),
    "half of it outside": (1.0, 0.0, 8.0, 0.0, 1.0, -11.0),
    "enlarged": (0.21, 0.0, 5.2, 0.0, 0.18, 8.9),
    "mirrored": (-1.0, 0.0, 17.0, 0.0, 1.0, 0.0),
}
Step = tuple[str, *tuple[float, ...]]


def by_pillow(picture: Image.Image, step: Step) -> Image.Image:
    """What the torch pipeline does."""
    name, *numbers = step
    if name == "affine":
        bicubic = Image.Resampling.BICUBIC
        return picture.transform(picture.size, Image.Transform.AFFINE, numbers, bicubic, fillcolor=FILL)
    if name in ("contrast", "sharpness"):
        return getattr(F, f"adjust_{name}")(picture, *numbers)
    return {"color": F.adjust_saturation, "": lambda same: same}.get(name, getattr(F, name, None))(picture, *numbers)


def pictures(V: int = 2, B: int = 3, H: int = 23, W: int = 17) -> Tensor:
    """Random pictures; smooth, dark, of few levels, of one colour."""
    generator = np.random.default_rng(0)
    found = generator.integers(0, 256, (V * B, H, W, 3), dtype=np.uint8)
    small = Image.fromarray(found[0, :5, :4]).resize((W, H), Image.Resampling.BICUBIC)
    found[1 % len(found)], found[2 % len(found)] = small, found[0] // 5 + 17
    found[3 % len(found), ..., 1] //= 128
    found[4 % len(found)] = 93, 0, 255
    return torch.from_numpy(found).view(V, B, H, W, 3)


def table(rows: list[list[Step]], V: int, B: int) -> Tensor:
    """The steps of each picture, (S, V, B, 7)."""
    steps = torch.zeros(2, V * B, 7, dtype=torch.float64)
    for picture, row in enumerate(rows):
        for number, (name, *numbers) in enumerate(row):
            found = [OPERATIONS.index(name), *numbers]
            steps[number, picture, : len(found)] = torch.tensor(found, dtype=torch.float64)
    return steps.view(-1, V, B, 7)


def check(pixels: Tensor, rows: list[list[Step]], device: torch.device) -> None:
    V, B = pixels.shape[:2]
    expected = []
    for array, row in zip(pixels.flatten(0, 1).numpy(), rows, strict=True):
        picture = Image.fromarray(array)
        for step in row:
            picture = by_pillow(picture, step)
        expected.append(torch.from_numpy(np.array(picture)))
    found = apply_policy(pixels.to(device), table(rows, V, B), FILL)
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), torch.stack(expected).view_as(pixels))


STEPS: dict[str, Step] = {
    **{f"posterize to {bits} bits": ("posterize", bits) for bits in (1, 4, 5, 8)},
    **{f"solarize from {level}": ("solarize", level) for level in (0.0, 113.33333333333333, 128.0, 255.0)},
    **{name: (name,) for name in ("invert", "autocontrast", "equalize")},
    **{
        f"{name} times {factor}": (name, factor)
        for name in ("contrast", "color", "sharpness")
        for factor in (0.1, 0.5, 1.0, 1.3, 1.9)
    },
    **{name: ("affine", *numbers) for name, numbers in COEFFICIENTS.items()},
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_operation_gives_the_pixels_of_pillow(step: Step, triton_device: torch.device) -> None:
    check(pictures(), [[step]] * 6, triton_device)


def test_each_picture_has_its_own_steps(triton_device: torch.device) -> None:
    """Two of each, and pictures that stay as they are."""
    names = ("affine", "equalize", "sharpness", "contrast", "color", "autocontrast")
    steps = [next(step for step in STEPS.values() if step[0] == name) for name in names]
    rows = [[first, second] for first, second in zip(steps, steps[1:] + steps[:1], strict=True)]
    rows[2], rows[4][0] = [], ("",)
    check(pictures(), rows, triton_device)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (16, 33)])
def test_small_pictures_and_whole_programs(size: tuple[int, int], triton_device: torch.device) -> None:
    steps = [
        STEPS[name] for name in ("turned", "sharpness times 1.9", "equalize", "autocontrast", "contrast times 0.5")
    ]
    check(pictures(1, 5, *size), [[step] for step in steps], triton_device)


def test_launches_are_two_per_step_whatever_the_pictures(triton_device: torch.device) -> None:
    rows = [[step, ("equalize",)] for step in list(STEPS.values())[::4][:6]]
    with launches() as names:
        check(pictures(H=5), rows, triton_device)
    assert [name for name in names if name.endswith("_kernel")] == ["_count_kernel", "_apply_kernel"] * 2


def test_layouts_are_followed(triton_device: torch.device) -> None:
    """Pictures come with their views side by side; and any other layout."""
    rows = [[STEPS["turned"], STEPS["equalize"]]] * 6
    pixels = pictures(H=11)
    check(pixels.transpose(0, 1).contiguous().transpose(0, 1), rows, triton_device)
    check(pixels.movedim(4, 2).contiguous().movedim(2, 4), rows, triton_device)


def test_operator_passes_opcheck(triton_device: torch.device) -> None:
    pixels, steps = pictures(H=3, W=8).to(triton_device).transpose(0, 1), table([[STEPS["turned"]]] * 6, 3, 2)
    torch.library.opcheck(apply_policy_op, (pixels, steps, list(FILL)))


def test_function_is_traced_whole(triton_device: torch.device) -> None:
    pixels, steps = pictures(H=3, W=8).to(triton_device), table([[STEPS["turned"]]] * 6, 2, 3)
    traced = torch.compile(apply_policy, fullgraph=True, backend=compile_backend(triton_device))
    arguments = (pixels, steps, FILL)
    assert torch.equal(traced(*arguments), apply_policy(*arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": torch.zeros(2, 3, 4, 5, 3)}, TypeError, "pixels is float32; expected uint8"),
        ({"pixels": torch.zeros(2, 3, 4, 5, 4, dtype=torch.uint8)}, ValueError, "pixels has shape"),
        ({"steps": torch.zeros(1, 2, 2, 7, dtype=torch.float64)}, ValueError, "steps has shape"),
        ({}, NotImplementedError, "no torch path"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, error: type[Exception], message: str, torch_path: None) -> None:
    arguments = {"pixels": pictures(), "steps": table([[]] * 6, 2, 3), "fill": FILL} | changes
    with pytest.raises(error, match=message):
        apply_policy(**arguments)
