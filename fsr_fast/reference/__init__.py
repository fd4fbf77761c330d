"""The whole method once more, written literally in plain torch: slow, and the oracle that the fast code is held to."""

from .attention import masked_cross_attention
from .losses import (
    affinity_loss,
    affinity_sums,
    classification_loss,
    dense_energy,
    distillation_loss,
    segmentation_loss,
    segmentation_sums,
)
from .masking import PatchSelection, top_k_mask, uncertain_mask, uncertain_mask_from_cam

__all__ = [
    "PatchSelection",
    "affinity_loss",
    "affinity_sums",
    "classification_loss",
    "dense_energy",
    "distillation_loss",
    "masked_cross_attention",
    "segmentation_loss",
    "segmentation_sums",
    "top_k_mask",
    "uncertain_mask",
    "uncertain_mask_from_cam",
]
