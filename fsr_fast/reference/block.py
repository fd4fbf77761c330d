"""The parts of a transformer's block as functions of a flat state dict; its keys determine which parts a block has.

`Trunk` holds the rest: the epsilon of the norms, the activation, and rotary positions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
EPS = 1e-6  # of every LayerNorm, unless the trunk has another


class Rotary(NamedTuple):
    """Rotary positions: each pair of a head's channels is rotated by an angle that grows with row or column."""

    frequencies: tuple[float, ...]
    """Angle per unit of a coordinate; used for rows, then again for columns."""
    centred: bool
    """Whether coordinates run from -1 to 1 between the image's edges (DINOv3) or count patches from 0 (EVA-02)."""
    reference: tuple[int, int] | None
    """Grid to which counted coordinates are scaled, or None."""
    halves: bool
    """Whether a pair is channel i with i + d/2, or 2i with 2i + 1."""


class Trunk(NamedTuple):
    """Properties of a transformer that its weights do not determine; the defaults are the plain one's."""

    eps: float = EPS
    """Epsilon of its norms."""
    activation: str = "gelu"
    """Of its perceptrons: "gelu", "gelu_tanh", "quick_gelu" (CLIP) or "silu"; a gated one always has silu."""
    rotary: Rotary | None = None
    """Rotary positions, or None."""


PLAIN = Trunk()


def linear(state: State, name: str, vectors: Tensor) -> Tensor:
    """Apply a named linear layer; its bias is optional."""
    return F.linear(vectors, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(state: State, name: str, tokens: Tensor, eps: float = EPS) -> Tensor:
    """Apply a named LayerNorm."""
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def optional_norm(state: State, name: str, tokens: Tensor, eps: float) -> Tensor:
    """Apply a named LayerNorm that only some transformers have."""
    return layer_norm(state, name, tokens, eps) if f"{name}.weight" in state else tokens


def layer_scale(state: State, block: str, branch: int, tokens: Tensor) -> Tensor:
    """Scale the channels of a block's first or second branch, where the block has LayerScale."""
    for name in (f"{block}.ls{branch}.gamma", f"{block}.gamma_{branch}"):
        if name in state:
            return tokens * state[name]
    return tokens


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Apply a named activation."""
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    if activation == "silu":
        return hidden * torch.sigmoid(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def feed_forward(state: State, name: str, tokens: Tensor, trunk: Trunk = PLAIN) -> Tensor:
    """Apply a block's two-layer perceptron; a gated one (SwiGLU) holds gate and value in two layers or in one."""
    if f"{name}.fc1_g.weight" in state:
        gate, value = linear(state, f"{name}.fc1_g", tokens), linear(state, f"{name}.fc1_x", tokens)
        hidden = activate(gate, "silu") * value
    else:
        hidden = linear(state, f"{name}.fc1", tokens)
        if hidden.shape[-1] == 2 * state[f"{name}.fc2.weight"].shape[1]:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = activate(gate, "silu") * value
        else:
            hidden = activate(hidden, trunk.activation)
    return linear(state, f"{name}.fc2", optional_norm(state, f"{name}.norm", hidden, trunk.eps))


def project_tokens(state: State, name: str, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to queries, keys and values of all heads, by one layer or by three."""
    if f"{name}.qkv.weight" not in state:
        return (
            linear(state, f"{name}.q_proj", tokens),
            linear(state, f"{name}.k_proj", tokens),
            linear(state, f"{name}.v_proj", tokens),
        )
    query, key, value = linear(state, f"{name}.qkv", tokens).chunk(3, dim=2)
    if f"{name}.q_bias" in state:
        query, value = query + state[f"{name}.q_bias"], value + state[f"{name}.v_bias"]
    return query, key, value


def rotary_angles(rotary: Rotary, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Compute the angles of every patch: (h * w, d / 2), those of its row, then those of its column.

    Coordinates are computed in float32, as the released networks do.

    Source: Heo et al., Rotary Position Embedding for Vision Transformer (ECCV 2024), axial form; DINOv3 and EVA-02.
    """
    h, w = grid
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float64)
    coordinates = []
    for axis, side in enumerate(grid):
        counted = torch.arange(side, dtype=torch.float32)
        if rotary.centred:
            coordinates.append(2 * ((counted + 0.5) / side) - 1)
        elif rotary.reference is not None:
            coordinates.append(counted / side * rotary.reference[axis])
        else:
            coordinates.append(counted)
    rows, columns = coordinates
    angles = [
        torch.cat([rows[y].double() * frequencies, columns[x].double() * frequencies])
        for y in range(h)
        for x in range(w)
    ]
    return torch.stack(angles).to(dtype)


def rotate(vectors: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """Rotate the pairs of channels of vectors (B, N, d) by angles (N, d / 2)."""
    first, second = vectors.chunk(2, dim=2) if halves else (vectors[:, :, 0::2], vectors[:, :, 1::2])
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, dim=2) if halves else torch.stack(turned, dim=3).flatten(2)


def self_attention(
    state: State, name: str, tokens: Tensor, heads: int, trunk: Trunk = PLAIN, grid: tuple[int, int] = (0, 0)
) -> Tensor:
    """Attend from every token to all others, with the N x N attention written out.

    Args:
        state: flat state dict.
        name: of the attention, e.g. "encoder.blocks.0.attn".
        tokens: (B, N, D) floating, normed; the patches of the grid are the last h * w of them.
        heads: number of heads; divides D.
        trunk: for rotary positions and the epsilon of norms.
        grid: h and w, needed for rotary positions.

    Returns:
        (B, N, D), without the residual.
    """
    query, key, value = project_tokens(state, name, tokens)
    width = query.shape[2] // heads
    reads = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        asked = optional_norm(state, f"{name}.q_norm", query[:, :, part], trunk.eps)
        offered = optional_norm(state, f"{name}.k_norm", key[:, :, part], trunk.eps)
        if trunk.rotary is not None:
            angles = rotary_angles(trunk.rotary, grid, tokens.dtype)
            front = tokens.shape[1] - len(angles)
            asked, offered = (
                torch.cat([one[:, :front], rotate(one[:, front:], angles, trunk.rotary.halves)], dim=1)
                for one in (asked, offered)
            )
        logits = asked @ offered.transpose(1, 2) / width**0.5  # (B, N, N)
        reads.append(logits.softmax(dim=2) @ value[:, :, part])
    mixed = optional_norm(state, f"{name}.norm", torch.cat(reads, dim=2), trunk.eps)
    return linear(state, f"{name}.proj", mixed)
