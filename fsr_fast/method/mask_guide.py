"""View 2's mask: which map of the student guides it (paper, Section 3.2 and Table 3)."""

import torch
from torch import Tensor

from fsr_fast.config import Config
from fsr_fast.method.cam import dense_cams, merge_passes, multi_scale_passes, normalise_cam
from fsr_fast.method.draws import Draws
from fsr_fast.method.masking import (
    MaskedPatches,
    MaskShape,
    mask_edges,
    mask_from_cam,
    mask_from_features,
    mask_randomly,
)
from fsr_fast.method.pseudo_labels import denormalise
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import activate
from fsr_fast.runtime.precision import autocast


@torch.no_grad()
def select_patches(
    student: Network,
    view2: Tensor,
    unmasked: Features | None,
    labels: Tensor,
    draws: Draws,
    config: Config,
    shape: MaskShape,
    *,
    max_classes: int,
    random: bool,
) -> MaskedPatches:
    """Choose the patches of view 2 that are masked.

    Args:
        student: the network whose CAM guides.
        view2: (B, 3, H, W), normalised.
        unmasked: its features, where they are known.
        labels: (B, C), 0 or 1.
        draws: of the step.
        config: strategy and source, scales of the CAM, precision of the passes.
        shape: as `mask_shape` gives it.
        max_classes: largest number of classes that an image has.
        random: whether the iteration is one of those that mask at random.
    """
    mask = config.mask
    if random or mask.strategy == "random":
        return mask_randomly(draws.uniform, shape, mask)
    if mask.strategy == "edge_strict":
        mean, std = (torch.tensor(value, dtype=torch.float64) for value in (student.mean, student.std))
        return mask_edges(denormalise(view2, mean.to(view2.device), std.to(view2.device)), shape)
    if mask.multi_scale:
        cam = _multi_scale_guide(student, view2, unmasked, labels, draws, config, max_classes)
        return mask_from_cam(cam, labels, draws.uniform, shape, mask)
    top = mask.source == "top"
    classifier = student.top_classifier if top else student.aux_classifier
    drop_path = None if draws.mask_cam is None else draws.mask_cam[0][..., : len(view2)]
    with autocast(view2.device, config.run.amp):
        tokens, aux, grid = unmasked or student.encoder(view2, drop_path=drop_path, aux_only=not top)
        guide = student.encoder.norm(tokens) if top else aux
        if mask.strategy == "uncertain" and mask.block == 1:
            return mask_from_features(guide, classifier.weight.flatten(1), labels, draws.uniform, shape, mask)
        cam = normalise_cam(activate(guide, classifier, grid))
    return mask_from_cam(cam, labels, draws.uniform, shape, mask)


def _multi_scale_guide(
    student: Network,
    view2: Tensor,
    unmasked: Features | None,
    labels: Tensor,
    draws: Draws,
    config: Config,
    max_classes: int,
) -> Tensor:
    source, scales = config.mask.source, config.cam.scales
    short = source == "aux" and unmasked is None
    with autocast(view2.device, config.run.amp):
        passes = multi_scale_passes(
            student.encoder,
            view2,
            scales,
            first=unmasked,
            drop_path=draws.mask_cam,
            aux_only=short,
            float8=config.cam.fp8,
        )
        size = (view2.shape[-2], view2.shape[-1])
        cams = merge_passes(student, passes, labels, classifier=source, max_classes=max_classes, size=size)
    return dense_cams(cams, labels.shape[1])
