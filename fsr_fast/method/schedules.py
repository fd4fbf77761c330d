"""What changes from iteration to iteration, as functions of the iteration alone."""

import math
from dataclasses import dataclass

from fsr_fast.config import Config, LossConfig


@dataclass(frozen=True)
class Schedule:
    """Values at one iteration."""

    learning_rate_factor: float
    """Factor on every group's learning rate."""
    encoder_momentum: float
    """Momentum of the teacher's encoder; 0: the teacher uses the student's encoder."""
    projector_momentum: float
    """Momentum of the teacher's projector."""
    teacher_temperature: float
    """Temperature of the teacher's softmax."""
    weights: LossConfig
    """Weights of the losses; 0 before a loss's start."""
    random_mask: bool
    """Mask at random, whatever the strategy."""


def schedule_at(config: Config, iteration: int) -> Schedule:
    """Return the values of an iteration, counted from 0. Source: paper, implementation details; official code."""
    optim, teacher, loss = config.optim, config.teacher, config.loss
    started = {"affinity": iteration >= loss.affinity_start, "segmentation": iteration >= loss.segmentation_start}
    started["energy"] = started["segmentation"]
    off = {name: 0.0 for name, has_started in started.items() if not has_started}
    return Schedule(
        learning_rate_factor=learning_rate_factor(iteration, optim.iterations, optim.warmup, optim.warmup_factor),
        encoder_momentum=momentum(teacher.encoder_momentum, iteration, optim.iterations)
        if teacher.encoder_momentum
        else 0.0,
        projector_momentum=momentum(teacher.projector_momentum, iteration, optim.iterations),
        teacher_temperature=teacher_temperature(
            teacher.temperature, iteration, int(teacher.temperature_fraction * optim.iterations)
        ),
        weights=loss.model_copy(update=off),
        random_mask=iteration < int(config.mask.random_fraction * optim.iterations),
    )


def reaches_all(config: Config, iteration: int) -> bool:
    """Return whether the losses reach every parameter of the network in this iteration and all later ones."""
    weights = schedule_at(config, iteration).weights
    return min(weights.uncertain, weights.class_token, max(weights.segmentation, weights.energy)) > 0


def learning_rate_factor(iteration: int, iterations: int, warmup: int, warmup_factor: float) -> float:
    """Linear warm-up from `warmup_factor` to 1, then half a cosine to 0."""
    if iteration < warmup:
        return warmup_factor + (1 - warmup_factor) * iteration / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (iterations - warmup)))


def momentum(start: float, iteration: int, iterations: int) -> float:
    """Half a cosine from `start` to 1."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def teacher_temperature(temperature: tuple[float, float], iteration: int, rise: int) -> float:
    """Rise linearly from the first to the second temperature over `rise` iterations, then stay constant."""
    start, end = temperature
    return end if iteration >= rise else start + (end - start) * iteration / max(rise - 1, 1)
