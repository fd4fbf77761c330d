"""AutoAugment after DALI: drawn by torchvision in the reader processes, applied to all views of a batch at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fsr_fast.dataloading.augment import Policy, isolated
from fsr_fast.kernels import apply_policy
from fsr_fast.kernels.dispatch import use_triton
from fsr_fast.kernels.learned_policy import NUMBERS, OPERATIONS

POLICY_STEPS = 2


class Recorder(v2.AutoAugment):
    """Draws torchvision's AutoAugment as the torch pipeline does, and notes the operations instead of applying them.

    Args:
        size: side of the views, in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._picture = Image.new("RGB", (size, size))
        self._drawn: list[tuple[float, ...]] = []

    def draw(self, seed: int) -> NDArray[np.float64]:
        """Return the steps of a view, (POLICY_STEPS, NUMBERS) as `apply_policy` takes them; seed: of the view."""
        self._drawn = []
        with isolated(seed):
            self(self._picture)
        steps = np.zeros((POLICY_STEPS, NUMBERS))
        for step, drawn in zip(steps, self._drawn, strict=False):
            step[: len(drawn)] = drawn
        return steps

    def _apply_image_or_video_transform(self, image: Any, transform_id: str, magnitude: float, **_: Any) -> Any:
        if transform_id in ("Rotate", "ShearX"):
            self._drawn.append((OPERATIONS.index("affine"), *_sources(transform_id, magnitude, image.width)))
        else:
            number = {"Posterize": magnitude, "Solarize": 255.0 * magnitude}.get(transform_id, 1.0 + magnitude)
            self._drawn.append((OPERATIONS.index(transform_id.lower()), number))
        return image


def _sources(name: str, magnitude: float, size: int) -> tuple[float, ...]:
    """Where the pixels of a picture come from, to the last bit as torchvision or Pillow computes it."""
    if name == "ShearX":
        return 1.0, math.tan(math.radians(math.degrees(math.atan(magnitude)))), 0.0, 0.0, 1.0, 0.0
    angle, middle = -math.radians(magnitude), size / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return cos, sin, middle + (cos * -middle + sin * -middle), -sin, cos, middle + (-sin * -middle + cos * -middle)


def apply_to_batch(policy: Policy | None, pixels: Tensor, steps: Tensor, seeds: Tensor) -> Tensor:
    """Apply AutoAugment to all views of a batch: by a kernel on a GPU, by Pillow on a CPU.

    Args:
        policy: see `build_policy`; any but AutoAugment changes nothing.
        pixels: (V, B, H, W, 3) uint8.
        steps: (S, V, B, 7) float64 on the CPU, by the `Recorder`.
        seeds: (V, B) int64 on the CPU, of the views.

    Returns:
        The changed views, (V, B, H, W, 3) uint8.
    """
    if not isinstance(policy, v2.AutoAugment):
        return pixels
    if use_triton(pixels):
        return apply_policy(pixels, steps, policy.fill)
    changed = []
    for picture, seed in zip(pixels.flatten(0, 1).cpu(), seeds.flatten().tolist(), strict=True):
        with isolated(seed):
            changed.append(np.array(policy(Image.fromarray(picture.numpy()))))
    return torch.from_numpy(np.stack(changed)).view_as(pixels).to(pixels.device)
