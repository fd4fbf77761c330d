"""Everything that defines a step, and the two presets: the paper's recipe and the official code's.

Sections and fields have the names of the trainer's configuration.
"""

from typing import Any, NamedTuple

from .block import PLAIN, Trunk

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Model(NamedTuple):
    """Properties of the network that its weights do not determine."""

    aux_block: int = -3
    """Block whose output is the aux feature map, counted as in Python; -3: the 10th of 12."""
    aggregation: str = "mca"
    """Class token: "mca", "gap" or "gmp" (paper, Table 4)."""
    mask_mode: str = "exclude"
    """Masked patches in the aggregator: "exclude" (text), "multiply" (Eq. 7) or "none" (official code)."""


class Cam(NamedTuple):
    """Multi-scale class activation maps."""

    scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    """The first is 1."""


class Mask(NamedTuple):
    """Which patches of view 2 are masked (paper, Eq. 2-4 and Table 3)."""

    strategy: str = "uncertain"
    """What is masked: "uncertain", "random", "cam_strict" or "edge_strict"."""
    ratio: float = 0.4
    """Share r of the patches or blocks that are masked."""
    low: float = 0.2
    """β_l of Eq. 3."""
    high: float = 0.7
    """β_h of Eq. 3."""
    source: str = "top"
    """Classifier whose map guides the mask: "top" or "aux"."""
    multi_scale: bool = False
    """Whether all scales and mirror images guide the mask."""
    block: int = 1
    """Patches along the side of a block that is masked as one."""
    random_fraction: float = 0.0
    """Share of the training, from its start, in which masks are random."""


class PseudoLabel(NamedTuple):
    """Pseudo labels and their pixel-adaptive refinement."""

    high: float = 0.7
    """Background score above which foreground is certain."""
    low: float = 0.25
    """Background score below which background is certain."""
    iterations: int = 10
    """Iterations of the refinement."""
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """Distances of its neighbours, in pixels of the halved image."""


class Loss(NamedTuple):
    """Weights of the losses (paper, Eq. 10). A weight of 0 switches a loss off, and the centre that it moves."""

    classification: float = 1.0
    affinity: float = 0.2
    segmentation: float = 0.1
    uncertain: float = 0.1
    class_token: float = 0.1
    energy: float = 0.0
    affinity_start: int = 0
    """Iterations for which L_aff weighs 0."""
    segmentation_start: int = 2000
    """Iterations for which L_seg and the energy weigh 0."""


class Teacher(NamedTuple):
    """The teacher and its targets."""

    encoder_momentum: float = 0.0
    """Momentum of encoder and aggregator; it rises to 1, unless it is 0 and stays 0."""
    projector_momentum: float = 0.996
    """Momentum of the projector; it rises to 1."""
    stochastic_depth: str = "never"
    """In the teacher and the maps: "never", "always" (drawn separately), or "shared": they read the student's pass of
    view 1, if the teacher's encoder is the student's (momentum 0)."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    temperature: tuple[float, float] = (0.04, 0.07)
    """Temperature of the teacher's softmax, from start to end."""
    temperature_fraction: float = 0.125
    """Share of the training over which it rises."""
    centre_momentum: float = 0.9
    """Momentum of both centres."""


class Optim(NamedTuple):
    """AdamW and its schedule."""

    iterations: int = 20_000
    """Length of the training."""
    learning_rate: float = 6e-5
    """Base rate."""
    head_factor: float = 10.0
    """Factor on the rate of decoder, projector and classifiers."""
    weight_decay: float = 0.05
    """Weight decay of the parameters that have one."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's means."""
    warmup: int = 1500
    """Iterations of linear warm-up."""
    warmup_factor: float = 0.1
    """Factor on the rate at iteration 0."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None: no clipping."""


class Settings(NamedTuple):
    """Everything a step depends on besides weights, views, labels and draws; the defaults are the paper's for VOC."""

    heads: int = 12
    """Attention heads."""
    patch_size: int = 16
    """Side of a patch, in pixels."""
    trunk: Trunk = PLAIN
    """What the weights do not determine about the transformer."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of the views' normalisation, for images in 0..1: the pretrained checkpoint's own."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Likewise."""
    model: Model = Model()
    cam: Cam = Cam()
    mask: Mask = Mask()
    pseudo_label: PseudoLabel = PseudoLabel()
    loss: Loss = Loss()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()

    @property
    def teacher_is_student(self) -> bool:
        """Return whether the teacher's encoder is the student's and shares the student's pass of view 1."""
        return self.teacher.encoder_momentum == 0 and self.teacher.stochastic_depth == "shared"

    @property
    def network(self) -> dict[str, Any]:
        """Return the arguments of a pass of the network."""
        return {
            "heads": self.heads,
            "patch_size": self.patch_size,
            "trunk": self.trunk,
            "aux_block": self.model.aux_block,
            "aggregation": self.model.aggregation,
        }


PAPER = Settings()
"""The paper's recipe for PASCAL VOC."""

OFFICIAL = Settings(
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    model=Model(mask_mode="none"),
    mask=Mask(source="aux", multi_scale=True, block=4, random_fraction=0.2),
    loss=Loss(energy=0.03),
    teacher=Teacher(encoder_momentum=0.9995, projector_momentum=0.9995, stochastic_depth="always"),
)
"""The official code's recipe for PASCAL VOC, where it differs from the paper."""
