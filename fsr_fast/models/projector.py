"""Projector P: from tokens to the prototypes of the distillation losses."""

import torch
import torch.nn.functional as F
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (…, D) to bottleneck vectors (…, E) of length 1, float32."""
        return F.normalize(self.mlp(tokens).float(), dim=-1)
