"""Pseudo labels for the decoder: CAM, two background thresholds, pixel-adaptive refinement."""

import torch
from torch import Tensor

from fsr_fast.config import PseudoLabelConfig
from fsr_fast.kernels import MergedCams, pixel_adaptive_refinement, refine_pseudo_labels
from fsr_fast.method.cam import resize_images

__all__ = [
    "generate_pseudo_labels",
    "half_size",
    "pixel_adaptive_refinement",
    "refine_pseudo_labels",
]


def half_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width halved, rounded down, at least one pixel."""
    return max(1, size[0] // 2), max(1, size[1] // 2)


def generate_pseudo_labels(images: Tensor, cams: MergedCams, config: PseudoLabelConfig) -> Tensor:
    """Refine CAMs at half resolution and label every pixel that is certain.

    Args:
        images: (B, 3, H, W), grey levels 0…255.
        cams: normalised CAMs of the present classes at half resolution, values (B, M, H/2, W/2).
        config: thresholds, iterations, dilations.

    Returns:
        (B, H, W), uint8: 0 background, class + 1, 255 uncertain. Source: paper, pseudo labels; official code.
    """
    height, width = images.shape[-2:]
    with torch.no_grad():
        return refine_pseudo_labels(
            resize_images(images / 255, half_size((height, width))),
            cams.values,
            cams.classes,
            cams.live,
            high=config.high,
            low=config.low,
            size=(height, width),
            iterations=config.iterations,
            dilations=config.dilations,
        )
