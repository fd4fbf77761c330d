"""One training step: views → CAMs → mask → student → teacher → losses (paper, Figure 2 and Eq. 10).

Each pass through the trunk is run once and serves all its readers. Where the teacher's encoder is the student's
(momentum 0) and no stochastic depth is drawn without gradient, view 1's student pass also gives the teacher's
class token and the scale-1.0 CAM, and view 2's unmasked pass gives its CAM, the mask and the teacher's patches.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fsr_fast.config import Config, LossConfig
from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import ScalePass, merge_passes, merged_labels, pair_mirrored, scaled_views, split_batch
from fsr_fast.method.distillation import Distillation, gather_tokens
from fsr_fast.method.draws import Draws, draw_step
from fsr_fast.method.losses import affinity_loss, classification_loss, energy_loss, segmentation_loss
from fsr_fast.method.masking import MaskedPatches, MaskSelector
from fsr_fast.method.pseudo_labels import denormalise, generate_pseudo_labels, grey_levels, half_size
from fsr_fast.method.schedules import Schedule
from fsr_fast.method.teacher import Teacher
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import classify, to_map
from fsr_fast.models.work import TrunkPass, Work
from fsr_fast.runtime.precision import autocast

Size = tuple[int, int]
Source = Literal["top", "aux"]


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
    work: Work | None = None
    """The trunk's passes; none where the reference made them."""


class FSRStep(nn.Module):
    """The losses of a batch of two views; wrap it in DDP to train in several processes.

    Args:
        student: the network.
        config: the whole configuration.
        max_classes: largest number of classes that an image has.
    """

    def __init__(self, student: Network, config: Config, max_classes: int) -> None:
        super().__init__()
        self.student = student
        self.teacher = Teacher(student, config.teacher)
        self.config = config
        self.max_classes = max_classes
        self.shares_passes = self.teacher.network is None and not config.teacher.stochastic_depth
        self.selector = MaskSelector(student, config, max_classes)
        self.distillation = Distillation(config.teacher, config.model.prototypes)
        self.register_buffer("mean", torch.tensor(student.mean, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(student.std, dtype=torch.float64), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> Draws:
        """Draw all that is random in a step on `batch` images."""
        passes = len(self.config.cam.scales) if self.config.teacher.stochastic_depth else 0
        blocks = self.selector.shape.blocks
        return draw_step(self.student.encoder, batch, blocks, generator, self.mean.device, passes=passes)

    def denormalise(self, images: Tensor) -> Tensor:
        """Undo the normalisation of images (B, 3, H, W): grey levels 0…255."""
        return denormalise(images.to(self.mean.device), self.mean, self.std)

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
        needs_cams = weights.affinity > 0 or weights.segmentation > 0 or weights.energy > 0
        made: list[TrunkPass] = []
        self._note_passes(made)

        unmasked, scaled = self._pass_unmasked(view1 if needs_cams else None, view2 if distils else None, draws)
        masked = self.selector.select(view2, unmasked, labels, draws, random=schedule.random_mask) if distils else None
        features, masked_features = self._pass_student(view1, view2, masked, draws.student)
        with self._autocast():
            top = self.student.encoder.norm(features.tokens)

        losses = {"classification": self._classify(top, features.aux, labels)}
        cams = pseudo_labels = None
        passes = pair_mirrored(scaled, _detach(features) if self.shares_passes else None) if needs_cams else []
        if weights.affinity > 0:
            losses["affinity"] = self._contrast(top, passes, labels, _size(view1), features.grid)
        if weights.segmentation > 0 or weights.energy > 0:
            cams, pseudo_labels = self._label_pixels(view1, passes, labels)
            losses |= self._segment(to_map(top, features.grid), view1, pseudo_labels, weights)
        if masked is not None and masked_features is not None:
            teacher = self._pass_teacher(views, (features, unmasked), draws, weights)
            losses |= self._distil(masked_features, masked, teacher, schedule)

        total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
        detached = {name: loss.detach() for name, loss in losses.items()}
        self._note_passes(None)
        work = self.student.encoder.shape.work(made, images=len(labels))
        return StepOutput(total, detached, cams, pseudo_labels, masked.mask if masked else None, work)

    # --- passes through the trunk

    def _pass_unmasked(
        self, view1: Tensor | None, view2: Tensor | None, draws: Draws
    ) -> tuple[Features | None, list[Features]]:
        """Return view 2's features, where the teacher shares them, and those of view 1's scaled and mirrored images."""
        encoder, shared, cam = self.student.encoder, self.shares_passes, self.config.cam
        alone = [view2] if view2 is not None and shared else []
        scaled = [] if view1 is None else scaled_views(view1, cam.scales, encoder.patch_size, known=shared)
        drop_path = torch.cat(draws.cam, dim=-1) if draws.cam else None
        with torch.no_grad(), self._autocast():
            if cam.fp8:  # but view 2's features are the teacher's, too
                features = encoder.forward_packed(alone) + encoder.forward_packed(scaled, drop_path, float8=True)
            else:
                features = encoder.forward_packed(alone + scaled, drop_path)
        return features[0] if alone else None, features[len(alone) :]

    def _pass_student(
        self, view1: Tensor, view2: Tensor, masked: MaskedPatches | None, drop_path: Tensor
    ) -> tuple[Features, Features | None]:
        with self._autocast():
            if masked is None:
                return self.student.encoder(view1, drop_path=drop_path[..., : len(view1)]), None
            mask = torch.cat([torch.zeros_like(masked.mask), masked.mask])
            return split_batch(self.student.encoder(torch.cat([view1, view2]), mask, drop_path))

    def _pass_teacher(
        self, views: tuple[Tensor, Tensor], known: tuple[Features, Features | None], draws: Draws, weights: LossConfig
    ) -> tuple[Tensor | None, Tensor | None]:
        """Bottleneck vectors of view 1's class token (B, E) and of view 2's patches (B, N, E) where wanted."""
        encoder, projector = (self.teacher.network or self.student).encoder, self.teacher.projector
        wanted = [index for index, weight in enumerate((weights.class_token, weights.uncertain)) if weight > 0]
        with torch.no_grad(), self._autocast():
            if self.shares_passes:
                tokens = {index: one.tokens.detach() for index, one in enumerate(known) if one is not None}
            else:
                drop_path = (
                    None if draws.teacher is None else torch.cat([draws.teacher.chunk(2, -1)[i] for i in wanted], -1)
                )
                passed = encoder.forward_packed([views[index] for index in wanted], drop_path)
                tokens = {index: one.tokens for index, one in zip(wanted, passed, strict=True)}
            class_token = projector(encoder.aggregate(tokens[0])) if 0 in wanted else None
            return class_token, projector(encoder.norm(tokens[1])) if 1 in wanted else None

    # --- losses

    def _classify(self, top: Tensor, aux: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            class_logits = classify(top, self.student.top_classifier)
            aux_class_logits = classify(aux, self.student.aux_classifier)
        return classification_loss(class_logits, aux_class_logits, labels)

    def _contrast(self, top: Tensor, passes: list[ScalePass], labels: Tensor, size: Size, grid: Size) -> Tensor:
        thresholds = self.config.pseudo_label
        cams = self._merge(passes, labels, "aux", size, grid)
        patch_labels = merged_labels(cams, high=thresholds.high, low=thresholds.low)
        return affinity_loss(top, patch_labels.flatten(1))

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
            losses["segmentation"] = segmentation_loss(logits, pseudo_labels)
        if weights.energy > 0:
            colours = grey_levels(view1, self.mean, self.std)
            losses["energy"] = energy_loss(logits, colours, pseudo_labels)
        return losses

    def _distil(
        self,
        features: Features,
        masked: MaskedPatches,
        teacher: tuple[Tensor | None, Tensor | None],
        schedule: Schedule,
    ) -> dict[str, Tensor]:
        class_target, patch_targets = teacher
        encoder, projector = self.student.encoder, self.student.projector
        heads, temperature = (projector, self.teacher.projector), schedule.teacher_temperature
        losses = {}
        with self._autocast():
            if patch_targets is not None:
                patches = projector(encoder.norm(gather_tokens(features.tokens, masked.index)))
                losses["uncertain"] = self.distillation.patch_loss(patches, patch_targets, masked, heads, temperature)
            if class_target is not None:
                class_token = projector(encoder.aggregate(features.tokens, masked.mask))
                losses["class_token"] = self.distillation.class_loss(class_token, class_target, heads, temperature)
        return losses

    # --- shared parts

    def _note_passes(self, made: list[TrunkPass] | None) -> None:
        for network in (self.student, self.teacher.network):
            if network is not None:
                network.encoder.passes = made

    @torch.no_grad()
    def _merge(
        self, passes: list[ScalePass], labels: Tensor, source: Source, size: Size, output_size: Size | None = None
    ) -> MergedCams:
        with self._autocast():
            return merge_passes(
                self.student,
                passes,
                labels,
                classifier=source,
                max_classes=self.max_classes,
                size=size,
                output_size=output_size,
            )

    def _autocast(self) -> torch.autocast:
        return autocast(self.mean.device, self.config.run.amp)


def _detach(features: Features) -> Features:
    return Features(features.tokens.detach(), features.aux.detach(), features.grid)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]
