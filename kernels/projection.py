"""Linear maps of few rows, one launch each: what surrounds the class token's attention on a GPU.

A weight is read as it is stored and rounded in registers, so nothing is cast or copied beforehand. On a CPU
:mod:`.cross_attention` needs none of it.
"""

import torch
from torch import Tensor

from .projection_kernels import launch_projection

# --- registration


@torch.library.custom_op("fsr::projection", mutates_args=())
def projection_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    share: Tensor | None,
    transposed: bool,
    scale: float,
    product: torch.dtype,
    result: torch.dtype,
) -> Tensor:
    """Return scale · (weight x + share · bias) per group; arguments as of :func:`project`."""
    return launch_projection(x, _matrices(x, weight, transposed), bias, share, scale, product, result)


@projection_op.register_fake
def _(x, weight, bias, share, transposed, scale, product, result):
    return x.new_empty((*x.shape[:2], _matrices(x, weight, transposed).shape[1]), dtype=result)


@torch.library.custom_op("fsr::projection_backward", mutates_args=())
def projection_backward_op(
    gradient: Tensor, x: Tensor, weight: Tensor, transposed: bool, product: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight for scale 1."""
    matrices = _matrices(x, weight, transposed).transpose(1, 2)
    x_gradient = launch_projection(gradient, matrices, None, None, 1.0, product, x.dtype)
    gradient, x = gradient.float(), x.float()
    rows, columns = (x, gradient) if transposed else (gradient, x)
    with torch.autocast(x.device.type, enabled=False):
        weight_gradient = torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1)).view(weight.shape)
    return x_gradient, weight_gradient.to(weight.dtype)


@projection_backward_op.register_fake
def _(gradient, x, weight, transposed, product):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _matrices(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """The weight as (G,M,K)."""
    groups = weight.unflatten(0, (x.shape[1], -1))
    return groups.transpose(1, 2) if transposed else groups


# --- autograd


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, share, ctx.transposed, ctx.scale, ctx.product, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, share)


def _backward(ctx, gradient):
    x, weight, share = ctx.saved_tensors
    if ctx.scale != 1:
        gradient = gradient * ctx.scale
    found = projection_backward_op(gradient, x, weight, ctx.transposed, ctx.product)
    bias_gradient = None
    if ctx.bias_dtype is not None:
        shared = gradient if share is None else gradient * share[..., None]
        bias_gradient = shared.sum(0, dtype=torch.float32).flatten().to(ctx.bias_dtype)
    return *found, bias_gradient, *[None] * 5


projection_op.register_autograd(_backward, setup_context=_setup_context)


# --- public function


def project(
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
    """Multiply each group of a few rows by its own part of a weight, with the Triton kernel.

    Args:
        x: (B,G,K), floating point but fp64.
        weight: (G·M,K), or (G·K,M) if ``transposed``, floating point but fp64.
        bias: (G·M,) or None.
        product: dtype to which the factors of the matrix product are rounded; their products are summed in fp32.
        transposed: whether the groups of ``weight`` map from their rows to their columns.
        share: (B,G) fp32, constant, factor of the bias; None: 1.
        scale: factor of the whole.
        result: dtype of what is returned.

    Returns:
        (B,G,M), differentiable in x, weight and bias.

    Source: projections of Eq. 5-6.
    """
    return projection_op(x, weight, bias, share, transposed, scale, product, result)
