"""Fused operations: Triton kernels for CUDA tensors, vectorised torch for CPU tensors.

Callers import the public functions from here. An operation lives in ``X.py`` (torch path, registration, autograd,
public functions), its Triton kernels and their launches in ``X_kernels.py``; ``dispatch.py`` says how it is registered.
"""

from .affinity import affinity_sums
from .cam_merging import MergedCams, merge_cams
from .class_slots import present_classes
from .colour_jitter import jitter_colours
from .crf import dense_crf
from .cross_attention import masked_cross_attention
from .distillation import distillation_loss
from .energy import dense_energy
from .learned_policy import apply_policy
from .patch_selection import PatchSelection, top_k_mask, uncertain_mask, uncertain_mask_from_cam
from .refinement import pixel_adaptive_refinement, refine_pseudo_labels
from .segmentation import segmentation_counts, segmentation_sum

__all__ = [
    "MergedCams",
    "PatchSelection",
    "affinity_sums",
    "apply_policy",
    "dense_crf",
    "dense_energy",
    "distillation_loss",
    "jitter_colours",
    "masked_cross_attention",
    "merge_cams",
    "pixel_adaptive_refinement",
    "present_classes",
    "refine_pseudo_labels",
    "segmentation_counts",
    "segmentation_sum",
    "top_k_mask",
    "uncertain_mask",
    "uncertain_mask_from_cam",
]
