"""One block of a vision transformer over packed images, for every supported family of timm."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from fsr_fast.models.attention import Backend, Groups, attend
from fsr_fast.models.float8 import Float8Linears


def run_block(
    block: Any,
    tokens: Tensor,
    drop_path: Tensor | None,
    groups: Groups,
    backend: Backend,
    float8: bool = False,
    packing: Any = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """Run one block on packed images: x + LS(attention(norm(x))), then x + LS(MLP(norm(x))).

    Args:
        block: of timm's transformer, a `Block` or an `EvaBlock`.
        tokens: (T, D).
        drop_path: (2, T, 1), factors of the attention's and the MLP's branch; None: both count.
        groups: sizes of the images in T.
        backend: how attention is computed.
        float8: round the factors of the linear layers to float8.
        packing: as in `attend`.
        rotary: (T, 1, 2d), sines and cosines that rotate queries and keys; None: no rotation.

    Returns:
        (T, D).
    """
    attention = block.attn
    with Float8Linears() if float8 else nullcontext():
        query, key, value = project(attention, block.norm1(tokens), rotary)
        mixed = attend(query.type_as(value), key.type_as(value), value, groups, backend, packing)
        branch = scale(block, 1, attention.proj(attention.norm(mixed)))
        tokens = _add(tokens, branch, None if drop_path is None else drop_path[0])
        branch = scale(block, 2, block.mlp(block.norm2(tokens)))
        return _add(tokens, branch, None if drop_path is None else drop_path[1])


def project(attention: Any, tokens: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to queries, keys and values; the first two normalised and rotated where the family does so.

    Args:
        attention: of a timm block. Its projection is one layer, one layer with separate biases (the key's is a constant
            0), or three layers.
        tokens: (T, D), normalised.
        rotary: as in `run_block`.

    Returns:
        Three of (T, heads, d).
    """
    heads = attention.num_heads
    if attention.qkv is None:
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (torch.unflatten(layer(tokens), -1, (heads, -1)) for layer in layers)
    else:
        projected = attention.qkv(tokens)
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            projected = projected + bias.to(projected.dtype)
        query, key, value = torch.unflatten(projected, -1, (3, heads, -1)).unbind(1)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rotary is not None:
        query, key = (apply_rot_embed_cat(one, rotary, half=attention.rotate_half) for one in (query, key))
    return query, key, value


def scale(block: Any, number: int, branch: Tensor) -> Tensor:
    """Apply LayerScale to a block's first or second branch: a module in `Block`, a parameter or None in `EvaBlock`."""
    layer = getattr(block, f"ls{number}", None)
    if layer is not None:
        scaled: Tensor = layer(branch)
        return scaled
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else branch * gamma


def _add(tokens: Tensor, branch: Tensor, drop_path: Tensor | None) -> Tensor:
    added = tokens + branch if drop_path is None else torch.addcmul(tokens, branch, drop_path)
    return added.to(tokens.dtype)
