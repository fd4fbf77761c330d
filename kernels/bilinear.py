"""Bilinear resizing (align_corners=False, no antialias), for operations that never store the resized tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import tl, triton


def resize_matrix(like: Tensor, length: int, pixels: int) -> Tensor:
    """Return the matrix that resizes one side: each row holds one low-resolution sample's weights in the result.

    Args:
        like: tensor on the device to use; float64 makes a float64 matrix, any other dtype a float32 one.
        length: samples of the low-resolution side.
        pixels: samples of the resized side.

    Returns:
        (length, pixels), weights in [0, 1]; columns sum to 1.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    identity = torch.eye(length, dtype=dtype, device=like.device)
    return F.interpolate(identity[None], size=pixels, mode="linear", align_corners=False)[0]


@triton.jit
def samples(position, pixels, length):
    """Lower and upper sample of resized pixels and the weight of the upper one."""
    ratio = tl.div_rn(tl.cast(length, tl.float32), tl.cast(pixels, tl.float32))
    source = tl.maximum((position.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    lower = tl.minimum(source.to(tl.int32), length - 1)
    return lower, tl.minimum(lower + 1, length - 1), source - lower
