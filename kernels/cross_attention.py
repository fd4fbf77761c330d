"""The class token attends to the patches that are left: the aggregator's cross-attention without keys or values.

With one query per image, the projections are absorbed. Per head, softmax(q · (W_k x̂_n)) = softmax((W_kᵀ q) · x̂_n), and
Σ p_n (W_v x̂_n) = W_v (Σ p_n x̂_n). Both matrices then act on one vector per image and head instead of on N tokens. The
key bias and the bias of the norm add the same constant to all logits of a head, which cancels in the softmax (except
where the logits are multiplied by the mask).

On a GPU seven launches do all of it: the norm of the class token, two projections before and two after the attention
(:mod:`.projection`), and the attention, whose blocks of tokens a second launch combines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_attention_kernels import launch_attention, launch_attention_backward
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton
from .projection import project

_MODES = ("exclude", "multiply", "none")


# --- both paths


def _offset(absorbed, q, shift, k_bias, mask_mode):
    """What the norm's bias and the key bias add to all logits of a head; where it cancels, the key bias alone."""
    if mask_mode != "multiply":
        return k_bias
    offset = (absorbed * shift).sum(dim=-1)  # no matmul: autocast would round it
    if k_bias is not None:
        offset = offset + (q * k_bias.unflatten(0, q.shape[1:])).sum(dim=-1, dtype=shift.dtype)
    return offset


def _product_dtype(tokens: Tensor) -> torch.dtype:
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- torch path, which autograd differentiates


def _attend_torch(class_token, tokens, mask, w, heads, mask_mode, eps):
    D, wide = tokens.shape[-1], _wide(tokens.dtype)
    gain, shift = w["norm_weight"].to(wide), w["norm_bias"].to(wide)
    q_weight, k_weight, v_weight = w["q_weight"], w["k_weight"], w["v_weight"]
    class_normalised = F.layer_norm(class_token.to(wide), (D,), gain, shift, eps).to(q_weight.dtype)
    q = F.linear(class_normalised, q_weight, w["q_bias"]).unflatten(-1, (heads, -1)) * (D // heads) ** -0.5
    absorbed = torch.einsum("bhd,hde->bhe", q, k_weight.unflatten(0, (heads, -1)))
    offset = _offset(absorbed, q, shift, w["k_bias"], mask_mode)
    query = (absorbed * gain).to(_product_dtype(tokens))
    average, attention = _average_torch(tokens, query, offset, mask, mask_mode, eps)

    average = torch.addcmul(shift, average.to(wide), gain).to(v_weight.dtype)
    heads_out = torch.einsum("bhe,hde->bhd", average, v_weight.unflatten(0, (heads, -1))).flatten(1)
    if w["v_bias"] is not None:
        heads_out = heads_out + w["v_bias"]
    if mask_mode == "exclude":  # nothing to attend to: neither the norm's bias nor the values' applies
        heads_out = heads_out.masked_fill(mask.all(dim=1, keepdim=True), 0.0)
    return F.linear(heads_out.to(w["proj_weight"].dtype), w["proj_weight"], w["proj_bias"]), attention


def _average_torch(tokens, query, offset, mask, mask_mode, eps):
    """softmax(query · x̂) and its average of x̂, where x̂ is the normalised token before the norm's weight and bias."""
    normalised = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    logits = torch.matmul(query, normalised.transpose(1, 2))
    logits = logits.to(_wide(logits.dtype))
    if mask_mode == "exclude":
        logits = logits.masked_fill(mask[:, None], -torch.inf)
        logits = logits.masked_fill(mask.all(dim=1)[:, None, None], 0.0)  # an all-masked row must not give NaN
        attention = logits.softmax(dim=-1).masked_fill(mask[:, None], 0.0)
    elif mask_mode == "multiply":
        attention = (logits + offset[..., None]).masked_fill(mask[:, None], 0.0).softmax(dim=-1)
    else:
        attention = logits.softmax(dim=-1)
    average = torch.matmul(attention.to(query.dtype), normalised)
    if mask_mode != "multiply" and offset is not None:
        average = average + 0.0 * offset.sum()  # an offset that cancels still has a gradient: exactly zero
    return average, attention.detach()


# --- registration


@torch.library.custom_op("fsr::absorbed_attention", mutates_args=())
def absorbed_attention_op(
    tokens: Tensor,
    queries: Tensor,
    gain: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    mask_mode: str,
    eps: float,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weigh the tokens of each image, after their LayerNorm, by a masked softmax and average them.

    Args:
        tokens: (B,N,D) fp32, bf16 or fp16, before the norm.
        queries: (B,heads,D) fp32; the logits are their products with the normalised tokens times the norm's weight.
        gain: (D,) fp32, weight of the norm.
        shift: (D,) fp32, its bias; no part of the logits.
        offset: (B,heads) fp32, added to the logits of unmasked patches in mode "multiply"; in the other modes None, or
            any tensor of constants that cancel, whose gradient is exactly zero.
        mask: (B,N) bool, True = masked; None in mode "none" only.
        mask_mode: "exclude", "multiply" or "none".
        eps: of the norm.
        product: dtype of the factors of the matrix products.

    Returns:
        Average (B,heads,D) fp32 of the tokens after the norm. Without gradient, all fp32: (B,heads,D) their average
        without the norm's weight and bias; weights (B,heads,N); sum of the weights (B,heads), 0 where all patches are
        excluded, otherwise 1; mean and reciprocal standard deviation of each token (2,B,N).

    Source: Eq. 5-7.
    """
    return launch_attention(tokens, queries, gain, shift, offset, mask, mask_mode, eps, product)


@absorbed_attention_op.register_fake
def _(tokens, queries, gain, shift, offset, mask, mask_mode, eps, product):
    (B, N, D), heads = tokens.shape, queries.shape[1]
    shapes = ((B, heads, D), (B, heads, D), (B, heads, N), (B, heads), (2, B, N))
    return tuple(tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("fsr::absorbed_attention_backward", mutates_args=())
def absorbed_attention_backward_op(
    gradient: Tensor,
    tokens: Tensor,
    queries: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    average: Tensor,
    attention: Tensor,
    statistics: Tensor,
    mask_mode: str,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate :func:`absorbed_attention_op`.

    Args:
        gradient: (B,heads,D) fp32, of the average after the norm.
        tokens: (B,N,D), as given to the forward pass.
        queries: (B,heads,D), likewise.
        gain: (D,), likewise.
        mask: (B,N) bool or None, likewise.
        average: (B,heads,D) fp32, without the norm's weight and bias, result of the forward pass.
        attention: (B,heads,N) fp32, likewise.
        statistics: (2,B,N) fp32, likewise.
        mask_mode: as given to the forward pass.
        product: likewise.

    Returns:
        Gradients of tokens (B,N,D); of queries times the norm's weight (B,heads,D) fp32; in mode "multiply" of logits
        before the mask (B,heads,N) fp32, otherwise empty.

    Source: Eq. 5-7.
    """
    return launch_attention_backward(
        gradient, tokens, queries, gain, mask, average, attention, statistics, mask_mode, product
    )


@absorbed_attention_backward_op.register_fake
def _(gradient, tokens, queries, gain, mask, average, attention, statistics, mask_mode, product):
    logits = attention.shape if mask_mode == "multiply" else (0,)
    return tokens.new_empty(tokens.shape), queries.new_empty(queries.shape), queries.new_empty(logits)


# --- autograd


def _setup_context(ctx, inputs, output):
    tokens, queries, gain, _, offset, mask, ctx.mask_mode, _, ctx.product = inputs
    _, average, attention, share, statistics = output
    ctx.save_for_backward(tokens, queries, gain, offset, mask, average, attention, share, statistics)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for those outputs it would fill tensors with zeros


def _backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 9
    tokens, queries, gain, offset, mask, average, attention, share, statistics = ctx.saved_tensors
    token_gradient, scaled_gradient, logit_gradient = absorbed_attention_backward_op(
        gradient.contiguous(), tokens, queries, gain, mask, average, attention, statistics, ctx.mask_mode, ctx.product
    )
    gain_gradient = torch.addcmul(gradient * average, queries, scaled_gradient).sum((0, 1))
    shift_gradient = (gradient * share[..., None]).sum((0, 1))
    if offset is not None:
        offset = logit_gradient.sum(dim=2) if ctx.mask_mode == "multiply" else torch.zeros_like(offset)
    return token_gradient, scaled_gradient * gain, gain_gradient, shift_gradient, offset, *[None] * 4


absorbed_attention_op.register_autograd(_backward, setup_context=_setup_context)


# --- composition of the operators


def _attend_triton(class_token, tokens, mask, w, heads, mask_mode, eps):
    require_dtype("masked_cross_attention: tokens", tokens, FEATURE_DTYPES)
    (B, _, D), dtype = tokens.shape, _product_dtype(tokens)
    gain, shift = w["norm_weight"].float(), w["norm_bias"].float()
    class_normalised = F.layer_norm(class_token.float(), (D,), gain, shift, eps)
    q = project(class_normalised[:, None], w["q_weight"], w["q_bias"], dtype, scale=(D // heads) ** -0.5)
    q = q.view(B, heads, -1)
    queries = project(q, w["k_weight"], None, dtype, transposed=True)
    offset = _offset(queries, q, shift, w["k_bias"], mask_mode)
    read, _, attention, share, _ = absorbed_attention_op(
        tokens, queries, gain, shift, offset, mask, mask_mode, eps, dtype
    )
    # Where there is nothing to attend to, neither the norm's bias nor the values' applies.
    heads_out = project(read, w["v_weight"], w["v_bias"], dtype, share=share)
    output = project(heads_out.view(B, 1, D), w["proj_weight"], w["proj_bias"], dtype, result=dtype)
    return output.squeeze(1), attention


# --- public function


def masked_cross_attention(
    class_token: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    heads: int,
    mask_mode: str = "exclude",
    eps: float = 1e-6,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from the class token to the patch tokens; the residual is left to the caller.

    Args:
        class_token: (B,D), floating point, before the norm.
        tokens: (B,N,D), floating point, patch tokens of the trunk before the norm.
        mask: (B,N) bool, True = masked; None = no patch is masked.
        norm_weight: (D,), weight of the LayerNorm shared by class token and patch tokens.
        norm_bias: (D,), its bias.
        q_weight: (D,D), query projection (output, input); rows are grouped by head.
        q_bias: (D,) or None.
        k_weight: (D,D), key projection.
        k_bias: (D,) or None. Its gradient is exactly zero unless ``mask_mode`` is "multiply".
        v_weight: (D,D), value projection.
        v_bias: (D,) or None.
        proj_weight: (D,D), output projection.
        proj_bias: (D,) or None.
        heads: number of heads, a divisor of D.
        mask_mode: "exclude" (a masked patch has weight 0; if all are masked, the output is ``proj_bias``),
            "multiply" (logits times 1 - mask) or "none" (mask ignored).
        eps: of the LayerNorm, > 0.
        return_attention: also return the weights.

    Returns:
        (B,D) in the dtype of ``tokens`` (under autocast: the autocast dtype); with ``return_attention`` also the
        attention weights (B,heads,N), fp32 (fp64 for fp64 input), without gradient.

    Raises:
        ValueError: a shape, the number of heads or the mode is wrong.
        TypeError: a tensor has the wrong dtype.

    Source: Eq. 5-7.
    """
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "q_bias": q_bias, "k_bias": k_bias}
    vectors |= {"v_bias": v_bias, "proj_bias": proj_bias}
    matrices = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight, "proj_weight": proj_weight}
    _check(class_token, tokens, mask, vectors, matrices, heads, mask_mode)
    mask_mode = "none" if mask is None else mask_mode
    attend = _attend_triton if use_triton(tokens) else _attend_torch
    output, attention = attend(class_token, tokens, mask, vectors | matrices, heads, mask_mode, eps)
    return (output, attention) if return_attention else output


def _check(class_token, tokens, mask, vectors, matrices, heads, mask_mode) -> None:
    if tokens.ndim != 3 or class_token.shape != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(
            f"masked_cross_attention: class_token must be (B,D) and tokens (B,N,D), got {tuple(class_token.shape)} "
            f"and {tuple(tokens.shape)}"
        )
    B, N, D = tokens.shape
    if B == 0 or N == 0:
        raise ValueError(f"masked_cross_attention: tokens {tuple(tokens.shape)} is empty; give at least one patch")
    if heads < 1 or D % heads:
        raise ValueError(f"masked_cross_attention: heads must divide the width {D}, got {heads}")
    if mask_mode not in _MODES:
        raise ValueError(f"masked_cross_attention: mask_mode must be one of {_MODES}, got {mask_mode!r}")
    if mask is not None:
        require_dtype("masked_cross_attention: mask (True = masked)", mask, (torch.bool,))
        if mask.shape != (B, N):
            raise ValueError(f"masked_cross_attention: mask must be ({B},{N}), got {tuple(mask.shape)}")
    for shape, named in (((D,), vectors), ((D, D), matrices)):
        for name, tensor in named.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"masked_cross_attention: {name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in {"class_token": class_token, "tokens": tokens, **vectors, **matrices}.items():
        if tensor is not None:
            require_dtype(f"masked_cross_attention: {name}", tensor, (*FEATURE_DTYPES, torch.float64))
    require_same_device(class_token=class_token, tokens=tokens, mask=mask, **vectors, **matrices)
