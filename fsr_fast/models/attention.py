"""Self-attention of the encoder, behind one function."""

import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(QKᵀ/√d)V within each image.

    Args:
        query: (B, N, heads, d), floating point.
        key: like `query`.
        value: like `query`.

    Returns:
        (B, N, heads·d), in the dtype of `value`.
    """
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(2)
