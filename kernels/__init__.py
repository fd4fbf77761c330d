"""Fused operations: one a module, Triton kernels for CUDA tensors and vectorised torch for CPU tensors."""

from fsr_fast.kernels.affinity_loss import affinity_loss, affinity_sums
from fsr_fast.kernels.dense_energy import dense_energy
from fsr_fast.kernels.distillation_loss import distillation_loss
from fsr_fast.kernels.masked_cross_attention import masked_cross_attention
from fsr_fast.kernels.merge_cams import MergedCams, merge_cams, present_classes
from fsr_fast.kernels.patch_selection import PatchSelection, top_k_mask
from fsr_fast.kernels.pixel_adaptive_refinement import pixel_adaptive_refinement, refine_pseudo_labels
from fsr_fast.kernels.segmentation_loss import segmentation_loss, segmentation_sums
from fsr_fast.kernels.uncertain_mask import uncertain_mask, uncertain_mask_from_cam

__all__ = [
    "MergedCams",
    "PatchSelection",
    "affinity_loss",
    "affinity_sums",
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
