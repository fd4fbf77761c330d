"""Fused operations: one a module, Triton kernels for CUDA tensors and vectorised torch for CPU tensors."""

from .affinity_loss import affinity_loss, affinity_sums
from .dense_crf import dense_crf
from .dense_energy import dense_energy
from .distillation_loss import distillation_loss
from .masked_cross_attention import masked_cross_attention
from .merge_cams import MergedCams, merge_cams, present_classes
from .patch_selection import PatchSelection, top_k_mask
from .pixel_adaptive_refinement import pixel_adaptive_refinement, refine_pseudo_labels
from .segmentation_loss import segmentation_loss, segmentation_sums
from .uncertain_mask import uncertain_mask, uncertain_mask_from_cam

__all__ = [
    "MergedCams",
    "PatchSelection",
    "affinity_loss",
    "affinity_sums",
    "dense_crf",
    "dense_energy",
    "distillation_loss",
    "masked_cross_attention",
    "merge_cams",
    "pixel_adaptive_refinement",
    "present_classes",
    "refine_pseudo_labels",
    "segmentation_loss",
    "segmentation_sums",
    "top_k_mask",
    "uncertain_mask",
    "uncertain_mask_from_cam",
]
