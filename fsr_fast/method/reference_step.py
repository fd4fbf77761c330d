"""The step that trains by the literal reference, behind the interface of the fast one."""

from typing import Any, cast

from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import interpolate

from fsr_fast import reference
from fsr_fast.config import Config
from fsr_fast.errors import UserError
from fsr_fast.kernels import MergedCams
from fsr_fast.method.draws import Draws
from fsr_fast.method.masking import find_edges
from fsr_fast.method.pseudo_labels import half_size
from fsr_fast.method.schedules import Schedule
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.models import Network
from fsr_fast.runtime.distributed import world_size

ACTIVATIONS = {
    "GELU": "gelu",
    "CompiledGELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
}
"""The reference's names for timm's layers, and for ours in their place."""


class ReferenceStep(FSRStep):
    """The fast step's weights, draws, teacher and centres; passes, maps, mask, labels and losses from the reference.

    Args:
        student: the network.
        config: the whole configuration.
        max_classes: largest number of classes that an image has.

    Raises:
        UserError: the reference does not support the run.
    """

    def __init__(self, student: Network, config: Config, max_classes: int) -> None:
        super().__init__(student, config, max_classes)
        if config.run.amp == "bf16":
            raise UserError(f"run.amp: {config.run.amp!r}; the reference only supports full precision: --run.amp off")
        if config.cam.fp8:
            raise UserError("cam.fp8: true; the reference only supports full precision: --cam.fp8 false")
        if config.loss.extra:
            raise UserError("loss.extra: the reference only has the paper's losses; give --run.engine fast")
        if world_size() > 1:
            raise UserError(f"run.engine: the reference runs in one process, not in {world_size()}; start one alone")
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
            reference.Draws(*draws, edges=self.edges(views[1])),
            self.settings,
            weights=_translate(schedule.weights, reference.Loss),
            temperature=schedule.teacher_temperature,
            random_mask=schedule.random_mask,
        )
        for centre, moved in zip(centres, output.centres, strict=True):
            centre.copy_(moved)
        losses = {name: loss.detach() for name, loss in output.losses.items()}
        cams = None if output.cam is None else self._present(output.cam, labels)
        return StepOutput(output.total, losses, cams, output.pseudo_labels, output.mask)

    def edges(self, view2: Tensor) -> Tensor | None:
        """Return the edges (B, H, W) of view 2 where the strategy masks them, else None."""
        mask = self.config.mask
        return find_edges(self.student.denormalise(view2), mask) if mask.strategy == "edge_strict" else None

    def _present(self, cam: Tensor, labels: Tensor) -> MergedCams:
        size = half_size((cam.shape[2], cam.shape[3]))
        halved = interpolate(cam, size=size, mode="bilinear", align_corners=False)
        classes, live = reference.present_classes(labels, max_classes=self.max_classes)
        values = halved.gather(1, classes[:, :, None, None].expand(-1, -1, *size))
        return MergedCams(values * live[:, :, None, None], classes, live)


def reference_settings(config: Config, student: Network) -> reference.Settings:
    """Translate a configuration into the reference's settings: its sections and keys have the same names.

    Args:
        config: the whole configuration.
        student: source of what the configuration leaves to the pretrained network.
    """
    encoder, block = student.encoder, cast(Any, student.encoder.blocks[0])
    rotary = None if encoder.rotary is None else reference.Rotary(*encoder.rotary)
    trunk = reference.Trunk(encoder.norm.eps, ACTIVATIONS[type(block.mlp.act).__name__], rotary)
    own = {"heads": block.attn.num_heads, "patch_size": encoder.patch_size, "trunk": trunk}
    own |= {"mean": student.mean, "std": student.std}
    sections = {
        name: _translate(getattr(config, name), type(section))
        for name, section in reference.PAPER._asdict().items()
        if name not in own
    }
    return reference.Settings(**own, **sections)


def _translate(section: BaseModel, target: Any) -> Any:
    return target(**section.model_dump(include=set(target._fields)))
