"""Exact Gaussian filtering of pixels by place and colour: attention without normalisation on five-wide features.

Pixels are sorted along a Z-order curve through feature space and cut into tiles of neighbours on it. Two tiles whose
bounding boxes are so far apart that every weight between them is below exp(-24) = 4e-11 (float64: exp(-50) = 2e-22)
are skipped; all other pairs are computed. On photographs of 224x224 pixels, 67 % of the tile pairs remain for standard
deviations of 15 grey levels and 50 pixels, 31 % for 5 and 121.

Legend: B batch, P pixels, F features, V filtered values, T tiles, h w image.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import (
    FEATURE_DTYPES,
    CompileCase,
    device_guard,
    next_power_of_2,
    require_dtype,
    require_same_device,
    tl,
    triton,
    use_triton,
)

_CUTOFF = {torch.float32: 24.0, torch.float64: 50.0}  # pairs whose weight is below exp(-cutoff) may be skipped
_KEY_BITS = 30  # of the Z-order key, an int32
_CPU_TILE = 128
_CPU_SINGLE = 640  # pixels up to which one tile of everything is the faster way
_CPU_COLUMNS = 16  # tiles that one matrix product takes: 128 x 2048 weights stay in the cache
_QUERIES = 128  # pixels that a Triton program filters
_LIST_BLOCK = 1024


def bilateral_features(images: Tensor, *, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """Describes every pixel by place and colour, in standard deviations, for :func:`gaussian_filter`.

    Args:
        images: (B, 3, h, w) floating, RGB.
        sigma_rgb: standard deviation in colour, in the images' unit, above 0.
        sigma_xy: standard deviation in place, in pixels, above 0.

    Returns:
        (B, 5, h * w) float32 (float64 for float64 images): red, green, blue, row, column.

    Raises:
        ValueError: the shape does not fit or a deviation is not above 0.
        TypeError: the dtype is not floating.
    """
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, h, w) with B, h, w >= 1")
    if not (sigma_rgb > 0 and sigma_xy > 0):
        raise ValueError(f"sigma_rgb is {sigma_rgb}, sigma_xy is {sigma_xy}; both must be above 0")
    require_dtype("images", images, (*FEATURE_DTYPES, torch.float64))
    B, _, h, w = images.shape
    colours = images.to(torch.promote_types(images.dtype, torch.float32)) / sigma_rgb
    rows = (torch.arange(h, dtype=colours.dtype, device=images.device) / sigma_xy)[:, None].expand(B, 1, h, w)
    columns = (torch.arange(w, dtype=colours.dtype, device=images.device) / sigma_xy).expand(B, 1, h, w)
    return torch.cat([colours, rows, columns], dim=1).flatten(2)


def gaussian_filter(features: Tensor, values: Tensor) -> Tensor:
    """Sums the values of all pixels, weighing each by its nearness: Σ_j exp(-½ |f_i - f_j|²) v_j, pair i = j included.

    The sum is not normalised: filter a channel of ones to normalise. No gradient. Distances are float32; the Triton
    kernels multiply weights and values on the matrix units in TF32, whose result is within 2⁻¹⁰ of the exact sum for
    values of one sign.

    Args:
        features: (B, F, P) float32 or float64, in standard deviations; F is 2 or 5 in the Triton kernels.
        values: (B, V, P), same dtype.

    Returns:
        (B, V, P), same dtype.

    Raises:
        ValueError: a shape does not fit, or devices differ.
        TypeError: a dtype does not fit.
    """
    if features.dim() != 3 or 0 in features.shape:
        raise ValueError(f"features has shape {tuple(features.shape)}; expected (B, F, P), none of them 0")
    B, _, P = features.shape
    if values.dim() != 3 or values.shape[0] != B or values.shape[2] != P:
        raise ValueError(f"values has shape {tuple(values.shape)}; expected (B, V, P) = ({B}, V, {P})")
    require_dtype("features", features, (torch.float32, torch.float64))
    require_dtype("values", values, (features.dtype,))
    require_same_device(features=features, values=values)
    return gaussian_filter_op(features.detach(), values.detach())


@torch.library.custom_op("fsr::gaussian_filter", mutates_args=())
def gaussian_filter_op(features: Tensor, values: Tensor) -> Tensor:
    """Filters checked tensors; arguments as in :func:`gaussian_filter`."""
    if use_triton(features):
        return _filter_on_gpu(features, values)
    P = features.shape[2]
    tile = P if P <= _CPU_SINGLE else _CPU_TILE
    order = _tile_order(features, tile)
    sorted_values = _take(values, order)
    sorted_values[:, :, P:] = 0
    tiles = (_take(features, order), sorted_values, torch.zeros_like(sorted_values))
    tiled_features, tiled_values, filtered = (channels.unflatten(2, (-1, tile)) for channels in tiles)
    for image in zip(tiled_features, tiled_values, filtered, strict=True):
        _filter_tiles(*image)
    result = values.new_empty(values.shape)
    return result.scatter_(2, order[:, None, :P].expand_as(values), filtered.flatten(2)[:, :, :P])


@gaussian_filter_op.register_fake
def _(features, values):
    return values.new_empty(values.shape)


def _tile_order(features: Tensor, tile: int) -> Tensor:
    """Pixels along the Z-order curve, (B, T * tile) int64; the last pixel fills up the last tile."""
    _, axes, P = features.shape
    bits = min(15, _KEY_BITS // axes)
    cells = (features - features.amin(dim=2, keepdim=True)).clamp_(max=2**bits - 1).to(torch.int32)
    bit = torch.arange(bits, dtype=torch.int32, device=features.device)
    axis = torch.arange(axes, dtype=torch.int32, device=features.device)[:, None, None]
    keys = (((cells[..., None] >> bit) & 1) << (bit * axes + axis)).sum(dim=(1, 3), dtype=torch.int32)
    order = keys.argsort(dim=1, stable=True)
    return torch.cat([order, order[:, -1:].expand(-1, -P % tile)], dim=1)


def _take(channels: Tensor, order: Tensor) -> Tensor:
    return channels.gather(2, order[:, None].expand(-1, channels.shape[1], -1))


def _filter_tiles(features: Tensor, values: Tensor, filtered: Tensor) -> None:
    """Adds to filtered (V, T, n) the filter of values (V, T, n) at features (F, T, n) of one image.

    Weights are symmetric: each pair of tiles is computed once and serves both. Exponents come out of one matrix
    product, -½ |a - b|² = [a, -½ |a|², 1] · [b, 1, -½ |b|²], in float64 since the terms cancel.
    """
    V, T, n = values.shape
    cutoff = _CUTOFF[features.dtype]
    lowest = math.log(torch.finfo(features.dtype).tiny) / 2  # denormal numbers would slow the products down many times
    low, high = features.amin(dim=2), features.amax(dim=2)  # (F, T)
    points = features.double()
    norms = -0.5 * points.square().sum(dim=0, keepdim=True)
    left = torch.cat([points, norms, torch.ones_like(norms)]).movedim(0, 2).contiguous()  # (T, n, F + 2)
    right = torch.cat([points, torch.ones_like(norms), norms])  # (F + 2, T, n)

    def weigh(tile: int, others: Tensor | slice) -> Tensor:
        exponents = left[tile] @ right[:, others].flatten(1)
        return exponents.to(features.dtype).clamp_(min=lowest).exp_()  # (n, n * others)

    for tile in range(T):
        value = values[:, tile]
        total = value @ weigh(tile, slice(tile, tile + 1))
        gap = torch.maximum(low[:, tile, None] - high, low - high[:, tile, None])[:, tile + 1 :].clamp_(min=0)
        near = (gap.square().sum(dim=0) < 2 * cutoff).nonzero().flatten() + (tile + 1)
        for others in near.split(_CPU_COLUMNS):
            weights = weigh(tile, others)
            total.addmm_(values[:, others].flatten(1), weights.T)
            filtered.index_add_(1, others, (value @ weights).view(V, -1, n))
        filtered[:, tile] += total


def _filter_on_gpu(features: Tensor, values: Tensor) -> Tensor:
    require_dtype("features", features, (torch.float32,))
    B, axes, P = features.shape
    V = values.shape[1]
    if axes not in (2, 5):
        raise ValueError(f"features has {axes} channels; expected 2 (place) or 5 (colour and place)")
    order = _tile_order(features, _QUERIES)
    block_v, block_keys, warps, stages = _filter_config(V)
    # exp(-½ x²) = 2^(-y²) for y = x * sqrt(½ log2 e)
    scaled = _take(features, order) * math.sqrt(0.5 * math.log2(math.e))
    sorted_values = _take(values, order)
    queries, keys = scaled.unflatten(2, (-1, _QUERIES)), scaled.unflatten(2, (-1, block_keys))
    Q, T = queries.shape[2], keys.shape[2]
    near = torch.empty(B, Q, T, dtype=torch.int32, device=features.device)
    count = torch.empty(B, Q, dtype=torch.int32, device=features.device)
    output = torch.empty(values.shape, dtype=torch.float32, device=features.device)
    if output.numel() == 0:
        return output
    boxes = (queries.amin(dim=3), queries.amax(dim=3), keys.amin(dim=3), keys.amax(dim=3))
    with device_guard(features):
        limit = _CUTOFF[torch.float32] * math.log2(math.e)
        _list_near_tiles[(Q, B)](*boxes, near, count, Q, T, limit, F=axes, BLOCK=_LIST_BLOCK, num_warps=4)
        _filter[(Q, triton.cdiv(V, block_v), B)](
            scaled, sorted_values, order, near, count, output, P, order.shape[1], V, Q, T,
            F=axes, QUERIES=_QUERIES, KEYS=block_keys, BLOCK_V=block_v, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return output


def _filter_config(V: int) -> tuple[int, int, int, int]:
    """(values that a program takes, pixels it takes in at a time, warps, stages) for V values."""
    if V > 64:
        return 128, 32, 8, 2
    return max(16, next_power_of_2(V)), 64, 8, 2


@triton.jit
def _list_near_tiles(
    query_low, query_high, key_low, key_high, near, count, Q, T, limit, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Lists, in ascending order, the key tiles near one query tile. Boxes are (B, F, Q) and (B, F, T)."""
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
    """Filters one tile of sorted pixels. features (B, F, padded), values (B, V, padded), output (B, V, P) unsorted."""
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
        total = tl.dot(tl.exp2(-distance), tl.trans(value), total, input_precision="tf32")
    pixel = tl.load(order + image.to(tl.int64) * padded + query)
    target = output + (image * V + channel).to(tl.int64)[None, :] * P + pixel[:, None]
    tl.store(target, total, mask=(query < P)[:, None] & (channel < V)[None, :])


@triton.jit
def _squared_difference(query, key):
    difference = query[:, None] - key[None, :]
    return difference * difference


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
    for axes, V in ((5, 21), (5, 81), (2, 21)):
        block_v, block_keys, warps, stages = _filter_config(V)
        yield CompileCase(
            f"filter F={axes} V={V}",
            _filter,
            {"features": "*fp32", "values": "*fp32", "order": "*i64", "near": "*i32", "count": "*i32"}
            | {"output": "*fp32", "P": "i32", "padded": "i32:16", "V": "i32", "Q": "i32", "T": "i32"},
            {"F": axes, "QUERIES": _QUERIES, "KEYS": block_keys, "BLOCK_V": block_v},
            num_warps=warps,
            num_stages=stages,
            main=axes == 5,
        )
