"""Tiles of pairs of patches: the the Triton kernels of the affinity sums (paper, L_aff of Eq. 10).

With unit vectors u_i = f_i / max(|f_i|, 1e-8) and s_ij = u_i . u_j, |s_ij| is summed over ordered known pairs.
Forward computes tiles of F Fᵀ, i-tile <= j-tile only, scales them by both norms and reduces each at once. Backward
computes the tiles again, turns them into W_ij = 2 sign(s_ij) * (gradient of the sum that the pair belongs to), and
multiplies: dU_i = Σ_j W_ij u_j, df_i = (dU_i - (dU_i . u_i) u_i) / |f_i|, where dU_i . u_i = Σ_j W_ij s_ij comes with
the tile; sign(0) = 0. A first launch takes the norms and lists the patches of known label first, so that the cost
follows the square of their number; two values a patch are kept beside the input.

Legend: B batch, N patches, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import FEATURE_DTYPES, CompileCase, device_guard, dot, next_power_of_2, require_dtype, tl, triton

EPS = 1e-8  # least norm that a vector is divided by
NO_NORM = -1.0  # stands for 1 / norm of a patch of unknown label
NORM_EPS, UNKNOWN = tl.constexpr(EPS), tl.constexpr(NO_NORM)  # as the kernels read them
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
    rank = before + tl.cumsum(known.to(tl.int32), 0)  # known patches up to and with this one
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
def _products(
    features, n_i, n_j, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tile of F Fᵀ of one image, fp32."""
    d = tl.arange(0, WIDTH)
    left = features + n_i[:, None] * D + d[None, :]
    right = features + n_j[None, :] * D + d[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, WIDTH):
        a = tl.load(left + start, mask=start + d[None, :] < D, other=0.0)
        b = tl.load(right + start, mask=start + d[:, None] < D, other=0.0)
        total = dot(a, b, total)
    return total


@triton.jit
def sums_kernel(
    features, labels, order, inverse, partial, N, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The two sums of one tile of pairs; a tile above the diagonal stands for its mirror image too."""
    tile_i, tile_j, b = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    out = partial + ((b * tl.num_programs(1) + tile_i) * tl.num_programs(0) + tile_j) * 4
    i = tile_i * ROWS + tl.arange(0, ROWS)
    j = tile_j * ROWS + tl.arange(0, ROWS)
    labels += b * N
    order += b * N
    inverse += b * N
    same_sum, different_sum = 0.0, 0.0
    if tile_i <= tile_j and tl.load(inverse + tile_j * ROWS) != UNKNOWN:  # known patches come first, in i's tile too
        n_i = tl.load(order + i, mask=i < N, other=0)
        n_j = tl.load(order + j, mask=j < N, other=0)
        product = _products(features + b * N * D, n_i, n_j, D, ROWS, ROWS, WIDTH)
        label_i, inverse_i = _labels(labels, inverse, n_i, i, N, -1)
        label_j, inverse_j = _labels(labels, inverse, n_j, j, N, -2)
        similarity = tl.where(i[:, None] == j[None, :], 0.0, tl.abs(product)) * inverse_j[None, :]
        same = label_i[:, None] == label_j[None, :]
        same_sum = tl.sum(inverse_i * tl.sum(tl.where(same, similarity, 0.0), 1), 0)
        different_sum = tl.sum(inverse_i * tl.sum(tl.where(same, 0.0, similarity), 1), 0)
    times = tl.where(tile_i == tile_j, 1.0, 2.0)
    tl.store(out, times * same_sum)
    tl.store(out + 1, 0.0)
    tl.store(out + 2, times * different_sum)
    tl.store(out + 3, 0.0)


@triton.jit
def backward_kernel(
    gradient, features, labels, order, inverse, result, N, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """OUT columns of the gradient of ROWS patches."""
    b = tl.program_id(2).to(tl.int64)
    features += b * N * D
    labels += b * N
    order += b * N
    inverse += b * N
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUT + tl.arange(0, OUT)
    inside = column[None, :] < D
    n_i = tl.load(order + i, mask=i < N, other=0)
    label_i, inverse_i = _labels(labels, inverse, n_i, i, N, -1)
    same_gradient, different_gradient = tl.load(gradient), tl.load(gradient + 2)
    largest = tl.maximum(tl.abs(same_gradient), tl.abs(different_gradient))
    largest = tl.where(largest == 0, 1.0, largest)
    same_gradient, different_gradient = same_gradient / largest, different_gradient / largest  # for fp16's sake
    towards = tl.zeros((ROWS, OUT), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    known_i = tl.load(inverse + tl.program_id(0) * ROWS) != UNKNOWN
    for start in range(0, tl.where(known_i, N, 0), COLUMNS):
        if tl.load(inverse + start) != UNKNOWN:
            j = start + tl.arange(0, COLUMNS)
            n_j = tl.load(order + j, mask=j < N, other=0)
            product = _products(features, n_i, n_j, D, ROWS, COLUMNS, WIDTH)
            label_j, inverse_j = _labels(labels, inverse, n_j, j, N, -2)
            if features.dtype.element_ty == tl.float16:
                inverse_j = tl.minimum(inverse_j, 6e4)  # norms below 2e-5, fp16's own subnormal numbers
            weight = tl.where(label_i[:, None] == label_j[None, :], same_gradient, different_gradient)
            weight *= tl.where(product > 0, inverse_j[None, :], tl.where(product < 0, -inverse_j[None, :], 0.0))
            weight = tl.where(i[:, None] == j[None, :], 0.0, weight).to(features.dtype.element_ty)
            others = tl.load(features + n_j[:, None] * D + column[None, :], mask=inside, other=0.0)
            towards = dot(weight, others, towards)
            along += tl.sum(weight.to(tl.float32) * product, 1)
    along = tl.where(inverse_i * NORM_EPS < 1.0, along * inverse_i * inverse_i, 0.0)  # below eps the norm is a constant
    own = features + n_i[:, None] * D + column[None, :]
    own = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    value = 2 * largest * inverse_i[:, None] * (towards - along[:, None] * own)
    out = result + (b * N + n_i[:, None]) * D + column[None, :]
    tl.store(out, value.to(result.dtype.element_ty), mask=(i[:, None] < N) & inside)


# --- launch


def configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile of pairs in the forward pass; fp32 multiplies in three passes and takes half the tile."""
    return {"ROWS": 64, "WIDTH": 32} if dtype == torch.float32 else {"ROWS": 128, "WIDTH": 64}


def backward_configuration(dtype: torch.dtype) -> dict[str, int]:
    """Tile of pairs and columns of the gradient that a program holds in registers."""
    if dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 32, "WIDTH": 32, "OUT": 128}
    return {"ROWS": 64, "COLUMNS": 64, "WIDTH": 64, "OUT": 256}


def launch_sums(features: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Results of ``fsr::affinity_sums`` for features (B, N, D) and labels (B, N) of any strides."""
    require_dtype("features (Triton)", features, FEATURE_DTYPES)
    features, labels = features.contiguous(), labels.contiguous()
    B, N, D = features.shape
    order = labels.new_empty(B, N, dtype=torch.int32)
    inverse = features.new_empty(B, N, dtype=torch.float32)
    constants = configuration(features.dtype)
    tiles = triton.cdiv(N, constants["ROWS"])
    groups = triton.cdiv(N, PREPARE_ROWS)
    partial = features.new_empty(B * (tiles * tiles + groups), 4, dtype=torch.float32)
    with device_guard(features):
        prepare_kernel[(groups, B)](
            features, labels, order, inverse, partial[B * tiles * tiles :], N, D, ignore_index,
            ROWS=PREPARE_ROWS, COLUMNS=PREPARE_COLUMNS, WIDTH=next_power_of_2(D), num_warps=8,
        )  # fmt: skip
        sums_kernel[(tiles, tiles, B)](
            features, labels, order, inverse, partial, N, D, **constants, num_warps=8, num_stages=3
        )
    return partial.sum(0), order, inverse


def launch_backward(gradient: Tensor, features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the features (B, N, D) from that of the four sums, (4,) fp32."""
    features, labels = features.contiguous(), labels.contiguous()
    B, N, D = features.shape
    result = features.new_empty(B, N, D)
    constants = backward_configuration(features.dtype)
    grid = (triton.cdiv(N, constants["ROWS"]), triton.cdiv(D, constants["OUT"]), B)
    with device_guard(features):
        backward_kernel[grid](
            gradient.contiguous(), features, labels, order, inverse, result, N, D,
            **constants, num_warps=8, num_stages=3,
        )  # fmt: skip
    return result


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernels, for the ahead-of-time compile test."""
    pointers = {"labels": "*i64", "order": "*i32", "inverse": "*fp32"}
    integers = dict.fromkeys(("N", "D"), "i32:16") | {"ignore_index": "i32"}
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        signature = {"features": f"*{kind}"} | pointers | integers
        main = kind == "bf16"
        sums = {**configuration(dtype)}
        yield CompileCase(f"sums {kind}", sums_kernel, signature | {"partial": "*fp32"}, sums, 8, 3, main)
        signature |= {"gradient": "*fp32", "result": f"*{kind}"}
        backward = {**backward_configuration(dtype)}
        yield CompileCase(f"backward {kind}", backward_kernel, signature, backward, 8, 3, main)
    signature = {"features": "*bf16"} | pointers | integers
    prepare = {"ROWS": PREPARE_ROWS, "COLUMNS": PREPARE_COLUMNS, "WIDTH": 1024}
    yield CompileCase("prepare bf16", prepare_kernel, signature | {"partial": "*fp32"}, prepare, 8, 3)
