"""Dense energy: similar class distributions at pixels that are near in place and colour (official code, optional)."""

import torch
from torch import Tensor

from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device
from .gaussian import bilateral_features, gaussian_filter


def dense_energy(
    probabilities: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 50.0,
    ignore_index: int = 255,
) -> Tensor:
    """Compute an energy over all pairs of pixels, low where pixels near in place and colour have similar distributions.

    E = -Σ_ij k_ij G_i S_i · S_j / B with k_ij = exp(-½ |Δrgb / sigma_rgb|² - ½ |Δxy / sigma_xy|²), i = j included.
    The gate G = max(0, 1 - max_c S), but 1 where the label is `ignore_index`, is treated as a constant. The gradient is
    that of the official code, dE/dS = -2 G (K S) / B, the derivative of E only where the gates of a pair agree.

    The official code weighs this by 1e-7 and filters with a permutohedral lattice, whose sums are about 0.53 (0.45 to
    0.62) of the exact Gaussian's: 0.53e-7 gives its energy the same scale here.

    Args:
        probabilities: (B, C + 1, h, w) floating, softmax of the decoder's output at half resolution.
        images: (B, 3, h, w) floating or uint8, RGB in 0..255.
        labels: (B, h, w) uint8 or int64 pseudo labels; only `ignore_index` matters here.
        sigma_rgb: standard deviation in colour, in grey levels, above 0.
        sigma_xy: standard deviation in place, in pixels of this resolution, above 0.
        ignore_index: pixels of this label have an open gate.

    Returns:
        0-d float32 (float64 for float64 probabilities, on the CPU only). The backward pass keeps only K S of
        the forward pass, (B, C + 1, h, w).

    Raises:
        ValueError: a shape or a standard deviation does not fit, or devices differ.
        TypeError: a dtype does not fit.

    Source: official code, dense energy loss, with the exact Gaussian in place of its lattice.
    """
    if probabilities.dim() != 4 or 0 in probabilities.shape:
        raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}; expected (B, C + 1, h, w), none 0")
    B, _, h, w = probabilities.shape
    if images.shape != (B, 3, h, w) or labels.shape != (B, h, w):
        raise ValueError(
            f"images {tuple(images.shape)} must be (B, 3, h, w) = {(B, 3, h, w)} "
            f"and labels {tuple(labels.shape)} (B, h, w) = {(B, h, w)}"
        )
    require_dtype("probabilities", probabilities, (*FEATURE_DTYPES, torch.float64))
    require_dtype("images", images, (*FEATURE_DTYPES, torch.float64, torch.uint8))
    require_dtype("labels", labels, (torch.uint8, torch.int64))
    require_same_device(probabilities=probabilities, images=images, labels=labels)
    scores = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    with torch.no_grad():
        features = bilateral_features(images.to(scores.dtype), sigma_rgb=sigma_rgb, sigma_xy=sigma_xy)
        gate = (1 - scores.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(labels[:, None] == ignore_index, 1)
        pull = gaussian_filter(features, scores.flatten(2)).view_as(scores) * (gate / -B)
    energy = (scores * pull).sum()
    return 2 * energy - energy.detach()  # the value E with the gradient of 2 E, `pull` held constant
