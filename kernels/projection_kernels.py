"""The Triton kernel of linear maps of few rows: it reads weights as they are stored and rounds them in registers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, CompileCase, device_guard, dot, rounded, tl, triton

BLOCKS = {"BLOCK_B": 16, "BLOCK_M": 16, "BLOCK_K": 128}
"""Rows, output columns and summands of one program's step: narrow columns, so that many programs share the weights."""

# --- kernels


@triton.jit
def projection_kernel(
    x,  # (B,G,K)
    weight,  # (G,M,K), of any strides
    bias,  # (G,M) or None
    share,  # (B,G) fp32 or None: factor of the bias
    y,  # (B,G,M)
    B,
    M,
    K,
    stride_g,
    stride_m,
    stride_k,
    scale,
    PRODUCT: tl.constexpr,  # dtype of the factors of the matrix product
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = scale · (weight x + share · bias) for a block of rows and of columns of one group."""
    g, groups = tl.program_id(1), tl.num_programs(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = (tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    lines = rows * groups + g
    result = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (rows < B)[:, None] & (k < K)[None, :]
        values = tl.load(x + lines[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        places = weight + g * stride_g + m[None, :] * stride_m + k[:, None] * stride_k
        matrix = tl.load(places, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0).to(tl.float32)
        result = dot(rounded(values, PRODUCT), rounded(matrix, PRODUCT), result)
    if bias is not None:
        added = tl.load(bias + g * M + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
        if share is not None:
            added = added * tl.load(share + lines, mask=rows < B, other=0.0)[:, None]
        result += added
    here = (rows < B)[:, None] & (m < M)[None, :]
    tl.store(y + lines[:, None] * M + m[None, :], rounded(result * scale, y.dtype.element_ty), mask=here)


# --- launch


def launch_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: torch.dtype,
    *,
    transposed: bool = False,
    share: Tensor | None = None,
    scale: float = 1.0,
    result: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply each group of a few rows by its own part of a weight: scale · (weight x + share · bias), in one launch.

    Args:
        x: (B,G,K), floating point.
        weight: (G·M,K), or (G·K,M) if ``transposed``, floating point.
        bias: (G·M,) or None.
        product: dtype to which the factors of the matrix product are rounded; their products are summed in fp32.
        transposed: whether the groups of ``weight`` map from their rows to their columns.
        share: (B,G) fp32, factor of the bias; None: 1.
        scale: factor of the whole.
        result: dtype of what is returned.

    Returns:
        (B,G,M).
    """
    return _launch(x, _matrices(x, weight, transposed), bias, share, scale, product, result)


def launch_projection_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, product: torch.dtype, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight of :func:`launch_projection` at scale 1."""
    matrices = _matrices(x, weight, transposed).transpose(1, 2)
    x_gradient = _launch(gradient, matrices, None, None, 1.0, product, x.dtype)
    gradient, x = gradient.float(), x.float()
    rows, columns = (x, gradient) if transposed else (gradient, x)
    with torch.autocast(x.device.type, enabled=False):
        weight_gradient = torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1)).view(weight.shape)
    return x_gradient, weight_gradient.to(weight.dtype)


def _matrices(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """The weight as (G,M,K)."""
    groups = weight.unflatten(0, (x.shape[1], -1))
    return groups.transpose(1, 2) if transposed else groups


def _launch(
    x: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    share: Tensor | None,
    scale: float,
    product: torch.dtype,
    result: torch.dtype,
) -> Tensor:
    (B, G, K), M = x.shape, matrices.shape[1]
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((B, G, M), dtype=result)
    with device_guard(x):
        projection_kernel[(triton.cdiv(M, BLOCKS["BLOCK_M"]), G, triton.cdiv(B, BLOCKS["BLOCK_B"]))](
            x, matrices, bias, share, y, B, M, K, *matrices.stride(), scale, TRITON_DTYPES[product],
            **BLOCKS, num_warps=4,
        )  # fmt: skip
    return y


def compile_cases() -> Iterator[CompileCase]:
    """List the four maps of ViT-B's aggregator, forward and backward, for the ahead-of-time compile test."""
    integers = ("B", "M", "K", "stride_g")
    for name, product, columns, bias, share, result in (
        ("query", "bf16", "stride_k", "*fp32", None, "*fp32"),
        ("absorbed", "bf16", "stride_m", None, None, "*fp32"),
        ("values", "bf16", "stride_k", "*fp32", "*fp32", "*fp32"),
        ("output", "bf16", "stride_k", "*fp32", None, "*bf16"),
        ("values", "fp32", "stride_k", "*fp32", "*fp32", "*fp32"),
        ("absorbed", "fp32", "stride_m", None, None, "*fp32"),
    ):
        types = {"x": "*fp32", "weight": "*fp32", "bias": bias, "share": share, "y": result, "scale": "fp32"}
        types |= dict.fromkeys((*integers, "stride_m", "stride_k"), "i32:16")
        signature = {name: kind for name, kind in types.items() if kind is not None and name != columns}
        constants = BLOCKS | {columns: 1, "PRODUCT": {"bf16": tl.bfloat16, "fp32": tl.float32}[product]}
        constants |= {name: None for name, kind in types.items() if kind is None}
        yield CompileCase(f"{name} {product}", projection_kernel, signature, constants, main=product == "bf16")
