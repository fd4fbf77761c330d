"""The whole method once more, written literally in plain torch: slow, and the oracle for the fast code."""

from .attention import masked_cross_attention
from .block import Rotary, Trunk
from .cam import MergedCams, cam_to_labels, class_activation_map, merge_cams, normalise_cam, present_classes
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
from .network import (
    MultiScaleCams,
    NetworkOutput,
    forward_network,
    multi_scale_cams,
    project,
    prototype_logits,
)
from .objective import Centres, Draws, StepLosses, compute_losses
from .pseudo_labels import (
    denormalise_images,
    generate_pseudo_labels,
    pixel_adaptive_refinement,
    refine_pseudo_labels,
)
from .schedules import learning_rate_factor, loss_gate, teacher_momentum, teacher_temperature
from .settings import OFFICIAL, PAPER, Loss, Settings
from .step import StepRecord, TrainingState, start_training, training_step

__all__ = [
    "OFFICIAL",
    "PAPER",
    "Centres",
    "Draws",
    "Loss",
    "MergedCams",
    "MultiScaleCams",
    "NetworkOutput",
    "PatchSelection",
    "Rotary",
    "Settings",
    "StepLosses",
    "StepRecord",
    "TrainingState",
    "Trunk",
    "affinity_loss",
    "affinity_sums",
    "cam_to_labels",
    "class_activation_map",
    "classification_loss",
    "compute_losses",
    "denormalise_images",
    "dense_energy",
    "distillation_loss",
    "forward_network",
    "generate_pseudo_labels",
    "learning_rate_factor",
    "loss_gate",
    "masked_cross_attention",
    "merge_cams",
    "multi_scale_cams",
    "normalise_cam",
    "pixel_adaptive_refinement",
    "present_classes",
    "project",
    "prototype_logits",
    "refine_pseudo_labels",
    "segmentation_loss",
    "segmentation_sums",
    "start_training",
    "teacher_momentum",
    "teacher_temperature",
    "top_k_mask",
    "training_step",
    "uncertain_mask",
    "uncertain_mask_from_cam",
]
