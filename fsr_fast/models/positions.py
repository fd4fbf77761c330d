"""Positions of patches: embeddings that are added once, and rotary positions that rotate queries and keys."""

import functools
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor


class Rotary(NamedTuple):
    """Parameters of a transformer's rotary positions."""

    frequencies: tuple[float, ...]
    """d/4 angles per unit of a coordinate; rows take the first half of the channels, columns the second."""
    centred: bool
    """Whether coordinates run from -1 to 1 between the picture's edges (DINOv3) or count patches from 0 (EVA-02)."""
    reference: tuple[int, int] | None
    """Grid that counted coordinates are scaled to; None: not scaled."""
    halves: bool
    """Whether a channel is paired with the one half the width away, not with its neighbour."""


def read_rotary(rope: Any) -> Rotary:
    """Read the rotary positions of a timm transformer from its module."""
    if type(rope) is RotaryEmbeddingDinoV3:
        periods: list[float] = cast(Tensor, rope.periods).double().tolist()
        return Rotary(tuple(2 * math.pi / period for period in periods), True, None, rope.rotate_half)
    bands, reference = rope.bands.double().tolist(), rope.ref_feat_shape
    return Rotary(tuple(bands), False, None if reference is None else tuple(reference), rope.rotate_half)


def rotary_obstacle(rope: Any) -> str | None:
    """Explain why rotary positions cannot be taken over; None: they can."""
    if not isinstance(rope, RotaryEmbeddingCat | RotaryEmbeddingDinoV3):
        return "its rotary positions are learned, or not those of EVA-02 or DINOv3"
    if rope.grid_offset or rope.grid_indexing != "ij":
        return "its rotary positions are shifted or count columns first"
    if isinstance(rope, RotaryEmbeddingCat) and (rope.in_pixels or rope.grid_type != "index"):
        return "its rotary positions are counted in pixels"
    if rope.aug_active or getattr(rope, "normalize_coords", "separate") != "separate":
        return "its rotary positions are random, or scaled by one factor for both directions"
    return None


def turn_angles(rotary: Rotary, grid: tuple[int, int], before: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return sines and cosines of the rotary positions of a grid; recent grids are cached.

    Args:
        rotary: of the transformer.
        grid: rows h and columns w of patches.
        before: number of tokens in front of the patches, which are not rotated.
        dtype: of the result; coordinates are computed in float32, as the released networks do.
        device: likewise.

    Returns:
        (before + h·w, 2d), sines, then cosines.
    """
    compute = _turn_angles.__wrapped__ if torch.compiler.is_exporting() else _turn_angles
    angles: Tensor = compute(rotary, grid, before, dtype, device)
    return angles


@functools.lru_cache(maxsize=16)
def _turn_angles(
    rotary: Rotary, grid: tuple[int, int], before: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    axes = []
    for side, reference in zip(grid, rotary.reference or grid, strict=True):
        steps = torch.arange(side, dtype=torch.float32)
        axes.append(2 * ((steps + 0.5) / side) - 1 if rotary.centred else steps / side * reference)
    rows, columns = (axis.double() for axis in axes)
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float64)
    turns = torch.meshgrid(rows, columns, indexing="ij")
    angles = (torch.stack(turns, -1).flatten(0, 1).unsqueeze(-1) * frequencies).flatten(1).to(dtype)  # (h·w, d/2)
    angles = torch.cat([angles, angles], -1) if rotary.halves else angles.repeat_interleave(2, -1)
    sines, cosines = F.pad(angles.sin(), (0, 0, before, 0)), F.pad(angles.cos(), (0, 0, before, 0), value=1.0)
    table = torch.cat([sines, cosines], -1)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize the patch part of a position embedding bicubically.

    Args:
        embedding: (1, 1 + grid rows · columns, D); the first entry belongs to the class token and is kept.
        grid: rows and columns that it was made for.
        size: rows and columns of the result.

    Returns:
        (1, 1 + size rows · columns, D).
    """
    exporting = torch.compiler.is_exporting()  # an exported graph accepts any size
    if not exporting and tuple(grid) == tuple(size):
        return embedding
    first, patches = embedding[:, :1], embedding[:, 1:]
    wide = torch.promote_types(patches.dtype, torch.float32)
    if exporting:
        patches = patches.transpose(1, 2).unflatten(2, grid).to(wide)
        patches = F.interpolate(patches, size=tuple(size), mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2)
    else:  # torch's bicubic kernel for GPUs runs one thread per patch, each over all D channels: milliseconds
        rows, columns = (bicubic_matrix(*sides, wide, patches.device) for sides in zip(grid, size, strict=True))
        with torch.autocast(patches.device.type, enabled=False):
            patches = rows @ patches.to(wide).reshape(grid[0], -1)  # (rows, grid columns · D)
            patches = (columns @ patches.unflatten(1, (grid[1], -1))).flatten(0, 1).unsqueeze(0)
    return torch.cat([first, patches.to(embedding.dtype)], dim=1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what an inference caches, a training may use
def bicubic_matrix(before: int, after: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix (after, before) that resizes one side; recent ones are cached."""
    points = torch.eye(before, dtype=dtype, device=device).view(1, before, before, 1)
    return F.interpolate(points, size=(after, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T
