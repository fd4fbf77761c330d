"""softmax(u · x̃) x̃ for a few queries u per image: the Triton kernels that masked cross-attention launches.

x̃ is the token after LayerNorm: x̃ = g x̂ + c, where x̂ has mean 0 and deviation 1. The weight g multiplies the queries,
the bias c is added to the average, so that x̂ alone is formed, in registers. Forward: each program of the first launch
leaves the softmax and the average of its own block of tokens, a second launch weighs the blocks against each other.
Backward: one launch. Every sum has a fixed order, so the results repeat exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, CompileCase, device_guard, dot, next_power_of_2, rounded, tl, triton

WARPS = 8
COMBINED = {"BLOCK_D": 256, "BLOCK_S": 16}
"""Tiles of `combine_kernel`: columns, and parts in one step."""

# --- kernels


@triton.jit
def _normalised(tokens, rows, columns, live, mean, rstd, D: tl.constexpr):
    """x̂ (rows, columns) in fp32; 0 outside."""
    inside = live[:, None] & (columns < D)[None, :]
    x = tl.load(tokens + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _per_head(pointer, b, columns, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Some columns of a (B,heads,D) tensor for one image: (BLOCK_H, columns), 0 outside."""
    h = tl.arange(0, BLOCK_H)
    inside = (h < HEADS)[:, None] & (columns < D)[None, :]
    return tl.load(pointer + (b * HEADS + h)[:, None] * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _times_weight(
    pointer, gain, b, columns, PRODUCT: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The same, times the norm's weight, as a factor of matrix products."""
    weight = tl.load(gain + columns, mask=columns < D, other=0.0)
    return rounded(_per_head(pointer, b, columns, D, HEADS, BLOCK_H) * weight[None, :], PRODUCT)


@triton.jit
def attend_kernel(
    tokens,  # (B,N,D)
    queries,  # (B,heads,D) fp32
    gain,  # (D,) fp32
    offset,  # (B,heads) fp32, read in mode "multiply"
    mask,  # (B,N) bool, not read in mode "none"
    attention,  # (B,heads,N) fp32: exp(logit - peak of the part)
    statistics,  # (2,B,N) fp32: mean, 1/deviation
    peaks,  # (2,B,heads,parts) fp32: largest logit, sum of the exponentials
    partial,  # (B,heads,parts,D) fp32: average of the part times that sum
    N,
    batch,
    eps,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the factors of the matrix products
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Statistics, logits, softmax and average of a block of tokens; what is read again comes from the cache.

    One loop finds statistics and logits from x - r, where r is the mean of a token's first columns: a part f of all
    columns has a mean at most √(1/f - 1) deviations from that of all, so little is lost where r cancels.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    n, h, block = part * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    live = n < N
    rows = b * N + n
    zero, one = tl.zeros([BLOCK_N], tl.float32), tl.full([BLOCK_N], 1.0, tl.float32)
    near = tl.sum(_normalised(tokens, rows, block, live, zero, one, D), 1) / min(BLOCK_D, D)
    centre, square = zero, zero
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    query_sum = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, D, BLOCK_D):
        x = _normalised(tokens, rows, start + block, live, near, one, D)
        u = _times_weight(queries, gain, b, start + block, PRODUCT, D, HEADS, BLOCK_H)
        centre += tl.sum(x, 1) / D
        square += tl.sum(x * x, 1) / D
        query_sum += tl.sum(u.to(tl.float32), 1)
        score = dot(rounded(x, PRODUCT), tl.trans(u), score)
    mean = near + centre
    rstd = tl.rsqrt(tl.maximum(square - centre * centre, 0.0) + eps)
    score = (score - centre[:, None] * query_sum[None, :]) * rstd[:, None]
    tl.store(statistics + rows, mean, mask=live)
    tl.store(statistics + batch * N + rows, rstd, mask=live)
    lines, real = b * HEADS + h, h < HEADS
    if MODE != "none":
        masked = tl.load(mask + rows, mask=live, other=True)
        if MODE == "multiply":
            score += tl.load(offset + lines, mask=real, other=0.0)[None, :]
        score = tl.where(masked[:, None], float("-inf") if MODE == "exclude" else 0.0, score)
    score = tl.where(live[:, None], score, float("-inf"))
    peak = tl.max(score, 0)
    weights = tl.exp(score - tl.where(peak == float("-inf"), 0.0, peak)[None, :])  # all masked: 0, not NaN
    tl.store(attention + lines[None, :] * N + n[:, None], weights, mask=live[:, None] & real[None, :])
    tl.store(peaks + lines * parts + part, peak, mask=real)
    tl.store(peaks + (batch * HEADS + lines) * parts + part, tl.sum(weights, 0), mask=real)
    weights = rounded(tl.trans(weights), PRODUCT)
    for start in range(0, D, BLOCK_D):
        columns = start + block
        normalised = rounded(_normalised(tokens, rows, columns, live, mean, rstd, D), PRODUCT)
        result = dot(weights, normalised, tl.zeros([BLOCK_H, BLOCK_D], tl.float32))
        places = partial + (lines * parts + part)[:, None] * D + columns[None, :]
        tl.store(places, result, mask=real[:, None] & (columns < D)[None, :])


@triton.jit
def combine_kernel(
    partial,  # (B,heads,parts,D) fp32
    peaks,  # (2,B,heads,parts) fp32
    gain,  # (D,) fp32
    shift,  # (D,) fp32
    attention,  # (B,heads,N) fp32, brought to a common peak and total in place
    share,  # (B,heads) fp32: sum of the weights, 1 or 0
    average,  # (B,heads,D) fp32, of x̂
    read,  # (B,heads,D) fp32, of x̃
    N,
    D: tl.constexpr,
    PART: tl.constexpr,  # tokens in each part
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Softmax across the parts of one image and head, and some columns of the average."""
    lines, line = tl.num_programs(1), tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(N, PART)
    columns, block = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    running = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_S):
        s = start + block
        running = tl.maximum(running, tl.load(peaks + line * parts + s, mask=s < parts, other=float("-inf")))
    peak = tl.max(running, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_S], tl.float32)
    result = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_S):
        s = start + block
        factor = tl.exp(tl.load(peaks + line * parts + s, mask=s < parts, other=float("-inf")) - peak)
        total += factor * tl.load(peaks + (lines + line) * parts + s, mask=s < parts, other=0.0)
        inside = (s < parts)[:, None] & (columns < D)[None, :]
        values = tl.load(partial + (line * parts + s)[:, None] * D + columns[None, :], mask=inside, other=0.0)
        result += tl.sum(factor[:, None] * values, 0)
    weight = tl.sum(total, 0)
    some = tl.where(weight > 0, 1.0, 0.0)
    weight = tl.where(weight > 0, weight, 1.0)
    result /= weight
    here = columns < D
    tl.store(average + line * D + columns, result, mask=here)
    result = result * tl.load(gain + columns, mask=here, other=0.0)
    result += some * tl.load(shift + columns, mask=here, other=0.0)
    tl.store(read + line * D + columns, result, mask=here)
    if tl.program_id(0) == 0:
        tl.store(share + line, some)
        for start in range(0, N, BLOCK_D):
            n = start + tl.arange(0, BLOCK_D)
            factor = tl.exp(tl.load(peaks + line * parts + n // PART, mask=n < N, other=0.0) - peak) / weight
            w = tl.load(attention + line * N + n, mask=n < N, other=0.0)
            tl.store(attention + line * N + n, w * factor, mask=n < N)


@triton.jit
def gradient_kernel(
    tokens,  # (B,N,D)
    statistics,  # (2,B,N) fp32
    queries,  # (B,heads,D) fp32
    gain,  # (D,) fp32
    average,  # (B,heads,D) fp32
    gradient,  # (B,heads,D) fp32, of the average of x̃
    attention,  # (B,heads,N) fp32
    mask,  # (B,N) bool, read in mode "multiply"
    token_gradient,  # (B,N,D)
    logit_gradient,  # (B,heads,N) fp32, written in mode "multiply"
    partial,  # (parts,B,heads,D) fp32: gradient of u g of this part
    N,
    batch,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of a block of tokens through weights, logits and norm, and its part of the queries' gradient.

    With a = dL/d(average of x̂): dp = a·x̂, ds = p (dp - a·average), dx̂ = Σ_heads (p a + ds u g),
    dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) / deviation; both means follow from sums over heads, before dx̂ exists.
    """
    b = tl.program_id(1).to(tl.int64)
    n, h = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    live, real = n < N, h < HEADS
    rows = b * N + n
    mean = tl.load(statistics + rows, mask=live, other=0.0)
    rstd = tl.load(statistics + batch * N + rows, mask=live, other=0.0)
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    weight_gradient = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    common = tl.zeros([BLOCK_H], tl.float32)
    query_sum = tl.zeros([BLOCK_H], tl.float32)
    gradient_sum = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        u = _times_weight(queries, gain, b, columns, PRODUCT, D, HEADS, BLOCK_H)
        a = _times_weight(gradient, gain, b, columns, PRODUCT, D, HEADS, BLOCK_H)  # rounded alike where it must cancel
        common += tl.sum(a.to(tl.float32) * _per_head(average, b, columns, D, HEADS, BLOCK_H), 1)
        query_sum += tl.sum(u.to(tl.float32), 1)
        gradient_sum += tl.sum(a.to(tl.float32), 1)
        normalised = rounded(_normalised(tokens, rows, columns, live, mean, rstd, D), PRODUCT)
        score = dot(normalised, tl.trans(u), score)
        weight_gradient = dot(normalised, tl.trans(a), weight_gradient)
    places, inside = (b * HEADS + h)[None, :] * N + n[:, None], live[:, None] & real[None, :]
    p = tl.load(attention + places, mask=inside, other=0.0)
    ds = p * (weight_gradient - common[None, :])
    if MODE == "multiply":
        ds = tl.where(tl.load(mask + rows, mask=live, other=True)[:, None], 0.0, ds)
        tl.store(logit_gradient + places, ds, mask=inside)
    first = tl.sum(p * gradient_sum[None, :] + ds * query_sum[None, :], 1) / D
    second = tl.sum(p * weight_gradient + ds * score, 1) / D
    p, ds = rounded(p, PRODUCT), rounded(ds, PRODUCT)
    lines = (tl.program_id(0) * batch + b) * HEADS + h
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        u = _times_weight(queries, gain, b, columns, PRODUCT, D, HEADS, BLOCK_H)
        a = _times_weight(gradient, gain, b, columns, PRODUCT, D, HEADS, BLOCK_H)
        change = dot(p, a, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
        change = dot(ds, u, change)
        normalised = _normalised(tokens, rows, columns, live, mean, rstd, D)
        change = (change - first[:, None] - normalised * second[:, None]) * rstd[:, None]
        change = rounded(change, token_gradient.dtype.element_ty)
        tl.store(
            token_gradient + rows[:, None] * D + columns[None, :], change, mask=live[:, None] & (columns < D)[None, :]
        )
        result = dot(tl.trans(ds), rounded(normalised, PRODUCT), tl.zeros([BLOCK_H, BLOCK_D], tl.float32))
        tl.store(partial + lines[:, None] * D + columns[None, :], result, mask=real[:, None] & (columns < D)[None, :])


# --- launch


def block_sizes(D: int, heads: int, product: torch.dtype) -> dict[str, int]:
    """Choose the tiles, the same for every number of tokens.

    Args:
        D: width.
        heads: number of heads.
        product: dtype of the factors of the matrix products; in fp32 they take three passes and more registers.

    Returns:
        The block sizes by argument name.
    """
    step = 32 if product == torch.float32 else 64
    return {
        "BLOCK_N": step,
        "BLOCK_D": min(step, max(16, next_power_of_2(D))),
        "BLOCK_H": max(16, next_power_of_2(heads)),
    }


def launch_attention(
    tokens: Tensor, queries: Tensor, gain: Tensor, shift: Tensor, offset: Tensor | None, mask: Tensor | None,
    mask_mode: str, eps: float, product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weigh the tokens of each image, after their LayerNorm, by a masked softmax and average them.

    The logits are the products of ``queries`` (B,heads,D) fp32 with the tokens after the norm, without its bias; mode
    "multiply" adds ``offset`` (B,heads) to those of unmasked patches. ``product`` is the factors' dtype.

    Returns:
        All fp32: the average after and before the norm's weight and bias (B,heads,D) each; the weights (B,heads,N);
        their sums (B,heads); mean and reciprocal standard deviation of each token (2,B,N).
    """
    (B, N, D), heads = tokens.shape, queries.shape[1]
    tokens, queries, gain, shift = (tensor.contiguous() for tensor in (tokens, queries, gain, shift))
    mask = None if mask is None else mask.contiguous()
    offset = None if offset is None else offset.contiguous()
    blocks = block_sizes(D, heads, product)
    parts = triton.cdiv(N, blocks["BLOCK_N"])
    peaks, partial = queries.new_empty((2, B, heads, parts)), queries.new_empty((B, heads, parts, D))
    attention, statistics = queries.new_empty((B, heads, N)), queries.new_empty((2, B, N))
    share, average, read = queries.new_empty((B, heads)), torch.empty_like(queries), torch.empty_like(queries)
    with device_guard(tokens):
        attend_kernel[(parts, B)](
            tokens, queries, gain, offset, mask, attention, statistics, peaks, partial,
            N, B, eps, D, heads, mask_mode, TRITON_DTYPES[product], **blocks, num_warps=WARPS,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(D, COMBINED["BLOCK_D"]), B * heads)](
            partial, peaks, gain, shift, attention, share, average, read, N, D, blocks["BLOCK_N"], **COMBINED
        )
    return read, average, attention, share, statistics


def launch_attention_backward(
    gradient: Tensor, tokens: Tensor, queries: Tensor, gain: Tensor, mask: Tensor | None, average: Tensor,
    attention: Tensor, statistics: Tensor, mask_mode: str, product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate :func:`launch_attention`; ``gradient`` (B,heads,D) fp32 is that of the average after the norm.

    Returns:
        Gradients of tokens, of queries times the norm's weight, and of the logits before the mask (B,heads,N) or empty.
    """
    (B, N, D), heads = tokens.shape, queries.shape[1]
    tokens, queries, gain, gradient = (tensor.contiguous() for tensor in (tokens, queries, gain, gradient))
    mask = mask.contiguous() if mask_mode == "multiply" and mask is not None else None
    blocks = block_sizes(D, heads, product)
    parts = triton.cdiv(N, blocks["BLOCK_N"])
    token_gradient, partial = torch.empty_like(tokens), queries.new_empty((parts, *queries.shape))
    logit_gradient = queries.new_empty(attention.shape if mask_mode == "multiply" else 0)
    with device_guard(tokens):
        gradient_kernel[(parts, B)](
            tokens, statistics, queries, gain, average, gradient, attention, mask, token_gradient, logit_gradient,
            partial, N, B, D, heads, mask_mode, TRITON_DTYPES[product], **blocks, num_warps=WARPS,
        )  # fmt: skip
    return token_gradient, partial.sum(0), logit_gradient


def compile_cases() -> Iterator[CompileCase]:
    """List configurations of ViT-Ti, -S and -B for the ahead-of-time compile test; ViT-B's for every target."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    types = {"mask": "*i1", "N": "i32", "batch": "i32", "eps": "fp32"}
    for stored, product, D, heads, mode in (
        ("fp32", "bf16", 768, 12, "exclude"),  # the student's tokens under autocast
        ("bf16", "bf16", 768, 12, "none"),  # the teacher's
        ("fp32", "bf16", 384, 6, "exclude"),
        ("fp16", "fp16", 192, 3, "none"),
        ("fp32", "fp32", 768, 12, "multiply"),
    ):
        types |= {"tokens": f"*{stored}", "token_gradient": f"*{stored}"}
        absent = {"multiply": [], "exclude": ["offset"], "none": ["offset", "mask"]}[mode]
        shared = {"D": D, "HEADS": heads, "MODE": mode, "PRODUCT": TRITON_DTYPES[dtypes[product]]}
        blocks = block_sizes(D, heads, dtypes[product])
        for kernel, constants, warps in (
            (attend_kernel, blocks | dict.fromkeys(absent), WARPS),
            (combine_kernel, COMBINED | {"PART": blocks["BLOCK_N"]}, 4),
            (gradient_kernel, blocks | ({"mask": None} if absent else {}), WARPS),
        ):
            given = {name: value for name, value in (shared | constants).items() if name in kernel.arg_names}
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in given}
            label = f"{kernel.__name__.removesuffix('_kernel')} {stored} {product} D={D} {mode}"
            yield CompileCase(label, kernel, signature, given, warps, main=product == "bf16" and D == 768)
