"""One training step: views → CAMs → mask → student → teacher → losses (paper, Figure 2 and Eq. 10).

Each pass through the trunk is run once and serves all its readers. Where the teacher's encoder is the student's
(momentum 0) and no stochastic depth is drawn without gradient, view 1's student pass also gives the teacher's
class token and the scale-1.0 CAM, and view 2's unmasked pass gives its CAM, the mask and the teacher's patches.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fsr_fast.cam import (
    ScalePass,
    dense_cams,
    merge_passes,
    merged_labels,
    multi_scale_passes,
    normalise_cam,
    split_batch,
)
from fsr_fast.config import Config, LossConfig
from fsr_fast.distillation import Distillation, gather_tokens
from fsr_fast.kernels import MergedCams
from fsr_fast.losses import classification_loss, energy_loss, global_affinity_loss, global_segmentation_loss
from fsr_fast.masking import (
    MaskedPatches,
    mask_edges,
    mask_from_cam,
    mask_from_features,
    mask_randomly,
    mask_shape,
)
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import activate, classify, to_map
from fsr_fast.pseudo_labels import denormalise, generate_pseudo_labels, grey_levels, half_size
from fsr_fast.runtime.precision import autocast
from fsr_fast.schedules import Schedule
from fsr_fast.teacher import Teacher


class Draws(NamedTuple):
    """All that is random in a step."""

    uniform: Tensor
    """(B, blocks), u of Eq. 3."""
    student: Tensor
    """(depth, 2, 2B), stochastic depth of the student: view 1, then masked view 2."""
    teacher: Tensor | None = None
    """(depth, 2, 2B), of the teacher; none: not drawn."""
    mask_cam: list[Tensor] | None = None
    """(depth, 2, 2B) a scale, of the CAM passes of view 2."""
    cam: list[Tensor] | None = None
    """(depth, 2, 2B) a scale, of the CAM passes of view 1."""


class StepOutput(NamedTuple):
    """Result of a step."""

    loss: Tensor
    """Eq. 10, scalar with gradient."""
    losses: dict[str, Tensor]
    """Each loss that was computed, before its weight, detached."""
    cams: MergedCams | None
    """Normalised CAMs of view 1 at half resolution, where pseudo labels were made."""
    pseudo_labels: Tensor | None
    """(B, H, W), uint8, likewise."""
    mask: Tensor | None
    """(B, N), bool, masked patches of view 2."""


class FSRStep(nn.Module):
    """The losses of a batch of two views; wrap it in DDP to train in several processes.

    Args:
        student: the network.
        config: the whole configuration.
        slots: largest number of classes that an image has.
    """

    def __init__(self, student: Network, config: Config, slots: int) -> None:
        super().__init__()
        self.student = student
        self.teacher = Teacher(student, config.teacher)
        self.config = config
        self.slots = slots
        self.shares_passes = self.teacher.network is None and not config.teacher.stochastic_depth
        self.mask_shape = mask_shape(config.mask, student.encoder.grid)
        self.distillation = Distillation(config.teacher, config.model.prototypes)
        self.register_buffer("mean", torch.tensor(student.mean, dtype=torch.float64), persistent=False)
        self.register_buffer("deviation", torch.tensor(student.deviation, dtype=torch.float64), persistent=False)
        self.mean: Tensor
        self.deviation: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> Draws:
        """Draw all that is random in a step on `batch` images."""

        def keep() -> Tensor:
            return self.student.encoder.draw_keep(2 * batch, generator).to(self.mean.device)

        uniform = torch.rand(batch, self.mask_shape.blocks, generator=generator).to(self.mean.device)
        student = keep()
        if not self.config.teacher.stochastic_depth:
            return Draws(uniform, student)
        scales = self.config.cam.scales
        return Draws(uniform, student, keep(), [keep() for _ in scales], [keep() for _ in scales])

    def denormalise(self, images: Tensor) -> Tensor:
        """Undo the normalisation of images (B, 3, H, W): grey levels 0…255."""
        return denormalise(images.to(self.mean.device), self.mean, self.deviation)

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor, draws: Draws, schedule: Schedule) -> StepOutput:
        """Compute every loss whose weight is not 0.

        Args:
            views: two of (B, 3, H, W), normalised.
            labels: (B, C), float32, 0 or 1.
            draws: as `draw` gives them.
            schedule: values of this iteration.
        """
        view1, view2 = views
        weights = schedule.weights
        distils = weights.uncertain > 0 or weights.class_token > 0

        unmasked = self._pass_unmasked(view2) if distils and self.shares_passes else None
        masked = self._select_patches(view2, unmasked, labels, draws, schedule) if distils else None
        features, masked_features = self._pass_student(view1, view2, masked, draws.student)
        with self._autocast():
            top = self.student.encoder.norm(features.tokens)

        losses = {"classification": self._classify(top, features.aux, labels)}
        cams = pseudo_labels = None
        passes = self._pass_scales(view1, features, draws) if _needs_cams(weights) else []
        if weights.affinity > 0:
            losses["affinity"] = self._contrast(top, passes, labels, _size(view1), features.grid)
        if weights.segmentation > 0 or weights.energy > 0:
            cams, pseudo_labels = self._label_pixels(view1, passes, labels)
            losses |= self._segment(to_map(top, features.grid), view1, pseudo_labels, weights)
        if masked is not None and masked_features is not None:
            teacher = self._pass_teacher(view1, view2, features, unmasked, draws)
            losses |= self._distil(masked_features, masked, teacher, schedule)

        total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
        detached = {name: loss.detach() for name, loss in losses.items()}
        return StepOutput(total, detached, cams, pseudo_labels, masked.mask if masked else None)

    # --- passes through the trunk

    def _pass_unmasked(self, view2: Tensor, keep: Tensor | None = None) -> Features:
        with torch.no_grad(), self._autocast():
            return self.student.encoder(view2, keep=keep)

    def _pass_student(
        self, view1: Tensor, view2: Tensor, masked: MaskedPatches | None, keep: Tensor
    ) -> tuple[Features, Features | None]:
        with self._autocast():
            if masked is None:
                return self.student.encoder(view1, keep=keep[..., : len(view1)]), None
            mask = torch.cat([torch.zeros_like(masked.mask), masked.mask])
            return split_batch(self.student.encoder(torch.cat([view1, view2]), mask, keep))

    def _pass_scales(self, view1: Tensor, features: Features, draws: Draws) -> list[ScalePass]:
        known = Features(features.tokens.detach(), features.aux.detach(), features.grid) if self.shares_passes else None
        with torch.no_grad(), self._autocast():
            return multi_scale_passes(self.student.encoder, view1, self.config.cam.scales, first=known, keep=draws.cam)

    def _pass_teacher(
        self, view1: Tensor, view2: Tensor, features: Features, unmasked: Features | None, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Give the teacher's bottleneck vectors of view 1's class token (B, E) and view 2's patches (B, N, E)."""
        encoder = (self.teacher.network or self.student).encoder
        with torch.no_grad(), self._autocast():
            if unmasked is None:
                features, unmasked = split_batch(encoder(torch.cat([view1, view2]), keep=draws.teacher))
            class_token = encoder.aggregate(features.tokens.detach())
            return self.teacher.projector(class_token), self.teacher.projector(encoder.norm(unmasked.tokens))

    # --- view 2's mask

    @torch.no_grad()
    def _select_patches(
        self, view2: Tensor, unmasked: Features | None, labels: Tensor, draws: Draws, schedule: Schedule
    ) -> MaskedPatches:
        mask, shape = self.config.mask, self.mask_shape
        if schedule.random_mask or mask.strategy == "random":
            return mask_randomly(draws.uniform, shape, mask)
        if mask.strategy == "edge_strict":
            return mask_edges(self.denormalise(view2), shape)
        if mask.multi_scale:
            return mask_from_cam(self._guide(view2, unmasked, labels, draws), labels, draws.uniform, shape, mask)
        keep = None if draws.mask_cam is None else draws.mask_cam[0][..., : len(view2)]
        tokens, aux, grid = self._pass_unmasked(view2, keep) if unmasked is None else unmasked
        top = mask.source == "top"
        guide = self.student.encoder.norm(tokens) if top else aux
        classifier = self.student.top_classifier if top else self.student.aux_classifier
        if mask.strategy == "uncertain" and mask.block == 1:
            return mask_from_features(guide, classifier.weight.flatten(1), labels, draws.uniform, shape, mask)
        return mask_from_cam(normalise_cam(activate(guide, classifier, grid)), labels, draws.uniform, shape, mask)

    def _guide(self, view2: Tensor, unmasked: Features | None, labels: Tensor, draws: Draws) -> Tensor:
        source = self.config.mask.source
        with self._autocast():
            passes = multi_scale_passes(
                self.student.encoder,
                view2,
                self.config.cam.scales,
                first=unmasked,
                keep=draws.mask_cam,
                aux_only=source == "aux" and unmasked is None,
            )
        return dense_cams(self._merge(passes, labels, source, _size(view2)), labels.shape[1])

    # --- losses

    def _classify(self, top: Tensor, aux: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            class_logits = classify(top, self.student.top_classifier)
            aux_class_logits = classify(aux, self.student.aux_classifier)
        return classification_loss(class_logits, aux_class_logits, labels)

    def _contrast(
        self, top: Tensor, passes: list[ScalePass], labels: Tensor, size: tuple[int, int], grid: tuple[int, int]
    ) -> Tensor:
        thresholds = self.config.pseudo_label
        cams = self._merge(passes, labels, "aux", size, grid)
        patch_labels = merged_labels(cams, high=thresholds.high, low=thresholds.low)
        return global_affinity_loss(top, patch_labels.flatten(1))

    def _label_pixels(self, view1: Tensor, passes: list[ScalePass], labels: Tensor) -> tuple[MergedCams, Tensor]:
        size = _size(view1)
        cams = self._merge(passes, labels, "top", size, half_size(size))
        images = self.denormalise(view1)
        return cams, generate_pseudo_labels(images, cams, self.config.pseudo_label)

    def _segment(self, top: Tensor, view1: Tensor, pseudo_labels: Tensor, weights: LossConfig) -> dict[str, Tensor]:
        with self._autocast():
            logits = self.student.decoder(top)
        losses = {}
        if weights.segmentation > 0:
            losses["segmentation"] = global_segmentation_loss(logits, pseudo_labels)
        if weights.energy > 0:
            colours = grey_levels(view1, self.mean, self.deviation)
            losses["energy"] = energy_loss(logits, colours, pseudo_labels)
        return losses

    def _distil(
        self, features: Features, masked: MaskedPatches, teacher: tuple[Tensor, Tensor], schedule: Schedule
    ) -> dict[str, Tensor]:
        class_target, patch_targets = teacher
        encoder, projector = self.student.encoder, self.student.projector
        heads, temperature = (projector, self.teacher.projector), schedule.teacher_temperature
        losses = {}
        with self._autocast():
            if schedule.weights.uncertain > 0:
                patches = projector(encoder.norm(gather_tokens(features.tokens, masked.index)))
                losses["uncertain"] = self.distillation.patch_loss(patches, patch_targets, masked, heads, temperature)
            if schedule.weights.class_token > 0:
                class_token = projector(encoder.aggregate(features.tokens, masked.mask))
                losses["class_token"] = self.distillation.class_loss(class_token, class_target, heads, temperature)
        return losses

    # --- shared parts

    @torch.no_grad()
    def _merge(
        self,
        passes: list[ScalePass],
        labels: Tensor,
        classifier: Literal["top", "aux"],
        size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
    ) -> MergedCams:
        with self._autocast():
            return merge_passes(
                self.student,
                passes,
                labels,
                classifier=classifier,
                slots=self.slots,
                size=size,
                output_size=output_size,
            )

    def _autocast(self) -> torch.autocast:
        return autocast(self.mean.device, self.config.run.amp)


def _needs_cams(weights: LossConfig) -> bool:
    return weights.affinity > 0 or weights.segmentation > 0 or weights.energy > 0


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
