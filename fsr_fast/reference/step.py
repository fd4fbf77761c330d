"""One whole training step: losses, gradients, AdamW and the teacher (paper, Figure 2 and Eq. 10).

`objective` holds the passes and the losses, and their definition.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .block import State
from .objective import Centres, Draws, StepLosses, compute_losses
from .optimiser import NOT_TRAINED, adamw_update, clip_gradients, follow_student, rate_and_decay
from .schedules import learning_rate_factor, loss_gate, teacher_momentum, teacher_temperature
from .settings import Settings


class TrainingState(NamedTuple):
    """Everything that a training carries from step to step."""

    student: dict[str, Tensor]
    """Flat state dict with the official checkpoint's keys."""
    teacher: dict[str, Tensor]
    """Likewise; the whole network, even if momentum 0 makes its encoder the student's."""
    centres: Centres
    """Centres of the distillation."""
    first: dict[str, Tensor]
    """AdamW's running mean of every gradient."""
    second: dict[str, Tensor]
    """AdamW's running mean of its square."""
    iteration: int
    """Number of steps so far."""


class StepRecord(NamedTuple):
    """Intermediate results of a step."""

    output: StepLosses
    """Losses, mask, maps, pseudo labels."""
    gradients: dict[str, Tensor]
    """Gradient of the loss with respect to every trained parameter, after clipping."""


def start_training(state: State) -> TrainingState:
    """Begin a training: the teacher is a copy of the student, centres and AdamW's means are 0.

    Args:
        state: flat state dict of the student with the official checkpoint's keys.

    Source: official code.
    """
    student = {name: value.detach().clone() for name, value in state.items()}
    centre = torch.zeros_like(student["projector.last_layer.weight_v"][:, 0])
    zeros = {name: torch.zeros_like(value) for name, value in student.items() if name not in NOT_TRAINED}
    return TrainingState(student, dict(student), Centres(centre, centre), zeros, dict(zeros), 0)


def training_step(
    before: TrainingState, views: tuple[Tensor, Tensor], labels: Tensor, draws: Draws, settings: Settings
) -> tuple[TrainingState, StepRecord]:
    """Run one whole step: losses, gradients, AdamW, teacher.

    Args:
        before: from start_training or the previous step.
        views: two of (B, 3, H, W) floating, normalised.
        labels: (B, C), 1 = present, 0 = absent.
        draws: the step's random numbers.
        settings: everything else.

    Returns:
        The state after the step and the step's record.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Figure 2, Eq. 10 and implementation details; official code.
    """
    t, total = before.iteration, settings.optim.iterations
    student = {name: value.clone().requires_grad_(name not in NOT_TRAINED) for name, value in before.student.items()}
    output = compute_losses(
        student,
        before.teacher,
        before.centres,
        views,
        labels,
        draws,
        settings,
        weights=settings.loss._replace(
            affinity=settings.loss.affinity * loss_gate(t, start=settings.loss.affinity_start),
            segmentation=settings.loss.segmentation * loss_gate(t, start=settings.loss.segmentation_start),
            energy=settings.loss.energy * loss_gate(t, start=settings.loss.segmentation_start),
        ),
        temperature=teacher_temperature(
            t,
            total=total,
            start=settings.teacher.temperature[0],
            end=settings.teacher.temperature[1],
            warmup_fraction=settings.teacher.temperature_fraction,
        ),
        random_mask=t < int(total * settings.mask.random_fraction),
    )
    names = list(before.first)
    found = torch.autograd.grad(output.total, [student[name] for name in names], allow_unused=True)
    gradients = {
        name: torch.zeros_like(student[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }
    if settings.optim.clip_norm is not None:
        gradients = clip_gradients(gradients, settings.optim.clip_norm)
    updated, first, second = update_student(before, gradients, settings)
    encoder_momentum = settings.teacher.encoder_momentum
    if encoder_momentum > 0:
        encoder_momentum = teacher_momentum(t, total=total, start=encoder_momentum)
    teacher = follow_student(
        before.teacher,
        updated,
        encoder_momentum=encoder_momentum,
        projector_momentum=teacher_momentum(t, total=total, start=settings.teacher.projector_momentum),
    )
    return TrainingState(updated, teacher, output.centres, first, second, t + 1), StepRecord(output, gradients)


def update_student(
    before: TrainingState, gradients: Mapping[str, Tensor], settings: Settings
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Update every trained parameter by AdamW at this iteration's rate of its group.

    Returns:
        The new student and AdamW's two new means.
    """
    optim = settings.optim
    factor = learning_rate_factor(
        before.iteration, total=optim.iterations, warmup=optim.warmup, start=optim.warmup_factor
    )
    student, first, second = dict(before.student), dict(before.first), dict(before.second)
    for name, gradient in gradients.items():
        rate, decay = rate_and_decay(
            name,
            student[name],
            learning_rate=optim.learning_rate,
            head_factor=optim.head_factor,
            weight_decay=optim.weight_decay,
        )
        student[name], first[name], second[name] = adamw_update(
            student[name],
            gradient,
            first[name],
            second[name],
            update=before.iteration + 1,
            rate=rate * factor,
            decay=decay,
            betas=optim.betas,
        )
    return student, first, second
