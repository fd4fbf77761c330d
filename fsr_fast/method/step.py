"""One training step: views → CAMs → mask → student → teacher → losses (paper, Figure 2 and Eq. 10).

Each pass through the trunk is run once and serves all its readers. Where the teacher's encoder is the student's
(momentum 0) and no stochastic depth is drawn for it, view 2's unmasked pass gives the mask and the teacher's patches,
and view 1's the scale-1.0 CAM and the teacher's class token; `shared` takes the student's own pass of view 1 for it.

Shapes: B images, N = h·w patches, D width, E bottleneck, C classes, M ≤ C classes of one image, k masked patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsr_fast.config import Config, LossConfig
from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import merge_passes, merged_labels, pair_mirrored, scaled_views, split_batch
from fsr_fast.method.distillation import Distillation, gather_tokens
from fsr_fast.method.draws import Draws, draw_step
from fsr_fast.method.losses import affinity_loss, classification_loss, energy_loss, segmentation_loss
from fsr_fast.method.masking import MaskedPatches, MaskSelector
from fsr_fast.method.plugin_losses import LossInputs, plugin_losses
from fsr_fast.method.pseudo_labels import generate_pseudo_labels, half_size
from fsr_fast.method.schedules import Schedule
from fsr_fast.method.teacher import Teacher
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import classify, to_map
from fsr_fast.models.work import Work
from fsr_fast.runtime.precision import autocast


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
    """The trunk's passes; None in the reference engine."""


class Cams(NamedTuple):
    """Normalised multi-scale CAMs of view 1; None where no loss reads them."""

    aux: MergedCams | None
    """Values (B, M, h, w), of the auxiliary classifier."""
    top: MergedCams | None
    """Values (B, M, H/2, W/2), of the classifier."""


class Targets(NamedTuple):
    """Bottleneck vectors of the teacher; None where no loss reads them."""

    class_token: Tensor | None
    """(B, E), of view 1."""
    patches: Tensor | None
    """(B, N, E), of view 2."""


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
        depth = config.teacher.stochastic_depth
        self.shares_passes = self.teacher.network is None and depth != "always"
        # without stochastic depth the student's pass of view 1 is the one without it
        self.reuses_student = self.shares_passes and (depth == "shared" or not config.model.stochastic_depth)
        self.selector = MaskSelector(student, config, max_classes)
        self.distillation = Distillation(config.teacher, config.model.prototypes)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.student.top_classifier.weight.device

    def draw(self, batch: int, generator: torch.Generator) -> Draws:
        """Draw all that is random in a step on `batch` images."""
        passes = len(self.config.cam.scales) if self.config.teacher.stochastic_depth == "always" else 0
        blocks = self.selector.shape.blocks
        return draw_step(self.student.encoder, batch, blocks, generator, self.device, passes=passes)

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor, draws: Draws, schedule: Schedule) -> StepOutput:
        """Compute every loss whose weight is not 0.

        Args:
            views: two of (B, 3, H, W), normalised.
            labels: (B, C), float32, 0 or 1.
            draws: from `draw`.
            schedule: values of this iteration.
        """
        if self.student.encoder.graphs:  # what graphs have put out before may be overwritten from now on
            torch.compiler.cudagraph_mark_step_begin()
        view1, view2 = views  # (B, 3, H, W)
        weights, student = schedule.weights, self.student
        distils = weights.uncertain > 0 or weights.class_token > 0

        # All passes in an autocast region have a gradient, or none has: see `autocast`.
        with torch.no_grad(), self._autocast():
            unmasked1, unmasked2, scaled = self._pass_unmasked(view1, view2, draws, weights)
            random = schedule.random_mask
            masked = self.selector.select(view2, unmasked2, labels, draws, random=random) if distils else None
        with self._autocast():
            features, masked_features = self._pass_student(view1, view2, masked, draws.student)
            top = student.encoder.norm(features.tokens)  # (B, N, D)
            feature_map = to_map(top, features.grid)  # (B, D, h, w)
            seg_logits = student.decoder(feature_map) if weights.labels_pixels else None  # (B, C+1, h, w)
        with torch.no_grad(), self._autocast():
            unmasked1 = features if self.reuses_student else unmasked1
            cams = self._merge_cams(unmasked1, scaled, labels, view1, weights)
            targets, taught = self._pass_teacher(views, (unmasked1, unmasked2), draws, weights)

        class_logits = classify(top, student.top_classifier)  # (B, C), float32
        aux_class_logits = classify(features.aux, student.aux_classifier)  # (B, C), likewise
        losses = {"classification": classification_loss(class_logits, aux_class_logits, labels)}
        if cams.aux is not None:
            thresholds = self.config.pseudo_label
            patch_labels = merged_labels(cams.aux, high=thresholds.high, low=thresholds.low)  # (B, h, w)
            with self._autocast():  # of the kernels' matrix products
                losses["affinity"] = affinity_loss(top, patch_labels.flatten(1), weights.normalise)
        pseudo_labels = None
        if cams.top is not None and seg_logits is not None:
            pseudo_labels = generate_pseudo_labels(  # (B, H, W)
                student.denormalise(view1), cams.top, self.config.pseudo_label
            )
            losses |= self._segment(seg_logits, view1, pseudo_labels, weights)
        if masked is not None and masked_features is not None:
            losses |= self._distil(masked_features, masked, targets, schedule)

        known = LossInputs(view1, labels, class_logits, feature_map, seg_logits, cams.top, pseudo_labels)
        losses |= plugin_losses(weights.extra, known)

        total = torch.stack([weights.weight(name) * loss for name, loss in losses.items()]).sum()
        detached = {name: loss.detach() for name, loss in losses.items()}
        sources = [one.source for one in (features, unmasked1, unmasked2, *scaled, *taught) if one]
        work = student.encoder.shape.work([*sources, *(masked.passes if masked else ())], images=len(labels))
        return StepOutput(total, detached, cams.top, pseudo_labels, masked.mask if masked else None, work)

    # --- passes through the trunk

    def _pass_unmasked(
        self, view1: Tensor, view2: Tensor, draws: Draws, weights: LossConfig
    ) -> tuple[Features | None, Features | None, list[Features]]:
        """Return the features of views 1 and 2, where teacher and maps share them, and of view 1's scaled images."""
        encoder, cam = self.student.encoder, self.config.cam
        maps = weights.affinity > 0 or weights.labels_pixels
        alone = {}
        if self.shares_passes and not self.reuses_student and (maps or weights.class_token > 0):
            alone[1] = view1
        if self.shares_passes and (weights.uncertain > 0 or weights.class_token > 0):
            alone[2] = view2
        scaled = scaled_views(view1, cam.scales, encoder.patch_size, known=self.shares_passes) if maps else []
        drop_path = torch.cat(draws.cam, dim=-1) if draws.cam else None  # (depth, 2, ΣB)
        if cam.fp8:  # except in passes that the teacher shares
            features = encoder.forward_packed([*alone.values()])
            features += encoder.forward_packed(scaled, drop_path, float8=True)
        else:
            features = encoder.forward_packed([*alone.values(), *scaled], drop_path)
        found = dict(zip(alone, features, strict=False))
        return found.get(1), found.get(2), features[len(alone) :]

    def _pass_student(
        self, view1: Tensor, view2: Tensor, masked: MaskedPatches | None, drop_path: Tensor
    ) -> tuple[Features, Features | None]:
        """Return the features of view 1 and of masked view 2, from one pass of 2B images."""
        if masked is None:
            return self.student.encoder(view1, drop_path=drop_path[..., : len(view1)]), None
        mask = torch.cat([torch.zeros_like(masked.mask), masked.mask])  # (2B, N)
        return split_batch(self.student.encoder(torch.cat([view1, view2]), mask, drop_path))

    def _pass_teacher(
        self, views: tuple[Tensor, Tensor], known: Sequence[Features | None], draws: Draws, weights: LossConfig
    ) -> tuple[Targets, list[Features]]:
        """Return what the losses read of view 1's class token and of view 2's patches, and the passes made for it."""
        encoder, projector = (self.teacher.network or self.student).encoder, self.teacher.projector
        wanted = [index for index, weight in enumerate((weights.class_token, weights.uncertain)) if weight > 0]
        made: list[Features] = []
        if self.shares_passes:
            tokens = {index: one.tokens for index, one in enumerate(known) if one is not None}  # (B, N, D) each
        else:
            drop_path = None
            if draws.teacher is not None and wanted:
                drop_path = torch.cat([draws.teacher.chunk(2, dim=-1)[index] for index in wanted], dim=-1)
            made = encoder.forward_packed([views[index] for index in wanted], drop_path)
            tokens = {index: one.tokens for index, one in zip(wanted, made, strict=True)}
        class_token = encoder.aggregate(tokens[0]) if 0 in wanted else None  # (B, D)
        patches = encoder.norm(tokens[1]) if 1 in wanted else None  # (B, N, D)
        return Targets(*projector.project_together(class_token, patches)), made

    def _merge_cams(
        self, unmasked1: Features | None, scaled: list[Features], labels: Tensor, view1: Tensor, weights: LossConfig
    ) -> Cams:
        if not scaled:
            return Cams(None, None)
        passes = pair_mirrored(scaled, unmasked1)
        size = (view1.shape[-2], view1.shape[-1])
        merge = partial(merge_passes, self.student, passes, labels, max_classes=self.max_classes, size=size)
        return Cams(
            aux=merge(classifier="aux", output_size=passes[0].plain.grid) if weights.affinity > 0 else None,
            top=merge(classifier="top", output_size=half_size(size)) if weights.labels_pixels else None,
        )

    # --- losses

    def _segment(self, logits: Tensor, view1: Tensor, pseudo_labels: Tensor, weights: LossConfig) -> dict[str, Tensor]:
        losses = {}
        if weights.segmentation > 0:
            losses["segmentation"] = segmentation_loss(logits, pseudo_labels, weights.normalise)
        if weights.energy > 0:
            losses["energy"] = energy_loss(logits, self.student.grey_levels(view1), pseudo_labels)
        return losses

    def _distil(
        self, features: Features, masked: MaskedPatches, targets: Targets, schedule: Schedule
    ) -> dict[str, Tensor]:
        encoder, projector, distillation = self.student.encoder, self.student.projector, self.distillation
        losses = {}
        with self._autocast():
            patches = None if targets.patches is None else encoder.norm(gather_tokens(features.tokens, masked.index))
            token = None if targets.class_token is None else encoder.aggregate(features.tokens, masked.mask)
            patches, token = projector.project_together(patches, token)  # (B, k, E), (B, E)
            compared = (projector.directions, self.teacher.projector.directions), schedule.teacher_temperature
            if patches is not None and targets.patches is not None:
                losses["uncertain"] = distillation.patch_loss(patches, targets.patches, masked, *compared)
            if token is not None and targets.class_token is not None:
                losses["class_token"] = distillation.class_loss(token, targets.class_token, *compared)
        return losses

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.run.amp)
