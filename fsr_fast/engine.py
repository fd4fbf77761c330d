"""The step that trains: the fast one, or the literal reference behind the same interface."""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor
from torch.nn.functional import interpolate

from fsr_fast import reference
from fsr_fast.config import Config
from fsr_fast.errors import UserError
from fsr_fast.kernels import MergedCams
from fsr_fast.method.draws import Draws
from fsr_fast.method.pseudo_labels import half_size
from fsr_fast.method.schedules import Schedule
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.models import Network
from fsr_fast.models.attention import choose_backend
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.float8 import has_float8
from fsr_fast.runtime.distributed import world_size
from fsr_fast.runtime.precision import uses_half


class ReferenceStep(FSRStep):
    """The fast step's weights, draws, teacher and centres; passes, maps, mask, labels and losses by the reference.

    Args:
        student: the network.
        config: the whole configuration.
        max_classes: largest number of classes that an image has.

    Raises:
        UserError: the run is not one that the reference can do.
    """

    def __init__(self, student: Network, config: Config, max_classes: int) -> None:
        super().__init__(student, config, max_classes)
        if config.run.amp == "bf16":
            raise UserError(f"run.amp: {config.run.amp!r}; the reference knows full precision alone: --run.amp off")
        if config.cam.fp8:
            raise UserError("cam.fp8: true; the reference knows full precision alone: --cam.fp8 false")
        if world_size() > 1:
            raise UserError(f"run.engine: the reference runs in one process, not in {world_size()}; start one alone")
        foreign = [name for name in student.state_dict() if any(part in name for part in FOREIGN)]
        if foreign or student.encoder.norm.eps != reference.EPS:
            what = f"parameter {foreign[0]!r}" if foreign else f"norm with epsilon {student.encoder.norm.eps}"
            raise UserError(f"model.backbone: {config.model.backbone} has a {what}, which the reference does not know")
        self.settings = reference_settings(config, student)

    def forward(self, views: tuple[Tensor, Tensor], labels: Tensor, draws: Draws, schedule: Schedule) -> StepOutput:
        """Compute every loss whose weight is not 0, as the fast step does."""
        student = self.student.state_dict(keep_vars=True)
        network, projector = self.teacher.network, self.teacher.projector.state_dict(prefix="projector.")
        teacher = student | projector if network is None else network.state_dict()
        centres = self.distillation.patch_centre, self.distillation.class_centre
        output = reference.compute_losses(
            student,
            teacher,
            reference.Centres(*centres),
            views,
            labels,
            reference.Draws(*draws),
            self.settings,
            weights=reference.Weights(**schedule.weights.model_dump(include=set(reference.Weights._fields))),
            temperature=schedule.teacher_temperature,
            random_mask=schedule.random_mask,
        )
        for centre, moved in zip(centres, output.centres, strict=True):
            centre.copy_(moved)
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        cams = None if output.cam is None else self._present(output.cam, labels)
        return StepOutput(output.total, losses, cams, output.pseudo_labels, output.mask)

    def _present(self, cam: Tensor, labels: Tensor) -> MergedCams:
        size = half_size((cam.shape[2], cam.shape[3]))
        halved = interpolate(cam, size=size, mode="bilinear", align_corners=False)
        classes, live = reference.present_classes(labels, max_classes=self.max_classes)
        values = halved.gather(1, classes[:, :, None, None].expand(-1, -1, *size))
        return MergedCams(values * live[:, :, None, None], classes, live)


FOREIGN = (".ls1.", ".ls2.", ".q_norm.", ".k_norm.", ".attn.norm.", ".mlp.norm.", ".mlp.w12.", ".mlp.fc1_g.")
"""Parts of a transformer that the plain one does not have."""


def build_step(student: Network, config: Config, max_classes: int) -> FSRStep:
    """Build the step that `run.engine` names, and set the student up for its device as the `run` section says.

    Raises:
        UserError: the device cannot do what the section asks for.
    """
    run, encoder, device = config.run, student.encoder, student.top_classifier.weight.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    encoder.attention = choose_backend(run.attention, device, half=uses_half(device, run.amp))
    encoder.checkpointing = run.checkpointing
    if run.compile is True or (run.compile == "auto" and device.type == "cuda" and not run.shard):
        encoder.compile_blocks()
    if device.type == "cuda" and not run.shard:  # only contiguous weights can be shared out
        student.decoder.to(memory_format=torch.channels_last)
    if config.cam.fp8:
        _check_float8(encoder, device)
    return (ReferenceStep if run.engine == "reference" else FSRStep)(student, config, max_classes)


def _check_float8(encoder: Encoder, device: torch.device) -> None:
    if not has_float8(device):
        raise UserError("cam.fp8: this GPU has no float8; it takes compute capability 8.9 or later; --cam.fp8 false")
    mlp: Any = encoder.blocks[0].mlp
    plain = type(mlp) is Mlp
    if not plain or encoder.width % 16 or mlp.fc1.out_features % 16:
        raise UserError("cam.fp8: the backbone needs plain MLPs and widths that are multiples of 16; --cam.fp8 false")


def reference_settings(config: Config, student: Network) -> reference.Settings:
    """Translate a configuration into the reference's settings.

    Args:
        config: the whole configuration.
        student: for what the configuration leaves to the pretrained network.
    """
    attention: Any = student.encoder.blocks[0].attn
    optim, teacher, mask, label, loss = config.optim, config.teacher, config.mask, config.pseudo_label, config.loss
    return reference.Settings(
        heads=attention.num_heads,
        patch_size=student.encoder.patch_size,
        aux_block=config.model.aux_block,
        mean=student.mean,
        std=student.std,
        aggregation=config.model.aggregation,
        mask_mode=config.model.mask_mode,
        scales=config.cam.scales,
        strategy=mask.strategy,
        ratio=mask.ratio,
        uncertain_low=mask.low,
        uncertain_high=mask.high,
        mask_source=mask.source,
        mask_multi_scale=mask.multi_scale,
        block=mask.block,
        random_fraction=mask.random_fraction,
        label_high=label.high,
        label_low=label.low,
        refinements=label.iterations,
        dilations=label.dilations,
        weights=reference.Weights(**loss.model_dump(include=set(reference.Weights._fields))),
        affinity_start=loss.affinity_start,
        segmentation_start=loss.segmentation_start,
        encoder_momentum=teacher.encoder_momentum,
        projector_momentum=teacher.projector_momentum,
        teacher_stochastic_depth=teacher.stochastic_depth,
        student_temperature=teacher.student_temperature,
        temperature=teacher.temperature,
        temperature_fraction=teacher.temperature_fraction,
        centre_momentum=teacher.centre_momentum,
        iterations=optim.iterations,
        learning_rate=optim.learning_rate,
        head_factor=optim.head_factor,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        warmup=optim.warmup,
        warmup_factor=optim.warmup_factor,
        clip_norm=optim.clip_norm,
    )
