"""Masked class aggregation: the class token attends to the patch tokens (paper, Eq. 5-7)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import require_shape

MASK_MODES = ("exclude", "multiply", "none")


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
    """Attend from one class token per image to the patch tokens, with keys and values projected explicitly.

    Args:
        class_token: (B, D) floating, before the norm.
        tokens: (B, N, D) floating, raw output of the trunk's last block.
        mask: (B, N) bool, True = masked, or None for no mask.
        norm_weight: (D), gain of the LayerNorm that class token and patch tokens share.
        norm_bias: (D), its shift.
        q_weight: (D, D), query projection.
        q_bias: (D) or None.
        k_weight: (D, D), key projection.
        k_bias: (D) or None.
        v_weight: (D, D), value projection.
        v_bias: (D) or None.
        proj_weight: (D, D), output projection.
        proj_bias: (D) or None.
        heads: number of heads; divides D.
        mask_mode: "exclude" gives masked patches the logit -inf (the paper's text), "multiply" multiplies the logits
            by 1 - M_b so that masked patches keep exp(0) (Eq. 7 to the letter), "none" ignores the mask (official
            code).
        eps: of the LayerNorm.
        return_attention: also return the attention.

    Returns:
        (B, D), the aggregator's update of the class token, without the residual; with return_attention also the
        attention (B, heads, N). With "exclude" an image whose patches are all masked attends to nothing: its row is
        proj_bias.

    Raises:
        ValueError: if a shape does not fit or mask_mode is unknown.
        TypeError: if mask is not bool.

    Source: paper, Eq. 5-7.
    """
    require_shape("tokens", tokens, "B", "N", "D")
    B, N, D = tokens.shape
    require_shape("class_token", class_token, B, D)
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode is {mask_mode!r}, expected one of {MASK_MODES}; correct its spelling")
    if D % heads:
        raise ValueError(f"heads is {heads}, expected a divisor of the width {D}; change the number of heads")
    if mask is not None:
        require_shape("mask", mask, B, N)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool (True = masked); convert it")
    width = D // heads
    normed_class = F.layer_norm(class_token, (D,), norm_weight, norm_bias, eps)
    normed_tokens = F.layer_norm(tokens, (D,), norm_weight, norm_bias, eps)
    # Eq. 5: Q from the class token, K and V from the patch tokens; (B, heads, ., D / heads)
    query = F.linear(normed_class, q_weight, q_bias).reshape(B, 1, heads, width).transpose(1, 2)
    key = F.linear(normed_tokens, k_weight, k_bias).reshape(B, N, heads, width).transpose(1, 2)
    value = F.linear(normed_tokens, v_weight, v_bias).reshape(B, N, heads, width).transpose(1, 2)
    logits = (query @ key.transpose(2, 3))[:, :, 0] / width**0.5  # (B, heads, N)
    if mask is None or mask_mode == "none":
        attention = logits.softmax(dim=2)
    elif mask_mode == "multiply":
        attention = (logits * (~mask)[:, None].to(logits.dtype)).softmax(dim=2)  # Eq. 7
    else:
        excluded = mask[:, None].expand_as(logits)
        # softmax over the unmasked patches; an empty row has no softmax, its attention is 0 everywhere
        empty = excluded.all(dim=2, keepdim=True)
        safe = logits.masked_fill(excluded & ~empty, -torch.inf).softmax(dim=2)
        attention = safe.masked_fill(excluded, 0)
    # Eq. 6: the weighted sum of the values, heads side by side, projected
    read = (attention[:, :, None] @ value)[:, :, 0].reshape(B, D)
    output = F.linear(read, proj_weight, proj_bias)
    return (output, attention) if return_attention else output
