"""Everything that changes with the iteration; iterations count from 0."""

import math


def learning_rate_factor(step: int, *, total: int, warmup: int = 1500, start: float = 0.1) -> float:
    """Return the factor on the base learning rate: linear warm-up, then half a cosine down to 0.

    Args:
        step: the iteration, 0 <= step <= total.
        total: number of iterations.
        warmup: number of warm-up iterations, < total.
        start: factor of the first iteration.

    Returns:
        The factor, in [0, 1].

    Source: official code, optimiser.
    """
    if step < warmup:
        return 1 - (1 - step / warmup) * (1 - start)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


def teacher_momentum(step: int, *, total: int, start: float) -> float:
    """Raise the teacher's momentum along half a cosine to 1.

    Args:
        step: the iteration, 0 <= step <= total.
        total: number of iterations.
        start: momentum of the first iteration, in [0, 1].

    Returns:
        The momentum, in [start, 1].

    Source: paper, implementation details.
    """
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))


def teacher_temperature(
    step: int, *, total: int, start: float = 0.04, end: float = 0.07, warmup_fraction: float = 1 / 8
) -> float:
    """Raise the teacher's temperature linearly over the first part of training, then hold it.

    Args:
        step: the iteration, 0 <= step < total.
        total: number of iterations.
        start: temperature of the first iteration, > 0.
        end: temperature of the last warm-up iteration and of all that follow, > 0.
        warmup_fraction: share of the iterations that warm up, rounded down to whole ones.

    Returns:
        The temperature, in [start, end].

    Source: official code, distillation loss.
    """
    warmup = int(total * warmup_fraction)
    if step >= warmup:
        return end
    return start + (end - start) * step / max(warmup - 1, 1)


def loss_gate(step: int, *, start: int) -> float:
    """Return 0 before a loss starts to count, then 1.

    Args:
        step: the iteration, >= 0.
        start: number of iterations for which the loss weighs 0.

    Returns:
        0.0 or 1.0, a factor on the loss's weight.

    Source: official code, training script.
    """
    return 0.0 if step < start else 1.0
