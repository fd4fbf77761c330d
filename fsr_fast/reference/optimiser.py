"""AdamW with the method's four groups of parameters, and the teacher that follows the student."""

from collections.abc import Mapping

import torch
from torch import Tensor

NOT_TRAINED = ("projector.last_layer.weight_g",)  # the gain of the prototypes is fixed to 1


def rate_and_decay(
    name: str, parameter: Tensor, *, learning_rate: float, head_factor: float, weight_decay: float
) -> tuple[float, float]:
    """Return the learning rate and the weight decay of a parameter by its group.

    Args:
        name: its key in the official checkpoint.
        parameter: the parameter.
        learning_rate: base rate, before warm-up and decay.
        head_factor: factor on the rate of decoder, projector and classifiers.
        weight_decay: of the parameters that have one.

    Returns:
        The rate, and the decay: 0 for 1-D parameters, biases, position embedding, class and mask token.

    Source: paper, implementation details; official code.
    """
    head = name.startswith(("decoder.", "projector.", "top_classifier.", "aux_classifier."))
    tokens = ("encoder.pos_embed", "encoder.cls_token", "encoder.mask_token", "encoder.prefix_tokens")
    decays = parameter.dim() > 1 and not name.endswith(".bias") and name not in tokens
    return learning_rate * (head_factor if head else 1.0), weight_decay if decays else 0.0


def adamw_update(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    update: int,
    rate: float,
    decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update one parameter, with decoupled weight decay.

    Args:
        parameter: any shape, floating.
        gradient: same shape.
        first: same shape, running mean of the gradient; 0 at the start.
        second: same shape, running mean of its square; 0 at the start.
        update: number of this update, counted from 1.
        rate: learning rate of this update.
        decay: weight decay.
        betas: decay rates of the two means.
        epsilon: added to the root.

    Returns:
        The new parameter and the two new means.

    Source: Loshchilov and Hutter (2019), Algorithm 2.
    """
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    unbiased_first = first / (1 - betas[0] ** update)
    unbiased_second = second / (1 - betas[1] ** update)
    shrunk = parameter - rate * decay * parameter
    return shrunk - rate * unbiased_first / (unbiased_second.sqrt() + epsilon), first, second


def clip_gradients(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Scale all gradients down alike if their common norm is larger than `clip_norm`."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1)
    return {name: gradient * factor for name, gradient in gradients.items()}


def follow_student(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], *, encoder_momentum: float, projector_momentum: float
) -> dict[str, Tensor]:
    """Move the teacher towards the student, θ ← m θ + (1 − m) θ_student; at m = 0 it becomes the student.

    Args:
        teacher: flat state dict.
        student: flat state dict, after its update.
        encoder_momentum: m of everything but the projector.
        projector_momentum: m of the projector.

    Returns:
        The new teacher.

    Source: paper, implementation details; official code.
    """
    momenta = {name: projector_momentum if name.startswith("projector.") else encoder_momentum for name in teacher}
    return {name: m * teacher[name] + (1 - m) * student[name] for name, m in momenta.items()}
