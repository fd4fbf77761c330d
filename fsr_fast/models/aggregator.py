"""Aggregator A: the class token reads the unmasked patches (paper, Eq. 5-7)."""

from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from fsr_fast.kernels import masked_cross_attention


class CrossAttention(nn.Module):
    """Projections of the masked cross-attention; the operation itself is a kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))


class AggregatorBlock(nn.Module):
    """Pre-norm cross-attention and pre-norm MLP on the class token, each with a residual.

    Args:
        width: D.
        heads: number of attention heads.
        mask_mode: `exclude` masked patches (text of the paper), `multiply` their logits by 0 (Eq. 7), or `none`.
        epsilon: of the norms.
    """

    def __init__(
        self, width: int, heads: int, mask_mode: Literal["exclude", "multiply", "none"], epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.heads = heads
        self.mask_mode = mask_mode
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = CrossAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = Mlp(width, 4 * width)
        self.apply(_initialise)

    def forward(self, class_token: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Update the class token.

        Args:
            class_token: (B, D).
            tokens: (B, N, D), output of the trunk's last block.
            mask: (B, N), bool, masked patches; or None.

        Returns:
            (B, D).
        """
        update: Any = masked_cross_attention(class_token, tokens, mask, **self._arguments(mask))
        return self._add_mlp(class_token + update)

    def attention(self, class_token: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Update the class token and return its attention to the patches.

        Returns:
            (B, D) class token and (B, heads, N) attention weights, float32. Source: paper, Fig. 7.
        """
        update, weights = masked_cross_attention(
            class_token, tokens, mask, **self._arguments(mask), return_attention=True
        )
        return self._add_mlp(class_token + update), weights

    def _add_mlp(self, class_token: Tensor) -> Tensor:
        # of one row per image: to cast the weights would take longer than to read them once
        with torch.autocast(class_token.device.type, enabled=False):
            return class_token + self.mlp(self.norm2(class_token))

    def _arguments(self, mask: Tensor | None) -> dict[str, Any]:
        attention = self.attn
        return {
            "norm_weight": self.norm1.weight,
            "norm_bias": self.norm1.bias,
            **{f"{name}_weight": getattr(attention, name).weight for name in ("q", "k", "v", "proj")},
            **{f"{name}_bias": getattr(attention, name).bias for name in ("q", "k", "v", "proj")},
            "heads": self.heads,
            "mask_mode": "none" if mask is None else self.mask_mode,
            "eps": self.norm1.eps,
        }


def pool_unmasked(tokens: Tensor, mask: Tensor | None, pooling: Literal["gap", "gmp"]) -> Tensor:
    """Pool the unmasked patches in place of the aggregator (paper, Table 4).

    Args:
        tokens: (B, N, D), after the final norm.
        mask: (B, N), bool, masked patches; or None.
        pooling: average (`gap`) or maximum (`gmp`).

    Returns:
        (B, D); 0 for an image whose patches are all masked, as under a strict strategy.
    """
    if mask is None:
        return tokens.mean(1) if pooling == "gap" else tokens.amax(1)
    masked = mask.unsqueeze(-1)
    if pooling == "gmp":
        return tokens.masked_fill(masked, float("-inf")).amax(1).masked_fill(masked.all(1), 0)
    return tokens.masked_fill(masked, 0).sum(1) / (~masked).sum(1).clamp(min=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        torch.nn.init.zeros_(module.bias)
