"""softmax(u · x̂) x̂ for a few queries u per image: the Triton kernels that masked cross-attention launches.

x̂ is the token after LayerNorm without its weight and bias, formed in registers from the raw token. Forward: one launch
computes row statistics and logits, one the softmax and the average; backward: one launch computes the tokens' gradient,
one the queries'. Every sum has a fixed order, so the results repeat exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import INTERPRETED, CompileCase, device_guard, dot, next_power_of_2, tl, triton

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- kernels


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """fp32 to a narrower dtype, to nearest even as the hardware does; the interpreter would truncate bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


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
def logits_kernel(
    tokens,  # (B,N,D)
    query,  # (B,heads,D), holds the norm's weight and the scale
    offset,  # (B,heads) fp32, read in mode "multiply"
    mask,  # (B,N) bool, not read in mode "none"
    logits,  # (B,heads,N) fp32
    statistics,  # (2,B,N) fp32: mean, 1/deviation
    N,
    batch,
    eps,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Row statistics and logits of a block of tokens; the re-reads of the block come from the cache."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    live = n < N
    rows = b * N + n
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = live[:, None] & (columns < D)[None, :]
        total += tl.load(tokens + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / D
    one = tl.full([BLOCK_N], 1.0, tl.float32)
    square = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        centred = _normalised(tokens, rows, columns, live, mean, one, D)
        square += centred * centred
        u = _per_head(query, b, columns, D, HEADS, BLOCK_H)
        score = dot(_rounded(centred, u.dtype), tl.trans(u), score)
    rstd = tl.rsqrt(tl.sum(square, 1) / D + eps)
    tl.store(statistics + rows, mean, mask=live)
    tl.store(statistics + batch * N + rows, rstd, mask=live)
    score *= rstd[:, None]
    if MODE != "none":
        masked = tl.load(mask + rows, mask=live, other=True)
        if MODE == "multiply":
            score += tl.load(offset + b * HEADS + h, mask=h < HEADS, other=0.0)[None, :]
        score = tl.where(masked[:, None], float("-inf") if MODE == "exclude" else 0.0, score)
    tl.store(logits + (b * HEADS + h)[None, :] * N + n[:, None], score, mask=live[:, None] & (h < HEADS)[None, :])


@triton.jit
def average_kernel(
    tokens,  # (B,N,D)
    statistics,  # (2,B,N) fp32
    weights,  # (B,heads,N) fp32: logits where SOFTMAX, else the weights themselves
    attention,  # (B,heads,N) fp32, written where SOFTMAX
    average,  # (B,heads,D)
    N,
    batch,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PRODUCT: tl.constexpr,  # dtype of the factors of the matrix product
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Σ_n w_n x̂_n for a block of columns, all tokens and heads of one image; with or without a softmax over n first."""
    b = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    block = tl.arange(0, BLOCK_N)
    lines = (b * HEADS + h)[:, None] * N
    peak = tl.zeros([BLOCK_H], tl.float32)
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    if SOFTMAX:
        running_peak = tl.full([BLOCK_H, BLOCK_N], float("-inf"), tl.float32)
        for start in range(0, N, BLOCK_N):
            inside = (h < HEADS)[:, None] & (start + block < N)[None, :]
            w = tl.load(weights + lines + (start + block)[None, :], mask=inside, other=float("-inf"))
            running_peak = tl.maximum(running_peak, w)
        peak = tl.max(running_peak, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # all patches masked: every weight becomes 0, not NaN
        total = tl.zeros([BLOCK_H], tl.float32)
        running_total = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            inside = (h < HEADS)[:, None] & (start + block < N)[None, :]
            w = tl.load(weights + lines + (start + block)[None, :], mask=inside, other=float("-inf"))
            running_total += tl.exp(w - peak[:, None])
        total = tl.sum(running_total, 1)
        total = tl.where(total == 0.0, 1.0, total)
    result = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + block
        live = n < N
        inside = (h < HEADS)[:, None] & live[None, :]
        w = tl.load(weights + lines + n[None, :], mask=inside, other=float("-inf") if SOFTMAX else 0.0)
        if SOFTMAX:
            w = tl.exp(w - peak[:, None]) / total[:, None]
            if tl.program_id(0) == 0:
                tl.store(attention + lines + n[None, :], w, mask=inside)
        mean = tl.load(statistics + b * N + n, mask=live, other=0.0)
        rstd = tl.load(statistics + (batch + b) * N + n, mask=live, other=0.0)
        normalised = _normalised(tokens, b * N + n, columns, live, mean, rstd, D)
        result = dot(_rounded(w, PRODUCT), _rounded(normalised, PRODUCT), result)
    inside = (h < HEADS)[:, None] & (columns < D)[None, :]
    tl.store(
        average + (b * HEADS + h)[:, None] * D + columns[None, :],
        _rounded(result, average.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def token_gradient_kernel(
    tokens,  # (B,N,D)
    statistics,  # (2,B,N) fp32
    query,  # (B,heads,D)
    average,  # (B,heads,D) fp32
    gradient,  # (B,heads,D) fp32, of the average
    attention,  # (B,heads,N) fp32
    mask,  # (B,N) bool, read in mode "multiply"
    token_gradient,  # (B,N,D)
    logit_gradient,  # (B,heads,N) fp32
    N,
    batch,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of a block of tokens through weights, logits and norm, and the gradient of its logits.

    With g = dL/d(average): dp = g·x̂, ds = p (dp - g·average), dx̂ = Σ_heads (p g + ds u),
    dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ x̂)) / deviation; both means follow from sums over heads, before dx̂ exists.
    """
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    live = n < N
    rows = b * N + n
    inside = live[:, None] & (h < HEADS)[None, :]
    mean = tl.load(statistics + rows, mask=live, other=0.0)
    rstd = tl.load(statistics + batch * N + rows, mask=live, other=0.0)
    score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    weight_gradient = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    common = tl.zeros([BLOCK_H], tl.float32)
    query_sum = tl.zeros([BLOCK_H], tl.float32)
    gradient_sum = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        u = _per_head(query, b, columns, D, HEADS, BLOCK_H)
        g = _rounded(
            _per_head(gradient, b, columns, D, HEADS, BLOCK_H), u.dtype
        )  # rounded the same wherever it must cancel
        common += tl.sum(g.to(tl.float32) * _per_head(average, b, columns, D, HEADS, BLOCK_H), 1)
        query_sum += tl.sum(u.to(tl.float32), 1)
        gradient_sum += tl.sum(g.to(tl.float32), 1)
        normalised = _rounded(_normalised(tokens, rows, columns, live, mean, rstd, D), u.dtype)
        score = dot(normalised, tl.trans(u), score)
        weight_gradient = dot(normalised, tl.trans(g), weight_gradient)
    lines = (b * HEADS + h)[None, :] * N + n[:, None]
    p = tl.load(attention + lines, mask=inside, other=0.0)
    ds = p * (weight_gradient - common[None, :])
    if MODE == "multiply":
        ds = tl.where(tl.load(mask + rows, mask=live, other=True)[:, None], 0.0, ds)
    tl.store(logit_gradient + lines, ds, mask=inside)
    first = tl.sum(p * gradient_sum[None, :] + ds * query_sum[None, :], 1) / D
    second = tl.sum(p * weight_gradient + ds * score, 1) / D
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        u = _per_head(query, b, columns, D, HEADS, BLOCK_H)
        g = _rounded(_per_head(gradient, b, columns, D, HEADS, BLOCK_H), u.dtype)
        change = dot(_rounded(p, u.dtype), g, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
        change = dot(_rounded(ds, u.dtype), u, change)
        normalised = _normalised(tokens, rows, columns, live, mean, rstd, D)
        change = (change - first[:, None] - normalised * second[:, None]) * rstd[:, None]
        here = live[:, None] & (columns < D)[None, :]
        tl.store(
            token_gradient + rows[:, None] * D + columns[None, :],
            _rounded(change, token_gradient.dtype.element_ty),
            mask=here,
        )


# --- launch


def block_sizes(D: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tiles, the same for every number of tokens.

    Args:
        D: width.
        heads: number of heads.
        dtype: of the matrix products; in fp32 they take three passes and more registers.

    Returns:
        The block sizes by argument name.
    """
    full = dtype == torch.float32
    return {
        "BLOCK_N": 32 if full else 64,
        "BLOCK_D": min(32 if full else 64, max(16, next_power_of_2(D))),
        "BLOCK_H": max(16, next_power_of_2(heads)),
    }


def launch_attention(
    tokens: Tensor, query: Tensor, offset: Tensor | None, mask: Tensor | None, mask_mode: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of ``fsr::absorbed_attention``."""
    (B, N, D), heads = tokens.shape, query.shape[1]
    tokens, query, blocks = tokens.contiguous(), query.contiguous(), block_sizes(D, heads, query.dtype)
    mask = None if mask is None else mask.contiguous()
    offset = offset.contiguous() if mask_mode == "multiply" and offset is not None else None
    logits = tokens.new_empty((B, heads, N), dtype=torch.float32)
    attention = torch.empty_like(logits)
    statistics = logits.new_empty((2, B, N))
    average = logits.new_empty((B, heads, D))
    with device_guard(tokens):
        logits_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), B)](
            tokens, query, offset, mask, logits, statistics, N, B, eps, D, heads, mask_mode, **blocks, num_warps=4
        )
        average_kernel[(triton.cdiv(D, blocks["BLOCK_D"]), B)](
            tokens, statistics, logits, attention, average, N, B, D, heads, True, TRITON_DTYPES[query.dtype], **blocks
        )
    return average, attention, statistics


def launch_attention_backward(
    gradient: Tensor,
    tokens: Tensor,
    query: Tensor,
    mask: Tensor | None,
    average: Tensor,
    attention: Tensor,
    statistics: Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of ``fsr::absorbed_attention_backward``."""
    (B, N, D), heads = tokens.shape, query.shape[1]
    tokens, query, blocks = tokens.contiguous(), query.contiguous(), block_sizes(D, heads, query.dtype)
    mask = mask.contiguous() if mask_mode == "multiply" and mask is not None else None
    token_gradient = torch.empty_like(tokens)
    logit_gradient = torch.empty_like(attention)
    query_gradient = torch.empty_like(query)
    with device_guard(tokens):
        token_gradient_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), B)](
            tokens, statistics, query, average, gradient.contiguous(), attention, mask, token_gradient, logit_gradient,
            N, B, D, heads, mask_mode, **blocks, num_warps=4,
        )  # fmt: skip
        average_kernel[(triton.cdiv(D, blocks["BLOCK_D"]), B)](
            tokens, statistics, logit_gradient, None, query_gradient, N, B, D, heads, False,
            TRITON_DTYPES[query.dtype], **blocks,
        )  # fmt: skip
    return token_gradient, query_gradient, logit_gradient


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations (ViT-Ti, -S and -B) for the ahead-of-time compile test.

    Yields:
        The kernels by dtype of tokens and of products; ViT-B as under autocast for every target.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    fp32 = ("offset", "logits", "statistics", "weights", "attention", "average", "gradient", "logit_gradient")
    types = dict.fromkeys(fp32, "*fp32") | {"mask": "*i1", "N": "i32", "batch": "i32", "eps": "fp32"}
    for stored, product, D, heads, mode in (
        ("fp32", "bf16", 768, 12, "exclude"),  # the student's tokens under autocast
        ("bf16", "bf16", 768, 12, "none"),  # the teacher's
        ("fp32", "bf16", 384, 6, "exclude"),
        ("fp16", "fp16", 192, 3, "none"),
        ("fp32", "fp32", 768, 12, "multiply"),
    ):
        types |= {"tokens": f"*{stored}", "token_gradient": f"*{stored}", "query": f"*{product}"}
        constants = block_sizes(D, heads, dtypes[product]) | {"D": D, "HEADS": heads, "MODE": mode, "SOFTMAX": True}
        constants["PRODUCT"] = TRITON_DTYPES[dtypes[product]]
        absent = {"multiply": [], "exclude": ["offset"], "none": ["offset", "mask"]}[mode]
        for kernel in (logits_kernel, average_kernel, token_gradient_kernel):
            given = constants | dict.fromkeys(
                [*absent, "mask"] if kernel is token_gradient_kernel and absent else absent
            )
            signature = {name: types[name] for name in kernel.arg_names if name in types and name not in given}
            given = {name: given[name] for name in kernel.arg_names if name in given}
            label = f"{kernel.__name__.removesuffix('_kernel')} {stored} {product} D={D} {mode}"
            yield CompileCase(label, kernel, signature, given, main=product == "bf16" and D == 768)
            if kernel is average_kernel:
                signature = {name: kind for name, kind in signature.items() if name != "attention"}
                given |= {"SOFTMAX": False, "attention": None}
                yield CompileCase(f"{label} backward", kernel, signature | {"average": f"*{product}"}, given)
