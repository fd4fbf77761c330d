"""Distillation from the teacher: uncertain patches (Eq. 8), class token (Eq. 9), and the centres of their targets."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsr_fast.config import TeacherConfig
from fsr_fast.kernels import distillation_loss
from fsr_fast.method.masking import MaskedPatches
from fsr_fast.runtime.distributed import mean_over_ranks

Directions = tuple[Tensor, Tensor]
"""Of the prototypes of student and teacher, (K, E) each, of length 1."""


class Distillation(nn.Module):
    """Cross-entropy between the prototype distributions of teacher and student, with centred targets.

    Args:
        config: temperatures and the centres' momentum.
        prototypes: K.
    """

    def __init__(self, config: TeacherConfig, prototypes: int) -> None:
        super().__init__()
        self.student_temperature = config.student_temperature
        self.centre_momentum = config.centre_momentum
        self.register_buffer("patch_centre", torch.zeros(prototypes))
        self.register_buffer("class_centre", torch.zeros(prototypes))
        self.patch_centre: Tensor
        self.class_centre: Tensor

    def patch_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        masked: MaskedPatches,
        directions: Directions,
        temperature: float,
    ) -> Tensor:
        """L_u of Eq. 8: mean over an image's masked patches, then over the batch; moves the patch centre.

        Args:
            student: (B, k, E), bottleneck vectors of masked view 2 at `masked.index`.
            teacher: (B, N, E), bottleneck vectors of all patches of unmasked view 2.
            masked: the masked patches.
            directions: of the prototypes that are compared.
            temperature: of the teacher's softmax.
        """
        if masked.index.shape[1]:
            targets = gather_tokens(teacher, masked.index).flatten(0, 1)
            weight = None if masked.weight is None else masked.weight.flatten()
            loss = self._compare(student.flatten(0, 1), targets, self.patch_centre, directions, temperature, weight)
        else:
            loss = student.sum()  # 0: the ratio is too small to mask a patch
        self._move(self.patch_centre, teacher.mean((0, 1)), directions[1])
        return loss

    def class_loss(self, student: Tensor, teacher: Tensor, directions: Directions, temperature: float) -> Tensor:
        """L_c of Eq. 9, mean over the batch; moves the class centre.

        Args:
            student: (B, E), bottleneck vectors of masked view 2's class token.
            teacher: (B, E), of unmasked view 1's class token.
            directions: of the prototypes that are compared.
            temperature: of the teacher's softmax.
        """
        loss = self._compare(student, teacher, self.class_centre, directions, temperature, None)
        self._move(self.class_centre, teacher.mean(0), directions[1])
        return loss

    def _compare(
        self,
        student: Tensor,
        teacher: Tensor,
        centre: Tensor,
        directions: Directions,
        temperature: float,
        weight: Tensor | None,
    ) -> Tensor:
        return distillation_loss(
            student,
            teacher,
            *directions,
            centre.clone(),  # the centre moves before the backward pass
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
            weight=weight,
            normalise_heads=False,
        )

    @torch.no_grad()
    def _move(self, centre: Tensor, vector: Tensor, directions: Tensor) -> None:
        # The mean of the logits is the logit of the mean vector: the prototypes are linear.
        vector = mean_over_ranks(vector.float())
        with torch.autocast(vector.device.type, enabled=False):  # a temperature of 0.04 magnifies what rounding adds
            logits = F.linear(vector, directions)
        centre.lerp_(logits, 1 - self.centre_momentum)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Take the patches `index` (B, k) of tokens (B, N, D): (B, k, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
