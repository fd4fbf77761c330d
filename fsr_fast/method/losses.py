"""The losses of Eq. 8-10 on plain tensors; sums and counts run over all processes."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.kernels import affinity_sums, dense_energy, segmentation_counts, segmentation_sum
from fsr_fast.method.cam import resize_images
from fsr_fast.method.pseudo_labels import half_size
from fsr_fast.runtime.distributed import sum_over_ranks, world_size

Normalise = Literal["global", "process"]
ENERGY_SCALE = 1e-7
"""Factor on the dense energy. Source: official code."""


def classification_loss(class_logits: Tensor, aux_class_logits: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft margin loss of both classifiers, added.

    Args:
        class_logits: (B, C).
        aux_class_logits: (B, C).
        labels: (B, C), float, 0 or 1.

    Returns:
        Scalar, float32: L_cls of Eq. 10.
    """
    both = torch.stack([class_logits, aux_class_logits]).float()
    return 2 * F.binary_cross_entropy_with_logits(both, labels.to(both).expand_as(both))


def affinity_loss(features: Tensor, labels: Tensor, normalise: Normalise = "global") -> Tensor:
    """Patch-token contrast over the batch of all processes.

    Args:
        features: (B, N, D), top features of this process's images.
        labels: (B, N), int64: 0 background, class + 1, 255 ignored.
        normalise: `loss.normalise` of the configuration.

    Returns:
        Scalar, float32. Its mean over the processes is L_aff: of the whole batch, or the mean over the processes' own.
    """
    sums, counts = affinity_sums(features, labels).view(2, 2).unbind(1)
    counts, factor = _share_counts(counts.detach(), normalise)
    same, different = (sums / ((counts + 1) / factor)).unbind()
    return 0.5 * (1 - same + different)


def segmentation_loss(logits: Tensor, labels: Tensor, normalise: Normalise = "global") -> Tensor:
    """Half the cross-entropy over background pixels plus half of that over foreground pixels.

    Args:
        logits: (B, C+1, h, w), decoder.
        labels: (B, H, W), uint8; 255 ignored. A set without pixels counts 0.
        normalise: `loss.normalise` of the configuration.

    Returns:
        Scalar, float32. Its mean over the processes is L_seg: of the whole batch, or the mean over the processes' own.
    """
    counts, factor = _share_counts(segmentation_counts(labels), normalise)
    counts = counts.clamp(min=1).to(torch.promote_types(logits.dtype, torch.float32))
    return segmentation_sum(logits, labels, 0.5 * factor / counts)


def energy_loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Dense-energy regularisation at half resolution, times 1e-7.

    Args:
        logits: (B, C+1, h, w), decoder.
        images: (B, 3, H, W), grey levels of 0…255, not rounded.
        labels: (B, H, W), uint8 pseudo labels.

    Returns:
        Scalar, float32. Source: official code.
    """
    height, width = labels.shape[-2:]
    size = half_size((height, width))
    full = F.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False)
    probabilities = resize_images(full.softmax(1), size)
    halved_images = F.interpolate(images, size=size, mode="nearest")
    halved_labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(torch.uint8)
    return ENERGY_SCALE * dense_energy(probabilities, halved_images, halved_labels)


def _share_counts(counts: Tensor, normalise: Normalise) -> tuple[Tensor, int]:
    """Return the counts to divide by, and the factor of this process's sums."""
    if normalise == "process":
        return counts, 1
    # DDP averages gradients over the processes: sums are multiplied by their number, counts are those of all.
    # Every pair and pixel of the whole batch then weighs the same, however the classes are spread over the processes.
    return sum_over_ranks(counts), world_size()
