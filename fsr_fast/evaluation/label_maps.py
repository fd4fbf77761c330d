"""Label maps, and how they follow from the network's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import merged_labels

Kind = Literal["pseudo", "seg", "seg+crf"]


@dataclass(frozen=True)
class Labels:
    """A label map, or some rows of it, and its confidence."""

    labels: np.ndarray
    """(H, W), uint8: 0 background, class + 1."""
    confidence: np.ndarray | None = None
    """(H, W), float32 in 0…1, of the chosen label: activation or 1 - activation for pseudo labels, probability for the
    others; if requested."""


def labels_of_cams(cams: MergedCams, threshold: float, *, confidence: bool) -> Labels:
    """Derive pseudo labels from the normalised CAMs of one image; up to the threshold a pixel is background."""
    labels, cam = merged_labels(cams, high=threshold, low=threshold)[0], cams.values[0].amax(0)
    sure = torch.where(labels == 0, 1 - cam, cam).cpu().numpy() if confidence else None
    return Labels(labels.to(torch.uint8).cpu().numpy(), sure)


def labels_of_logits(logits: Tensor, *, confidence: bool) -> Labels:
    """Take the likeliest class of the decoder's logits (C+1, H, W)."""
    best = logits.softmax(0).max(0) if confidence else logits.max(0)
    return Labels(best.indices.to(torch.uint8).cpu().numpy(), best.values.cpu().numpy() if confidence else None)


def labels_of_marginals(marginals: np.ndarray, *, confidence: bool) -> Labels:
    """Take the likeliest class of the probabilities (C+1, H, W) after the dense CRF."""
    return Labels(marginals.argmax(0).astype(np.uint8), marginals.max(0) if confidence else None)
