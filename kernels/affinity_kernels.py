"""Tiles of pairs of patches: the Triton kernels of the affinity sums (paper, L_aff of Eq. 10).

With unit vectors u_i = f_i / max(|f_i|, 1e-8) and s_ij = u_i . u_j, |s_ij| is summed over ordered known pairs. A first
launch takes the norms and lists the patches of known label first, so that the cost follows the square of their number.
Forward computes tiles of F Fᵀ, i-tile <= j-tile only, and keeps of each pair its sign, one byte, and of each patch the
sums of its row, over patches of its label and over the others. Backward needs nothing else: with W_ij = 2 sign(s_ij) *
(gradient of the sum that the pair belongs to), dU_i = Σ_j W_ij u_j is one matrix product whose left factor is built
from signs and labels, and dU_i . u_i = Σ_j W_ij s_ij is the row's two sums, weighted;
df_i = (dU_i - (dU_i . u_i) u_i) / |f_i|.

Legend: B batch, N patches, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import FEATURE_DTYPES, CompileCase, device_guard, dot, next_power_of_2, require_dtype, tl, triton

EPS = 1e-8  # smallest norm that a vector is divided by
NO_NORM = -1.0  # in place of 1 / norm for a patch of unknown label
NORM_EPS, UNKNOWN = tl.constexpr(EPS), tl.constexpr(NO_NORM)  # constants for the kernels
PREPARE_ROWS, PREPARE_COLUMNS = 16, 256  # patches of one program of the first launch, and labels it compares at once


# --- kernels


@triton.jit
def prepare_kernel(
    features, labels, order, inverse, partial, N, D, ignore_index,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A few patches: their place in the list [known, unknown], 1 / norm at that place, and how many pairs they form."""
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    labels += b * N
    n = start + tl.arange(0, ROWS)
    label = tl.load(labels + n, mask=n < N, other=ignore_index)
    known = label != ignore_index
    before, total = tl.zeros((), tl.int32), tl.zeros((), tl.int32)  # known patches
    same = tl.zeros((ROWS,), tl.int32)
    for start_j in range(0, N, COLUMNS):
        j = start_j + tl.arange(0, COLUMNS)
        label_j = tl.load(labels + j, mask=j < N, other=ignore_index)
        known_j = label_j != ignore_index
        total += tl.sum(known_j.to(tl.int32), 0)
        before += tl.sum((known_j & (j < start)).to(tl.int32), 0)
        same += tl.sum(((label[:, None] == label_j[None, :]) & known_j[None, :]).to(tl.int32), 1)
    rank = before + tl.cumsum(known.to(tl.int32), 0)  # known patches up to and including this one
    place = b * N + tl.where(known, rank - 1, total + n - rank)
    d = tl.arange(0, WIDTH)
    values = features + (b * N + n[:, None]) * D + d[None, :]
    values = tl.load(values, mask=known[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(values * values, 1))
    tl.store(order + place, n, mask=n < N)
    tl.store(inverse + place, tl.where(known, 1.0 / tl.maximum(norm, NORM_EPS), UNKNOWN), mask=n < N)
    out = partial + (b * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(out, 0.0)
    tl.store(out + 1, tl.sum(tl.where(known, same - 1, 0), 0).to(tl.float32))
    tl.store(out + 2, 0.0)
    tl.store(out + 3, tl.sum(tl.where(known, total - same, 0), 0).to(tl.float32))


@triton.jit
def _labels(labels, inverse, n, place, N, NONE: tl.constexpr):
    """(label, 1 / norm) of the patches ``n`` at these places of the list; (NONE, 0) where unknown or beyond its end."""
    inverse = tl.load(inverse + place, mask=place < N, other=UNKNOWN)
    label = tl.load(labels + n).to(tl.int32)
    return tl.where(inverse == UNKNOWN, NONE, label), tl.where(inverse == UNKNOWN, 0.0, inverse)


@triton.jit
def _store_row_sums(rows, n, N, similarity, same, axis: tl.constexpr):
    """Sums of a tile along one axis, over patches of the same label and over the others."""
    tl.store(rows + n * 2, tl.sum(tl.where(same, similarity, 0.0), axis), mask=n < N)
    tl.store(rows + n * 2 + 1, tl.sum(tl.where(same, 0.0, similarity), axis), mask=n < N)


@triton.jit
def sums_kernel(
    features,  # (B,N,D)
    labels,  # (B,N)
    order,  # (B,N) int32
    inverse,  # (B,N) fp32
    partial,  # (B,tiles,tiles,4) fp32
    rows,  # (B,tiles,N,2) fp32: the row sums over one tile of columns
    signs,  # (B,N,N) int8 in the list's order; undefined beyond the known patches
    N,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Sums of one tile of pairs; a tile above the diagonal also counts for its mirror image."""
    tile_i, tile_j, b = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(0)
    out = partial + ((b * tiles + tile_i) * tiles + tile_j) * 4
    i = tile_i * ROWS + tl.arange(0, ROWS)
    j = tile_j * ROWS + tl.arange(0, ROWS)
    features += b * N * D
    labels += b * N
    order += b * N
    inverse += b * N
    # known patches come first, in i's tile too
    width = tl.where((tile_i <= tile_j) & (tl.load(inverse + tile_j * ROWS) != UNKNOWN), D, 0)
    n_i = tl.load(order + i, mask=i < N, other=0)
    n_j = tl.load(order + j, mask=j < N, other=0)
    d = tl.arange(0, WIDTH)
    left = features + n_i[:, None] * D + d[None, :]
    right = features + n_j[None, :] * D + d[:, None]
    product = tl.zeros((ROWS, ROWS), tl.float32)
    for start in range(0, width, WIDTH):
        f_i = tl.load(left + start, mask=start + d[None, :] < D, other=0.0)
        f_j = tl.load(right + start, mask=start + d[:, None] < D, other=0.0)
        product = dot(f_i, f_j, product)
    label_i, inverse_i = _labels(labels, inverse, n_i, i, N, -1)
    label_j, inverse_j = _labels(labels, inverse, n_j, j, N, -2)
    same = label_i[:, None] == label_j[None, :]
    product = tl.where(i[:, None] == j[None, :], 0.0, product)
    similarity = tl.abs(product) * inverse_j[None, :]
    times = tl.where(tile_i == tile_j, 1.0, 2.0)
    tl.store(out, times * tl.sum(inverse_i * tl.sum(tl.where(same, similarity, 0.0), 1), 0))
    tl.store(out + 1, 0.0)
    tl.store(out + 2, times * tl.sum(inverse_i * tl.sum(tl.where(same, 0.0, similarity), 1), 0))
    tl.store(out + 3, 0.0)
    if WITH_GRADIENT and tile_i <= tile_j:
        _store_row_sums(rows + (b * tiles + tile_j) * N * 2, i, N, similarity, same, 1)
        if tile_i < tile_j:
            similarity = tl.abs(product) * inverse_i[:, None]
            _store_row_sums(rows + (b * tiles + tile_i) * N * 2, j, N, similarity, same, 0)
        if width > 0:
            signs += b * N * N
            sign = (product > 0).to(tl.int8) - (product < 0).to(tl.int8)
            tl.store(signs + i[:, None] * N + j[None, :], sign, mask=(i[:, None] < N) & (j[None, :] < N))
            sign = tl.trans(sign)
            tl.store(signs + j[:, None] * N + i[None, :], sign, mask=(j[:, None] < N) & (i[None, :] < N))


@triton.jit
def backward_kernel(
    gradient,  # (4,) fp32
    features,  # (B,N,D)
    labels,  # (B,N)
    order,  # (B,N) int32
    inverse,  # (B,N) fp32
    rows,  # (B,N,2) fp32
    signs,  # (B,N,N) int8
    result,  # (B,N,D)
    N,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT: tl.constexpr,
):
    """OUT columns of the gradient of ROWS patches."""
    b = tl.program_id(2).to(tl.int64)
    features += b * N * D
    labels += b * N
    order += b * N
    inverse += b * N
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    n_i = tl.load(order + i, mask=i < N, other=0)
    label_i, inverse_i = _labels(labels, inverse, n_i, i, N, -1)
    same_gradient, different_gradient = tl.load(gradient), tl.load(gradient + 2)
    largest = tl.maximum(tl.abs(same_gradient), tl.abs(different_gradient))
    largest = tl.where(largest == 0, 1.0, largest)
    same_gradient, different_gradient = same_gradient / largest, different_gradient / largest  # keeps fp16 in range
    known = tl.zeros((), tl.int32)
    for start in range(0, tl.where(tl.load(inverse + tl.program_id(1) * ROWS) != UNKNOWN, N, 0), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        known += tl.sum((tl.load(inverse + j, mask=j < N, other=UNKNOWN) != UNKNOWN).to(tl.int32), 0)
    signs += (b * N + i[:, None]) * N
    towards = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, known, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        n_j = tl.load(order + j, mask=j < N, other=0)
        label_j, inverse_j = _labels(labels, inverse, n_j, j, N, -2)
        if features.dtype.element_ty == tl.float16:
            inverse_j = tl.minimum(inverse_j, 6e4)  # norms below 2e-5, subnormal in fp16
        sign = tl.load(signs + j[None, :], mask=(i[:, None] < N) & (j[None, :] < N), other=0)
        weight = tl.where(label_i[:, None] == label_j[None, :], same_gradient, different_gradient)
        weight *= inverse_j[None, :] * sign.to(tl.float32)
        others = features + n_j[:, None] * D + column[None, :]
        others = tl.load(others, mask=column[None, :] < D, other=0.0)
        towards = dot(weight.to(others.dtype), others, towards)
    rows += (b * N + i) * 2
    along = same_gradient * tl.load(rows, mask=i < N, other=0.0)
    along += different_gradient * tl.load(rows + 1, mask=i < N, other=0.0)
    along = tl.where(inverse_i * NORM_EPS < 1.0, along * inverse_i * inverse_i, 0.0)  # below eps the norm is a constant
    inside = (i[:, None] < N) & (column[None, :] < D)
    place = n_i[:, None] * D + column[None, :]
    own = tl.load(features + place, mask=inside, other=0.0).to(tl.float32)
    value = 2 * largest * inverse_i[:, None] * (towards - along[:, None] * own)
    tl.store(result + b * N * D + place, value.to(result.dtype.element_ty), mask=inside)


# --- launch


def configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile of pairs in the forward pass and its warps; fp32 multiplies in three passes and takes half the tile."""
    if dtype == torch.float32:
        return {"ROWS": 64, "WIDTH": 32, "num_warps": 8}
    return {"ROWS": 128, "WIDTH": 64, "num_warps": 16}


def backward_configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile of signs, columns of the gradient that a program holds in registers, and its warps."""
    rows = 64 if dtype == torch.float32 else 128
    return {"ROWS": rows, "COLUMNS": rows // 2, "OUT": 128, "num_warps": 8}


def launch_sums(
    features: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results of ``fsr::affinity_sums`` for features (B, N, D) and labels (B, N) of any strides."""
    require_dtype("features (Triton)", features, FEATURE_DTYPES)
    features, labels = features.contiguous(), labels.contiguous()
    B, N, D = features.shape
    order = labels.new_empty(B, N, dtype=torch.int32)
    inverse = features.new_empty(B, N, dtype=torch.float32)
    constants = configuration(features.dtype)
    tiles = triton.cdiv(N, constants["ROWS"])
    groups = triton.cdiv(N, PREPARE_ROWS)
    partial = inverse.new_empty(B * (tiles * tiles + groups), 4)
    rows = inverse.new_empty((B, tiles, N, 2) if with_gradient else (0, 0, 0, 2))
    signs = inverse.new_empty((B, N, N) if with_gradient else 0, dtype=torch.int8)
    with device_guard(features):
        prepare_kernel[(groups, B)](
            features, labels, order, inverse, partial[B * tiles * tiles :], N, D, ignore_index,
            ROWS=PREPARE_ROWS, COLUMNS=PREPARE_COLUMNS, WIDTH=next_power_of_2(D), num_warps=8,
        )  # fmt: skip
        sums_kernel[(tiles, tiles, B)](
            features, labels, order, inverse, partial, rows, signs, N, D,
            **constants, WITH_GRADIENT=with_gradient, num_stages=3,
        )  # fmt: skip
    return partial.sum(0), order, inverse, rows.sum(1), signs


def launch_backward(gradient: Tensor, features: Tensor, labels: Tensor, *found: Tensor) -> Tensor:
    """Gradient of the features (B, N, D) from that of the four sums, (4,) fp32, and the forward pass's results."""
    features, labels = features.contiguous(), labels.contiguous()
    B, N, D = features.shape
    result = features.new_empty(B, N, D)
    constants = backward_configuration(features.dtype)
    grid = (triton.cdiv(D, constants["OUT"]), triton.cdiv(N, constants["ROWS"]), B)
    with device_guard(features):
        backward_kernel[grid](gradient.contiguous(), features, labels, *found, result, N, D, **constants, num_stages=3)
    return result


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernels, for the ahead-of-time compile test."""
    pointers = {"labels": "*i64", "order": "*i32", "inverse": "*fp32", "partial": "*fp32", "rows": "*fp32"}
    pointers |= {"signs": "*i8", "gradient": "*fp32"}
    integers = dict.fromkeys(("N", "D"), "i32:16") | {"ignore_index": "i32"}
    cases: list[tuple[str, Any, dict[str, Any], str]] = [
        ("prepare", prepare_kernel, {"ROWS": PREPARE_ROWS, "COLUMNS": PREPARE_COLUMNS, "WIDTH": 1024}, "bf16")
    ]
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        cases.append(("sums", sums_kernel, configuration(dtype) | {"WITH_GRADIENT": True}, kind))
        cases.append(("backward", backward_kernel, backward_configuration(dtype), kind))
    cases.append(
        ("sums without gradient", sums_kernel, configuration(torch.bfloat16) | {"WITH_GRADIENT": False}, "bf16")
    )
    for name, kernel, constants, kind in cases:
        types = {"features": f"*{kind}", "result": f"*{kind}"} | pointers | integers
        signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
        main = kind == "bf16" and kernel is not prepare_kernel
        warps = constants.pop("num_warps", 8)
        yield CompileCase(f"{name} {kind}", kernel, signature, constants, warps, 3, main)
