"""Losses that plug-ins register with `fsr_fast.plugins.register_loss`."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fsr_fast.errors import UserError
from fsr_fast.kernels import MergedCams
from fsr_fast.plugins import LOSSES


class LossInputs(NamedTuple):
    """What a step knows about view 1, for the losses of plug-ins. Only logits and features carry gradient; in mixed
    precision they are bf16."""

    images: Tensor
    """(B, 3, H, W), normalised."""
    labels: Tensor
    """(B, C), float32, 0 or 1."""
    class_logits: Tensor
    """(B, C)."""
    patch_features: Tensor
    """(B, D, h, w), top feature map."""
    seg_logits: Tensor | None
    """(B, C+1, h, w), decoder, background first; None before `loss.segmentation_start`."""
    cams: MergedCams | None
    """Normalised CAMs at half resolution; None likewise."""
    pseudo_labels: Tensor | None
    """(B, H, W), uint8: 0 background, class + 1, 255 ignored; None likewise."""


def plugin_losses(weights: Mapping[str, float], inputs: LossInputs) -> dict[str, Tensor]:
    """Compute the losses of plug-ins whose weight is not 0; one that returns None does not count in this step.

    Args:
        weights: by name, from `loss.extra`.
        inputs: of the step.

    Raises:
        UserError: no such loss, or one that is not a scalar.
    """
    losses = {}
    for name in (name for name, weight in weights.items() if weight > 0):
        loss = LOSSES[name](inputs)
        if isinstance(loss, Tensor) and loss.ndim == 0:
            losses[name] = loss
        elif loss is not None:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"loss.extra: {name} returned {found}; expected a scalar tensor, or None")
    return losses
