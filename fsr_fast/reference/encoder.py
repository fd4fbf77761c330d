"""Encoder and aggregator as functions of a flat state dict with the official checkpoint's keys (paper, Eq. 5-7).

Weights are passed as plain tensors, so autograd differentiates every one of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import masked_cross_attention
from .block import EPS, PLAIN, State, Trunk, feed_forward, layer_norm, layer_scale, optional_norm, self_attention
from .checks import require_shape


def position_embedding(stored: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the patch position embedding to another grid.

    Args:
        stored: (1, 1 + N, D), position of the class token (unused here), then of a square grid of patches.
        grid: (h, w).

    Returns:
        (1, h * w, D).

    Raises:
        ValueError: if the stored grid is not square.

    Source: official code, position embedding.
    """
    require_shape("stored", stored, 1, "1 + N", "D")
    side = round((stored.shape[1] - 1) ** 0.5)
    if side * side != stored.shape[1] - 1:
        raise ValueError(f"the position embedding has {stored.shape[1] - 1} patches, expected a square grid of them")
    if grid == (side, side):
        return stored[:, 1:]
    squared = stored[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    return F.interpolate(squared, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def embed_patches(state: State, images: Tensor, patch_size: int, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
    """Cut images into patch tokens; masked patches become the mask token before their position is added.

    If the state has `encoder.prefix_tokens`, these P tokens, their positions included, are put in front.

    Args:
        state: flat state dict.
        images: (B, 3, H, W) floating; partial patches are cut off.
        patch_size: side of a patch, in pixels.
        mask: (B, N) bool, True = masked, or None.

    Returns:
        (B, P + N, D) tokens and the patch grid (h, w).

    Source: paper, masked image modelling; official code for the order.
    """
    weight, bias = state["encoder.patch_embed.proj.weight"], state.get("encoder.patch_embed.proj.bias")
    embedded = F.conv2d(images, weight, bias, stride=patch_size)  # (B, D, h, w)
    grid = (embedded.shape[2], embedded.shape[3])
    tokens = embedded.flatten(2).transpose(1, 2)
    if mask is not None:
        require_shape("mask", mask, *tokens.shape[:2])
        tokens = torch.where(mask[:, :, None], state["encoder.mask_token"], tokens)
    if "encoder.pos_embed" in state:
        tokens = tokens + position_embedding(state["encoder.pos_embed"], grid)
    if "encoder.prefix_tokens" in state:
        tokens = torch.cat([state["encoder.prefix_tokens"].expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens, grid


def forward_trunk(
    state: State,
    tokens: Tensor,
    heads: int,
    drop_path: Tensor | None,
    aux_block: int = -3,
    trunk: Trunk = PLAIN,
    grid: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Pass tokens through all blocks.

    Args:
        state: flat state dict.
        tokens: (B, N, D) floating, embedded; the patches are the last of them.
        heads: number of heads.
        drop_path: (depth, 2, B), factors of the two residual branches of every block: 1 / (1 - p) where the branch
            is kept, 0 where it is dropped; None keeps all.
        aux_block: the block whose output is the aux feature map, counted as in Python; -3: the 10th of 12.
        trunk: what the state does not determine.
        grid: of the patches, for rotary positions.

    Returns:
        (B, N, D) output of the last block and (B, N, D) output of the aux block.

    Raises:
        ValueError: if the trunk has no such aux block or drop_path does not fit.

    Source: official code, encoder.
    """
    depth = count_blocks(state, "encoder.blocks.")
    if not -depth <= aux_block < depth:
        raise ValueError(f"the state has {depth} encoder blocks, expected enough of them for aux_block {aux_block}")
    if drop_path is None:
        drop_path = tokens.new_ones(depth, 2, len(tokens))
    require_shape("drop_path", drop_path, depth, 2, len(tokens))
    tokens = optional_norm(state, "encoder.norm_pre", tokens, trunk.eps)
    aux = tokens
    for i in range(depth):
        name = f"encoder.blocks.{i}"
        normed = layer_norm(state, f"{name}.norm1", tokens, trunk.eps)
        branch = layer_scale(state, name, 1, self_attention(state, f"{name}.attn", normed, heads, trunk, grid))
        tokens = tokens + drop_path[i, 0][:, None, None] * branch
        normed = layer_norm(state, f"{name}.norm2", tokens, trunk.eps)
        branch = layer_scale(state, name, 2, feed_forward(state, f"{name}.mlp", normed, trunk))
        tokens = tokens + drop_path[i, 1][:, None, None] * branch
        if i == aux_block % depth:
            aux = tokens
    return tokens, aux


def aggregate(
    state: State, tokens: Tensor, heads: int, mask: Tensor | None, mask_mode: str, eps: float = EPS
) -> Tensor:
    """Gather patch tokens in the class token.

    Args:
        state: flat state dict.
        tokens: (B, N, D) floating, raw output of the trunk's last block.
        heads: number of heads.
        mask: (B, N) bool, True = masked, or None.
        mask_mode: "exclude", "multiply" or "none", see masked_cross_attention.
        eps: of the norms.

    Returns:
        (B, D), before the final norm.

    Source: paper, Eq. 5-7.
    """
    class_token = state["encoder.cls_token"][0].expand(len(tokens), -1)
    for j in range(count_blocks(state, "encoder.cls_blocks.")):
        name = f"encoder.cls_blocks.{j}"
        weights: dict[str, Any] = {
            f"{part}_{kind}": state.get(f"{name}.attn.{part}.{kind}")
            for part in ("q", "k", "v", "proj")
            for kind in ("weight", "bias")
        }
        update = masked_cross_attention(
            class_token,
            tokens,
            mask,
            norm_weight=state[f"{name}.norm1.weight"],
            norm_bias=state[f"{name}.norm1.bias"],
            heads=heads,
            mask_mode=mask_mode,
            eps=eps,
            **weights,
        )
        assert isinstance(update, Tensor)  # a pair only with return_attention
        class_token = class_token + update
        branch = feed_forward(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", class_token, eps))
        class_token = class_token + branch
    return class_token


def pool_unmasked(tokens: Tensor, mask: Tensor | None, aggregation: str) -> Tensor:
    """Pool the unmasked patch tokens, instead of the aggregator.

    Args:
        tokens: (B, N, D) floating, after the final norm.
        mask: (B, N) bool, True = masked, or None.
        aggregation: "gap" for their average, "gmp" for the maximum of each feature.

    Returns:
        (B, D); 0 for an image whose patches are all masked.

    Source: paper, Table 4.
    """
    pooled = []
    for b in range(len(tokens)):
        kept = tokens[b] if mask is None else tokens[b, ~mask[b]]
        if len(kept) == 0:
            pooled.append(torch.zeros_like(tokens[b, 0]))
        else:
            pooled.append(kept.mean(dim=0) if aggregation == "gap" else kept.max(dim=0).values)
    return torch.stack(pooled)


def count_blocks(state: State, prefix: str) -> int:
    """Count the numbered blocks that a state dict holds under a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
