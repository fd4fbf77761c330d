"""Projector P: from tokens to the prototypes of the distillation losses."""

from typing import Any

import torch
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Weight-normalised linear layer E → K without bias; its gain is fixed to 1.

    Args:
        bottleneck: E.
        prototypes: K.
    """

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(bottleneck, prototypes, bias=False).weight.detach())
        self.register_buffer("weight_g", torch.ones(prototypes, 1))


class Projector(nn.Module):
    """MLP D → hidden → hidden → E with GELU, L2-normalised; the prototypes follow in the loss.

    Args:
        width: D.
        hidden: width of the two hidden layers.
        bottleneck: E.
        prototypes: K.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, prototypes)

    @property
    def head(self) -> Tensor:
        """Directions of the prototypes, (K, E), not normalised."""
        return self.last_layer.weight_v

    @property
    def directions(self) -> Tensor:
        """Directions of the prototypes, (K, E), of length 1."""
        return unit_rows(self.last_layer.weight_v)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (…, D) to bottleneck vectors (…, E) of length 1, float32."""
        return unit_rows(self.mlp(tokens).float())

    def project_together(self, *several: Tensor | None) -> tuple[Tensor | None, ...]:
        """Project several (…, D) as one batch, which launches each operator once; None stays None."""
        given = [tokens for tokens in several if tokens is not None]
        if not given:
            return several
        vectors = self(torch.cat([tokens.flatten(0, -2) for tokens in given]) if len(given) > 1 else given[0])
        parts = iter(vectors.flatten(0, -2).split([tokens.shape[:-1].numel() for tokens in given]))
        return tuple(None if tokens is None else next(parts).unflatten(0, tokens.shape[:-1]) for tokens in several)


class _UnitRows(torch.autograd.Function):
    """`torch.nn.functional.normalize` of the last dimension, whose own gradient takes four times as many operators."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = vectors / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (gradient * unit).sum(-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1) / length


def unit_rows(vectors: Tensor) -> Tensor:
    """Divide vectors (…, E) by their lengths; those of length 0 stay 0."""
    unit: Tensor = _UnitRows.apply(vectors)
    return unit
