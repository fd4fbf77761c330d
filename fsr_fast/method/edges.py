"""Edges of pictures, for the mask strategy `edge_strict` (paper, Table 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def canny_edges(images: Tensor, *, sigma: float = 1.4, low: float = 40.0, high: float = 100.0) -> Tensor:
    """Find edges: Gaussian smoothing, Sobel gradient, thinning, hysteresis (Canny, 1986).

    Args:
        images: (B, 3, H, W), 0…255.
        sigma: of the smoothing, pixels.
        low: gradient from which a pixel continues an edge, grey levels a pixel.
        high: gradient from which a pixel starts one.

    Returns:
        (B, H, W), bool.
    """
    grey = images.float().mean(1, keepdim=True)
    offsets = torch.arange(-3, 4, device=grey.device, dtype=grey.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    grey = F.conv2d(F.pad(grey, (3, 3, 3, 3), mode="replicate"), (kernel[:, None] * kernel).view(1, 1, 7, 7))
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    strength = gradient.norm(dim=1)
    ridge = _is_ridge(strength, torch.atan2(gradient[:, 1], gradient[:, 0]))
    edges = ridge & (strength >= high)
    candidates = ridge & (strength >= low)
    while True:  # an edge grows along its candidates, however long they are
        grown = candidates & (F.max_pool2d(edges.float()[:, None], 3, 1, 1)[:, 0] > 0)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _is_ridge(strength: Tensor, angle: Tensor) -> Tensor:
    sector = torch.round(angle / (math.pi / 4)).long() % 4  # direction of the gradient: →, ↘, ↓, ↙
    padded = F.pad(strength, (1, 1, 1, 1))
    height, width = strength.shape[-2:]
    largest = torch.zeros_like(strength, dtype=torch.bool)
    for index, (row, column) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
        behind = padded[:, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        largest |= (sector == index) & (strength > ahead) & (strength >= behind)
    return largest
