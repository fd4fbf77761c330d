"""The teacher: no gradient, weights that follow the student's."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fsr_fast.config import TeacherConfig
from fsr_fast.models import Network
from fsr_fast.models.projector import Projector
from fsr_fast.runtime.sharding import local_parts


class Teacher(nn.Module):
    """Exponential moving average of the student.

    At momentum 0 the teacher's encoder and aggregator *are* the student's and no copy exists; only the projector
    is averaged. Otherwise the whole network is averaged. Source: paper, implementation details; official code.

    Args:
        student: copied at its present weights.
        config: momenta.
    """

    def __init__(self, student: Network, config: TeacherConfig) -> None:
        super().__init__()
        self.network: Network | None = copy.deepcopy(student) if config.encoder_momentum else None
        self.own_projector: Projector | None = None if self.network else copy.deepcopy(student.projector)
        self.requires_grad_(False)

    @property
    def projector(self) -> Projector:
        """The teacher's projector."""
        projector = self.own_projector if self.network is None else self.network.projector
        assert projector is not None
        return projector

    @torch.no_grad()
    def update_ema(
        self, student: Network, encoder_momentum: float, projector_momentum: float, skip: Tensor | None = None
    ) -> None:
        """Move the weights towards the student's: θ ← m·θ + (1 - m)·θ_student.

        Args:
            student: network to follow.
            encoder_momentum: m of encoder and aggregator, 0 to 1.
            projector_momentum: m of the projector, 0 to 1.
            skip: scalar, bool, on the device: whether the weights stay as they are.
        """
        projector = list(student.projector.parameters())
        _lerp(list(self.projector.parameters()), projector, 1 - projector_momentum, skip)
        if self.network is not None:
            averaged = {id(parameter) for parameter in projector}
            pairs = zip(self.network.parameters(), student.parameters(), strict=True)
            rest = [(own, other) for own, other in pairs if id(other) not in averaged]
            _lerp([own for own, _ in rest], [other for _, other in rest], 1 - encoder_momentum, skip)


def _lerp(own: Sequence[Tensor], other: Sequence[Tensor], weight: float, skip: Tensor | None) -> None:
    own, other = local_parts(own), local_parts(other)
    if skip is None:
        torch._foreach_lerp_(own, other, weight)
        return
    steps = torch._foreach_sub(other, own)
    torch._foreach_mul_(steps, weight * (~skip).to(own[0].dtype))
    torch._foreach_add_(own, steps)
