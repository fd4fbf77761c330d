"""The loss of one training step, pass by pass: views, maps, mask, student, teacher (paper, Figure 2 and Eq. 10).

Two things are part of the definition, not optimisations. Where the teacher's encoder is the student's (momentum 0) and
stochastic depth is "shared", the teacher and the maps of scale 1.0 read the student's own pass of view 1, with the
stochastic depth that was drawn there. And a loss whose weight is 0 is not computed: parameters that only it would
reach get a zero gradient, and its centre stays where it is.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import State
from .cam import cam_to_labels, merge_scales, normalise_cam
from .losses import affinity_loss, classification_loss, distillation_loss, energy_loss, segmentation_loss
from .masking import block_grid, count_masked, edge_mask, exactly_uncertain_mask, top_k_mask, uncertain_mask_from_cam
from .network import NetworkOutput, forward_network, multi_scale_cams, project, prototype_logits
from .pseudo_labels import generate_pseudo_labels, grey_levels
from .settings import Loss, Settings


class Draws(NamedTuple):
    """The random inputs of a step; stochastic depth as in forward_trunk."""

    uniform: Tensor
    """(B, blocks) in [0, 1), u of Eq. 3."""
    student: Tensor
    """(depth, 2, 2B), of the student: view 1, then masked view 2."""
    teacher: Tensor | None = None
    """(depth, 2, 2B), of the teacher: view 1, then view 2; None: all branches kept."""
    mask_cam: Sequence[Tensor] | None = None
    """(depth, 2, 2B) per scale, of the maps of view 2, then of its mirror image."""
    cam: Sequence[Tensor] | None = None
    """(depth, 2, 2B) per scale, of the maps of view 1, then of its mirror image."""
    edges: Tensor | None = None
    """(B, H, W) bool, edges of view 2, only for the strategy "edge_strict"; the paper does not define them."""


class Centres(NamedTuple):
    """Running means of the teacher's prototype logits."""

    patch: Tensor
    """(K), over all patches of view 2."""
    class_token: Tensor
    """(K), over the class tokens of view 1."""


class StepLosses(NamedTuple):
    """Results of the forward part of a step."""

    total: Tensor
    """0-d, with gradient (Eq. 10)."""
    losses: dict[str, Tensor]
    """Each loss that was computed, before its weight."""
    centres: Centres
    """The centres, moved by this step."""
    mask: Tensor | None
    """(B, N) bool, masked patches of view 2."""
    cam: Tensor | None
    """(B, C, H, W), normalised multi-scale map of view 1, top features."""
    pseudo_labels: Tensor | None
    """(B, H, W) uint8, of view 1."""


def compute_losses(
    student: State,
    teacher: State,
    centres: Centres,
    views: tuple[Tensor, Tensor],
    labels: Tensor,
    draws: Draws,
    settings: Settings,
    *,
    weights: Loss,
    temperature: float,
    random_mask: bool,
) -> StepLosses:
    """Compute every loss of a step whose weight is not 0.

    Args:
        student: flat state dict; receives the step's gradient.
        teacher: flat state dict; no gradient.
        centres: of the teacher's logits, before this step.
        views: two of (B, 3, H, W) floating, normalised.
        labels: (B, C), 1 = present, 0 = absent.
        draws: the step's random numbers.
        settings: everything that does not change with the iteration.
        weights: of the losses, at this iteration.
        temperature: of the teacher's softmax, at this iteration.
        random_mask: whether this iteration masks at random.

    Returns:
        The losses, and what they were computed from.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Figure 2 and Eq. 10.
    """
    view1 = views[0]
    first = forward_network(student, view1, drop_path=draws.student[:, :, : len(labels)], **settings.network)
    losses = {"classification": classification_loss(first.class_logits, first.aux_class_logits, labels)}
    known = first if settings.teacher_is_student else None
    cam = pseudo_labels = mask = None
    if weights.affinity > 0:
        aux_cam = normalised_cam(student, view1, known, draws.cam, settings, "aux")
        patches = F.interpolate(aux_cam, size=first.cam.shape[2:], mode="bilinear", align_corners=False)
        patch_labels = cam_to_labels(patches, labels, high=settings.pseudo_label.high, low=settings.pseudo_label.low)
        losses["affinity"] = affinity_loss(first.patch_tokens, patch_labels.flatten(1))
    if weights.segmentation > 0 or weights.energy > 0:
        cam = normalised_cam(student, view1, known, draws.cam, settings, "top")
        pseudo_labels = label_pixels(view1, cam, labels, settings)
        if weights.segmentation > 0:
            losses["segmentation"] = segmentation_loss(first.seg_logits, pseudo_labels)
        if weights.energy > 0:
            colours = grey_levels(view1, settings.mean, settings.std)
            losses["energy"] = energy_loss(first.seg_logits, colours, pseudo_labels)
    if weights.uncertain > 0 or weights.class_token > 0:
        mask = select_mask(student, views[1], labels, draws, settings, random_mask)
        distilled, centres = distil(
            student, teacher, centres, views, first, mask, draws, settings, weights=weights, temperature=temperature
        )
        losses |= distilled
    total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
    return StepLosses(total, losses, centres, mask, cam, pseudo_labels)


def label_pixels(view: Tensor, cam: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Compute the pseudo labels (B, H, W) of a view from its normalised map (B, C, H, W)."""
    return generate_pseudo_labels(
        view,
        cam,
        labels,
        mean=settings.mean,
        std=settings.std,
        high=settings.pseudo_label.high,
        low=settings.pseudo_label.low,
        iterations=settings.pseudo_label.iterations,
        dilations=settings.pseudo_label.dilations,
    )


def normalised_cam(
    student: State,
    view: Tensor,
    known: NetworkOutput | None,
    drop_path: Sequence[Tensor] | None,
    settings: Settings,
    source: str,
) -> Tensor:
    """Compute the normalised multi-scale map (B, C, H, W) of a view, from the top or the aux features.

    Args:
        student: flat state dict.
        view: (B, 3, H, W) floating, normalised.
        known: the pass that provides the maps of scale 1.0; None: they get a pass of their own.
        drop_path: stochastic depth, see multi_scale_cams.
        settings: scales and network.
        source: "top" or "aux".

    Source: official code, multi-scale class activation maps.
    """
    maps = multi_scale_cams(student, view, scales=settings.cam.scales, drop_path=drop_path, **settings.network)
    cams, flipped = (maps.cams, maps.flipped) if source == "top" else (maps.aux_cams, maps.aux_flipped)
    if known is not None:
        cams = [known.cam if source == "top" else known.aux_cam, *cams[1:]]
    return merge_scales(cams, flipped, size=(view.shape[2], view.shape[3]))


@torch.no_grad()
def select_mask(
    student: State, view: Tensor, labels: Tensor, draws: Draws, settings: Settings, random_mask: bool
) -> Tensor:
    """Choose the patches of view 2 that are masked, by one of the strategies.

    Args:
        student: flat state dict.
        view: (B, 3, H, W) floating, normalised; the view that will be masked.
        labels: (B, C), a class is present where it is > 0.
        draws: uniform numbers, and stochastic depth of the maps.
        settings: strategy, share, thresholds, source and granularity.
        random_mask: whether to mask at random, whatever the strategy.

    Returns:
        (B, N) bool, True = masked.

    Source: paper, Eq. 2-4 and Table 3; official code for the multi-scale aux maps and the blocks.
    """
    grid = (view.shape[2] // settings.patch_size, view.shape[3] // settings.patch_size)
    mask = settings.mask
    rows, columns = block_grid(grid, mask.block)
    k = count_masked(rows * columns, mask.ratio, mask.block)
    if random_mask or mask.strategy == "random":
        return top_k_mask(draws.uniform, k=k, grid=grid, block=mask.block).mask
    if mask.strategy == "edge_strict":
        if draws.edges is None:
            raise ValueError("draws.edges is None, but edge_strict masks where edges are; find them in view 2")
        return edge_mask(draws.edges, settings.patch_size)
    if mask.multi_scale:
        cam = normalised_cam(student, view, None, draws.mask_cam, settings, mask.source)
    else:
        drop_path = None if draws.mask_cam is None else draws.mask_cam[0][:, :, : len(view)]
        output = forward_network(student, view, drop_path=drop_path, **settings.network)
        cam = normalise_cam(output.cam if mask.source == "top" else output.aux_cam)
    if mask.strategy == "cam_strict":
        return exactly_uncertain_mask(cam, labels, grid=grid, low=mask.low, high=mask.high)
    return uncertain_mask_from_cam(
        cam, labels, draws.uniform, grid=grid, k=k, low=mask.low, high=mask.high, block=mask.block
    ).mask


def distil(
    student: State,
    teacher: State,
    centres: Centres,
    views: tuple[Tensor, Tensor],
    first: NetworkOutput,
    mask: Tensor,
    draws: Draws,
    settings: Settings,
    *,
    weights: Loss,
    temperature: float,
) -> tuple[dict[str, Tensor], Centres]:
    """Compare the student's masked view 2 with the teacher's unmasked views.

    Args:
        first: the student's pass of view 1.
        mask: (B, N) bool, masked patches of view 2.

    Returns:
        L_u and L_c, if their weights are not 0, and the centres that their targets have moved.

    Source: paper, Eq. 8-9; official code for the centres.
    """
    B = len(mask)
    class_token, patch_tokens = teach(teacher, views, first, draws, settings)
    masked = forward_network(
        student,
        views[1],
        mask=mask,
        mask_mode=settings.model.mask_mode,
        drop_path=draws.student[:, :, B:],
        **settings.network,
    )
    heads = (student["projector.last_layer.weight_v"], teacher["projector.last_layer.weight_v"])
    temperatures: dict[str, Any] = {
        "student_temperature": settings.teacher.student_temperature,
        "teacher_temperature": temperature,
    }
    losses = {}
    if weights.uncertain > 0:
        # Eq. 8: the mean over each image's masked patches, then over the images; an image without any counts 0
        losses["uncertain"] = masked.patch_tokens.new_zeros(())
        for b in range(B):
            if mask[b].any():
                guess, target = project(student, masked.patch_tokens[b, mask[b]]), patch_tokens[b, mask[b]]
                image_loss = distillation_loss(guess, target, *heads, centres.patch, **temperatures)
                losses["uncertain"] = losses["uncertain"] + image_loss / B
        centres = centres._replace(patch=move_centre(centres.patch, teacher, patch_tokens.flatten(0, 1), settings))
    if weights.class_token > 0:
        guess = project(student, masked.class_token)
        losses["class_token"] = distillation_loss(guess, class_token, *heads, centres.class_token, **temperatures)
        centres = centres._replace(class_token=move_centre(centres.class_token, teacher, class_token, settings))
    return losses, centres


@torch.no_grad()
def teach(
    teacher: State, views: tuple[Tensor, Tensor], first: NetworkOutput, draws: Draws, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the teacher's bottleneck vectors of view 1's class token (B, E) and of view 2's patches (B, N, E)."""
    drop_path1 = drop_path2 = None
    if draws.teacher is not None:
        drop_path1, drop_path2 = draws.teacher.chunk(2, dim=2)
    if not settings.teacher_is_student:
        first = forward_network(teacher, views[0], drop_path=drop_path1, **settings.network)
    second = forward_network(teacher, views[1], drop_path=drop_path2, **settings.network)
    return project(teacher, first.class_token), project(teacher, second.patch_tokens)


@torch.no_grad()
def move_centre(centre: Tensor, teacher: State, bottleneck: Tensor, settings: Settings) -> Tensor:
    """Move a centre (K) towards the mean of the teacher's logits of some vectors (M, E)."""
    mean = prototype_logits(teacher, bottleneck).mean(dim=0)
    return settings.teacher.centre_momentum * centre + (1 - settings.teacher.centre_momentum) * mean
