"""Everything random in a step, drawn ahead of it on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from fsr_fast.models.encoder import Encoder


class Draws(NamedTuple):
    """Random numbers of one step."""

    uniform: Tensor
    """(B, blocks), u of Eq. 3."""
    student: Tensor
    """(depth, 2, 2B), stochastic depth of the student: view 1, then masked view 2."""
    teacher: Tensor | None = None
    """(depth, 2, 2B), of the teacher; None: not drawn."""
    mask_cam: list[Tensor] | None = None
    """(depth, 2, 2B) per scale, of the CAM passes of view 2."""
    cam: list[Tensor] | None = None
    """(depth, 2, 2B) per scale, of the CAM passes of view 1."""


def draw_step(
    encoder: Encoder, batch: int, blocks: int, generator: torch.Generator, device: torch.device, *, passes: int = 0
) -> Draws:
    """Draw for one step.

    Args:
        encoder: whose stochastic depth is drawn.
        batch: images B.
        blocks: number of blocks that the mask chooses from.
        generator: on the CPU.
        device: destination of the numbers; the host does not wait for the copies.
        passes: scales of a CAM whose stochastic depth, with the teacher's, is drawn; 0: the student's alone.
    """

    def place(numbers: Tensor) -> Tensor:
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers

    def drop_path() -> Tensor:
        return place(encoder.draw_drop_path(2 * batch, generator))

    uniform = place(torch.rand(batch, blocks, generator=generator))
    student = drop_path()
    if not passes:
        return Draws(uniform, student)
    return Draws(
        uniform, student, drop_path(), [drop_path() for _ in range(passes)], [drop_path() for _ in range(passes)]
    )
