"""Patches that hold an edge, for the strategy that masks exactly those (paper, Table 3; Canny, 1986)."""

import math

import torch
from torch import Tensor

from .checks import require_shape

SIGMA, RADIUS = 1.4, 3  # of the smoothing, in pixels
LOW, HIGH = 40.0, 100.0  # strength that continues an edge and strength that starts one
STEPS = ((0, 1), (1, 1), (1, 0), (1, -1))  # (row, column) along the gradient, by its direction in eighths of a turn


@torch.no_grad()
def edge_mask(images: Tensor, patch_size: int) -> Tensor:
    """Masks exactly the patches that hold a pixel of an edge.

    Args:
        images: (B, 3, H, W) floating, grey levels in 0..255; H and W are whole patches.
        patch_size: side of a patch, in pixels.

    Returns:
        (B, N) bool, True = masked.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Table 3 (edge strict).
    """
    require_shape("images", images, "B", 3, "H", "W")
    B, _, H, W = images.shape
    mask = torch.zeros(B, H // patch_size, W // patch_size, dtype=torch.bool, device=images.device)
    for b in range(B):
        for y, x in torch.nonzero(canny_edges(images[b])).tolist():
            mask[b, y // patch_size, x // patch_size] = True
    return mask.flatten(1)


def canny_edges(image: Tensor) -> Tensor:
    """Finds the edges of one image: smoothing, gradient, thinning, hysteresis.

    Args:
        image: (3, H, W) floating, grey levels in 0..255.

    Returns:
        (H, W) bool.

    Source: Canny (1986); the thresholds are this project's.
    """
    _, H, W = image.shape
    bell = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-RADIUS, RADIUS + 1)]
    smoother = torch.tensor([[a * b / sum(bell) ** 2 for b in bell] for a in bell], dtype=torch.float64)
    grey = torch.tensor(correlate(image.mean(dim=0), smoother), dtype=torch.float64)
    across = correlate(grey, torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]))
    down = correlate(grey, torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]]))
    strength = [[math.hypot(a, d) for a, d in zip(*rows, strict=True)] for rows in zip(across, down, strict=True)]

    def at(y: int, x: int) -> float:
        return strength[y][x] if 0 <= y < H and 0 <= x < W else 0.0

    candidates = set()
    for y in range(H):
        for x in range(W):
            step_y, step_x = STEPS[round(math.atan2(down[y][x], across[y][x]) / (math.pi / 4)) % 4]
            if at(y - step_y, x - step_x) <= at(y, x) > at(y + step_y, x + step_x) and at(y, x) >= LOW:
                candidates.add((y, x))
    edges = torch.zeros(H, W, dtype=torch.bool)
    growing = [place for place in candidates if at(*place) >= HIGH]
    while growing:
        y, x = growing.pop()
        if (y, x) in candidates:
            candidates.remove((y, x))
            edges[y, x] = True
            growing += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return edges


def correlate(plane: Tensor, weights: Tensor) -> list[list[float]]:
    """Weighs the neighbourhood of every pixel; beyond the border the border's pixel repeats."""
    H, W = plane.shape
    radius = len(weights) // 2
    result = torch.zeros(H, W, dtype=plane.dtype)
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            rows = torch.arange(i, H + i).clamp(0, H - 1)
            columns = torch.arange(j, W + j).clamp(0, W - 1)
            result += weights[i + radius, j + radius].item() * plane.cpu()[rows][:, columns]
    return result.tolist()
