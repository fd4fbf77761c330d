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
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
