"""The class token attends to the patches that are left: the aggregator's cross-attention without keys or values.

With one query per image, the projections are absorbed. Per head, softmax(q · (W_k x̂_n)) = softmax((W_kᵀ q) · x̂_n), and
Σ p_n (W_v x̂_n) = W_v (Σ p_n x̂_n). Both matrices then act on one vector per image and head instead of on N tokens. The
key bias and the bias of the norm add the same constant to all logits of a head, which cancels in the softmax (except
where the logits are multiplied by the mask).

On a GPU seven launches do all of it: the norm of the class token, two projections before and two after the attention
(:mod:`.projection_kernels`), and the attention, whose blocks of tokens a second launch combines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_attention_kernels import launch_attention, launch_attention_backward
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton
from .projection_kernels import launch_projection, launch_projection_backward

_MODES = ("exclude", "multiply", "none")


# --- both paths


def _offset(absorbed, q, shift, k_bias):
    """What the norm's bias and the key bias add to all logits of a head; they cancel unless the mask multiplies."""
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
    offset = _offset(absorbed, q, shift, w["k_bias"]) if mask_mode == "multiply" else w["k_bias"]
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


@torch.library.custom_op("fsr::masked_cross_attention", mutates_args=())
def masked_cross_attention_op(
    class_token: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
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
    mask_mode: str,
    eps: float,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the cross-attention with the kernels; arguments as of :func:`masked_cross_attention`.

    Args:
        product: dtype of the factors of the matrix products, and of the output.

    Returns:
        Output (B,D) and attention (B,heads,N). Then, for the backward pass, all fp32 without gradient: the class token
        after its norm (B,1,D), its mean and reciprocal standard deviation (B,1) each; queries (B,heads,D/heads);
        queries that have absorbed the key projection (B,heads,D); the tokens' average after and before the norm's
        weight and bias (B,heads,D) each; the sum of the weights (B,heads), 0 where all patches are excluded, otherwise
        1; mean and reciprocal standard deviation of each token (2,B,N); values (B,heads,D/heads).

    Source: Eq. 5-7.
    """
    B, D = class_token.shape
    gain, shift = norm_weight.float(), norm_bias.float()
    normalised, mean, deviation = torch.native_layer_norm(class_token.float(), (D,), gain, shift, eps)
    normalised = normalised.view(B, 1, D)
    q = launch_projection(normalised, q_weight, q_bias, product, scale=(D // heads) ** -0.5).view(B, heads, -1)
    queries = launch_projection(q, k_weight, None, product, transposed=True)
    offset = _offset(queries, q, shift, k_bias) if mask_mode == "multiply" else None
    read, average, attention, share, statistics = launch_attention(
        tokens, queries, gain, shift, offset, mask, mask_mode, eps, product
    )
    # where there is nothing to attend to, neither the norm's bias nor the values' applies
    values = launch_projection(read, v_weight, v_bias, product, share=share)
    output = launch_projection(values.view(B, 1, D), proj_weight, proj_bias, product, result=product).view(B, D)
    return output, attention, normalised, mean, deviation, q, queries, read, average, share, statistics, values


@masked_cross_attention_op.register_fake
def _(class_token, tokens, *others):
    (B, N, D), heads, product = tokens.shape, others[-4], others[-1]
    shapes = [(B, heads, N), (B, 1, D), (B, 1), (B, 1), (B, heads, D // heads), *[(B, heads, D)] * 3]
    shapes += [(B, heads), (2, B, N), (B, heads, D // heads)]
    wide = (tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return tokens.new_empty((B, D), dtype=product), *wide


@torch.library.custom_op("fsr::masked_cross_attention_backward", mutates_args=())
def masked_cross_attention_backward_op(
    gradient: Tensor, class_token: Tensor, tokens: Tensor, mask: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
    q_weight: Tensor, q_bias: Tensor | None, k_weight: Tensor, k_bias: Tensor | None, v_weight: Tensor,
    v_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, attention: Tensor, normalised: Tensor,
    mean: Tensor, deviation: Tensor, q: Tensor, queries: Tensor, read: Tensor, average: Tensor, share: Tensor,
    statistics: Tensor, values: Tensor, mask_mode: str, product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate :func:`masked_cross_attention_op`, whose arguments and results these are.

    Args:
        gradient: (B,D), of the output.

    Returns:
        Gradients of class token, tokens, and weights and biases in their order; those of vectors fp32.

    Source: Eq. 5-7.
    """
    (B, D), heads = class_token.shape, q.shape[1]
    gain, shift = norm_weight.float(), norm_bias.float()
    proj_bias_gradient = gradient.sum(0, dtype=torch.float32)
    line = values.view(B, 1, D)
    values_gradient, proj_weight_gradient = launch_projection_backward(gradient[:, None], line, proj_weight, product)
    values_gradient = values_gradient.view(values.shape)
    v_bias_gradient = (values_gradient * share[..., None]).sum(0).flatten()
    read_gradient, v_weight_gradient = launch_projection_backward(values_gradient, read, v_weight, product)

    tokens_gradient, scaled, logits = launch_attention_backward(
        read_gradient, tokens, queries, gain, mask, average, attention, statistics, mask_mode, product
    )
    gain_gradient = torch.addcmul(read_gradient * average, queries, scaled).sum((0, 1))
    shift_gradient = (read_gradient * share[..., None]).sum((0, 1))
    queries_gradient = scaled * gain
    k_bias_gradient = gain.new_zeros(D)  # which cancels
    offset = logits.sum(2)[..., None] if mask_mode == "multiply" else None  # gradient of `_offset`
    if offset is not None:
        queries_gradient.addcmul_(offset, shift)
        shift_gradient.add_((offset * queries).sum((0, 1)))
        k_bias_gradient = (offset * q).sum(0).flatten()

    q_gradient, k_weight_gradient = launch_projection_backward(queries_gradient, q, k_weight, product, transposed=True)
    if offset is not None and k_bias is not None:
        q_gradient.addcmul_(offset, k_bias.float().view(q.shape[1:]))
    q_gradient = q_gradient.view(B, 1, D) * (D // heads) ** -0.5
    normalised_gradient, q_weight_gradient = launch_projection_backward(q_gradient, normalised, q_weight, product)
    moved = torch.ops.aten.native_layer_norm_backward(
        normalised_gradient.view(B, D), class_token.float(), (D,), mean, deviation, gain, shift, [True] * 3
    )
    return (
        moved[0], tokens_gradient, moved[1].add_(gain_gradient), moved[2].add_(shift_gradient),
        q_weight_gradient, q_gradient.sum((0, 1)), k_weight_gradient, k_bias_gradient,
        v_weight_gradient, v_bias_gradient, proj_weight_gradient, proj_bias_gradient,
    )  # fmt: skip


@masked_cross_attention_backward_op.register_fake
def _(gradient, class_token, tokens, mask, *others):
    weights, wide = others[2:10:2], {"dtype": torch.float32}
    vectors = [class_token.new_empty(class_token.shape[1], **wide) for _ in range(6)]
    matrices = [weight.new_empty(weight.shape) for weight in weights]
    pairs = [one for pair in zip(matrices, vectors[2:], strict=True) for one in pair]
    return class_token.new_empty(class_token.shape, **wide), tokens.new_empty(tokens.shape), *vectors[:2], *pairs


# --- autograd


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.mask_mode, _, ctx.product = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for those outputs it would fill tensors with zeros


def _backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 17
    token, tokens, *rest = masked_cross_attention_backward_op(gradient, *ctx.saved_tensors, ctx.mask_mode, ctx.product)
    parameters = [one if needed else None for one, needed in zip(rest, ctx.needs_input_grad[3:], strict=False)]
    return token, tokens, None, *parameters, *[None] * 4


masked_cross_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _attend_triton(class_token, tokens, mask, w, heads, mask_mode, eps):
    require_dtype("masked_cross_attention: tokens", tokens, FEATURE_DTYPES)
    pairs = [w[f"{name}_{kind}"] for name in ("norm", "q", "k", "v", "proj") for kind in ("weight", "bias")]
    output, attention, *_ = masked_cross_attention_op(
        class_token, tokens, mask, *pairs, heads, mask_mode, eps, _product_dtype(tokens)
    )
    return output, attention


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
