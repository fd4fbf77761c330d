"""Triton kernels of the Gaussian filter: lists of near tiles, then one program per tile of pixels.

Legend: B batch, P pixels, F features, V filtered values, Q tiles of queries, T tiles of keys.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import INTERPRETED, CompileCase, device_guard, next_power_of_2, require_dtype, tl, triton

QUERIES = 128  # pixels that a program filters
KEYS = (64, 32)  # pixels that it reads at a time, for up to 64 values and for more
_LIST_BLOCK = 1024


# --- kernels


@triton.jit
def _list_near_tiles(
    query_low, query_high, key_low, key_high, near, count, Q, T, limit, F: tl.constexpr, BLOCK: tl.constexpr
):
    """List, in ascending order, the key tiles near one query tile. Boxes are (B, F, Q) and (B, F, T)."""
    query, image = tl.program_id(0), tl.program_id(1)
    row = (image * Q + query).to(tl.int64) * T
    found = 0
    for start in range(0, T, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        inside = tile < T
        distance = tl.zeros([BLOCK], tl.float32)
        for axis in tl.static_range(F):
            here, there = (image * F + axis) * Q + query, (image * F + axis) * T + tile
            before = tl.load(query_low + here) - tl.load(key_high + there, mask=inside, other=0.0)
            behind = tl.load(key_low + there, mask=inside, other=0.0) - tl.load(query_high + here)
            gap = tl.maximum(tl.maximum(before, behind), 0.0)
            distance += gap * gap
        kept = (inside & (distance < limit)).to(tl.int32)
        tl.store(near + row + found + tl.cumsum(kept, 0) - 1, tile, mask=kept > 0)
        found += tl.sum(kept, 0)
    tl.store(count + image * Q + query, found)


@triton.jit
def _filter(
    features, values, order, near, count, output, P, padded, V, Q, T,
    F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Filter one tile of sorted pixels. features (B, F, padded), values (B, V, padded), output (B, V, P) unsorted."""
    tile, image = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    query = tile * QUERIES + tl.arange(0, QUERIES)
    features += (image * F).to(tl.int64) * padded
    values += (image * V).to(tl.int64) * padded
    row = (image * Q + tile).to(tl.int64)
    q0 = tl.load(features + query)
    q1 = tl.load(features + padded + query)
    if F == 5:
        q2 = tl.load(features + 2 * padded + query)
        q3 = tl.load(features + 3 * padded + query)
        q4 = tl.load(features + 4 * padded + query)
    total = tl.zeros([QUERIES, BLOCK_V], tl.float32)
    for index in range(tl.load(count + row)):
        key = tl.load(near + row * T + index) * KEYS + tl.arange(0, KEYS)
        distance = _squared_difference(q0, tl.load(features + key))
        distance += _squared_difference(q1, tl.load(features + padded + key))
        if F == 5:
            distance += _squared_difference(q2, tl.load(features + 2 * padded + key))
            distance += _squared_difference(q3, tl.load(features + 3 * padded + key))
            distance += _squared_difference(q4, tl.load(features + 4 * padded + key))
        inside = (channel < V)[:, None] & (key < P)[None, :]
        value = tl.load(values + channel.to(tl.int64)[:, None] * padded + key[None, :], mask=inside, other=0.0)
        weight = _near_tf32(tl.exp2(-distance))
        total = tl.dot(weight, tl.trans(_near_tf32(value)), total, input_precision="tf32")
    pixel = tl.load(order + image.to(tl.int64) * padded + query)
    target = output + (image * V + channel).to(tl.int64)[None, :] * P + pixel[:, None]
    tl.store(target, total, mask=(query < P)[:, None] & (channel < V)[None, :])


@triton.jit
def _squared_difference(query, key):
    difference = query[:, None] - key[None, :]
    return difference * difference


@triton.jit
def _near_tf32(x):
    """Half a step of tf32 more, so that the matrix units, which cut the bits off, round to nearest.

    Cut off alone, all products would be too small, and the ten iterations of a mean field would add that up. The
    interpreter multiplies fp32 as it is.
    """
    return x if INTERPRETED else (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


# --- launch


class NearTiles(NamedTuple):
    """Scaled features of sorted pixels and, for each tile of queries, the tiles of keys near it."""

    features: Tensor
    """(B, F, Q * QUERIES) float32, in units in which a weight is 2^(-distance²)."""
    cutoff: float
    lists: dict[int, tuple[Tensor, Tensor]]
    """By size of the key tiles: near (B, Q, T) int32, ascending, and their count (B, Q) int32; computed on demand."""


def prepare_near(tiles: Tensor, cutoff: float) -> NearTiles:
    """Prepare sorted pixels for any number of filters.

    Args:
        tiles: (B, F, Q, QUERIES) float32, features in standard deviations; F is 2 or 5.
        cutoff: tiles all of whose weights are below exp(-cutoff) are skipped.

    Raises:
        ValueError: another number of features.
        TypeError: another dtype.
    """
    require_dtype("features", tiles, (torch.float32,))
    if tiles.shape[1] not in (2, 5):
        raise ValueError(f"features has {tiles.shape[1]} channels; expected 2 (place) or 5 (colour and place)")
    # exp(-½ x²) = 2^(-y²) for y = x * sqrt(½ log2 e)
    return NearTiles(tiles.flatten(2) * math.sqrt(0.5 * math.log2(math.e)), cutoff, {})


def launch_filter(near: NearTiles, values: Tensor, order: Tensor, P: int) -> Tensor:
    """Filter sorted values (B, V, Q * QUERIES), of which the first P count; the result (B, V, P) is unsorted."""
    B, V, padded = values.shape
    output = values.new_empty((B, V, P))
    if output.numel() == 0:
        return output
    block_v, block_keys, warps, stages = _filter_config(V)
    with device_guard(values):
        if block_keys not in near.lists:
            near.lists[block_keys] = _launch_list(near, block_keys)
        tiles, count = near.lists[block_keys]
        _, Q, T = tiles.shape
        _filter[(Q, triton.cdiv(V, block_v), B)](
            near.features, values, order, tiles, count, output, P, padded, V, Q, T,
            F=near.features.shape[1], QUERIES=QUERIES, KEYS=block_keys, BLOCK_V=block_v,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return output


def _launch_list(near: NearTiles, block_keys: int) -> tuple[Tensor, Tensor]:
    queries, keys = near.features.unflatten(2, (-1, QUERIES)), near.features.unflatten(2, (-1, block_keys))
    B, axes, Q, _ = queries.shape
    T = keys.shape[2]
    tiles = torch.empty(B, Q, T, dtype=torch.int32, device=queries.device)
    count = torch.empty(B, Q, dtype=torch.int32, device=queries.device)
    boxes = (queries.amin(dim=3), queries.amax(dim=3), keys.amin(dim=3), keys.amax(dim=3))
    limit = near.cutoff * math.log2(math.e)
    _list_near_tiles[(Q, B)](*boxes, tiles, count, Q, T, limit, F=axes, BLOCK=_LIST_BLOCK, num_warps=4)
    return tiles, count


def _filter_config(V: int) -> tuple[int, int, int, int]:
    """(values per program, pixels it reads at a time, warps, stages) for V values."""
    if V > 64:
        return 128, KEYS[1], 8, 2
    return max(16, next_power_of_2(V)), KEYS[0], 8, 2


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernels, for the ahead-of-time compile test."""
    pointers = ("query_low", "query_high", "key_low", "key_high")
    for axes in (2, 5):
        yield CompileCase(
            f"list F={axes}",
            _list_near_tiles,
            dict.fromkeys(pointers, "*fp32")
            | {"near": "*i32", "count": "*i32", "Q": "i32", "T": "i32", "limit": "fp32"},
            {"F": axes, "BLOCK": _LIST_BLOCK},
            num_warps=4,
            main=axes == 5,
        )
    for axes, V in ((5, 4), (5, 21), (5, 40), (5, 81), (2, 21)):
        block_v, block_keys, warps, stages = _filter_config(V)
        yield CompileCase(
            f"filter F={axes} V={V}",
            _filter,
            {"features": "*fp32", "values": "*fp32", "order": "*i64", "near": "*i32", "count": "*i32"}
            | {"output": "*fp32", "P": "i32", "padded": "i32:16", "V": "i32", "Q": "i32", "T": "i32"},
            {"F": axes, "QUERIES": QUERIES, "KEYS": block_keys, "BLOCK_V": block_v},
            num_warps=warps,
            num_stages=stages,
            main=axes == 5,
        )
