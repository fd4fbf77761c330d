"""The sections of the configuration for the method. Every field is described by the text below it.

The defaults are the paper's recipe for PASCAL VOC (`configs/voc_vit_b.yaml`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fsr_fast.config_fields import (
    Count,
    Decay,
    Dilations,
    Iterations,
    Positive,
    Probability,
    Scales,
    Section,
    Weight,
    Width,
)


def _name_stochastic_depth(value: object) -> object:
    """Version 0.1.0 wrote false for `shared` and true for `always`."""
    return {"false": "shared", "true": "always"}.get(str(value).lower(), value)


StochasticDepth = Annotated[Literal["never", "shared", "always"], BeforeValidator(_name_stochastic_depth)]


class ModelConfig(Section):
    """The network: encoder, aggregator, projector, decoder."""

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    """Vision transformer of timm, by name and tag of its weights; the default is the official code's. Without a tag,
    timm chooses the weights. docs/recipes.md lists the families. A plug-in's backbone has its own name."""
    backbone_options: dict[str, int | float | bool] = Field(default_factory=dict)
    """Arguments of timm's VisionTransformer that differ from the named model, e.g. `{depth: 6, embed_dim: 128}`."""
    pretrained: Literal["hub", "none"] | str = "hub"
    """Weights of the encoder: `hub` (downloaded by timm), `none`, or a local `.safetensors` / `.pth` file."""
    prefix_tokens: Literal["auto", "drop", "keep"] = "auto"
    """Class and register tokens of the backbone: `drop` passes only patches through the trunk (the paper), `keep`
    passes the tokens, too, and removes them afterwards. `auto` keeps them where the backbone has registers."""
    initial: Path | None = None
    """Trained network to start from, instead of `pretrained`: run folder, checkpoint, or official `student.pth`."""
    in_chans: int = Field(3, ge=1, le=1024)
    """Channels of the pictures. With other than three, the pretrained patch embedding is summed or repeated over the
    channels, as timm does."""
    normalisation: Literal["checkpoint", "imagenet", "data"] = "checkpoint"
    """Mean and standard deviation of the input: those of the pretrained weights, ImageNet's (official code), or those
    of the training pictures, which are always used with other than three channels."""
    mean: tuple[float, ...] | None = None
    """Mean of the input, overriding `normalisation`, for values in 0 to 1: one number per channel."""
    std: tuple[Positive, ...] | None = None
    """Standard deviation of the input, likewise."""
    stochastic_depth: float = Field(0.1, ge=0.0, lt=1.0)
    """Drop rate of the last block; it rises linearly from 0 at the first."""
    aux_block: int = -3
    """Block whose output is the auxiliary feature map, counted as in Python; -3: the 10th of 12."""
    aggregation: Literal["mca", "gap", "gmp"] = "mca"
    """Class token: masked cross-attention, or the average / maximum of the unmasked patches (Table 4)."""
    aggregator_blocks: int = Field(2, ge=1, le=100)
    """Blocks of the aggregator."""
    mask_mode: Literal["exclude", "multiply", "none"] = "exclude"
    """Masked patches in the aggregator: excluded, multiplied as in Eq. 7, or attended to (official code)."""
    decoder_width: Width = 512
    """Channels of the decoder's two dilated convolutions."""
    projector_hidden: Width = 2048
    """Width of the projector's hidden layers."""
    bottleneck: Width = 256
    """Width E of the vector that the prototypes see."""
    prototypes: int = Field(4096, ge=2, le=2**20)
    """Number K of prototypes of the projector."""

    @model_validator(mode="after")
    def _value_per_channel(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: only one is given; give both")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{key}: {len(values)} numbers for {self.in_chans} channels (in_chans); give one each")
        return self


class CamConfig(Section):
    """Multi-scale class activation maps."""

    scales: Scales = (1.0, 0.5, 1.5)
    """Scales of the passes; each is run with its mirror image. The first must be 1.0."""
    fp8: bool = False
    """Round the factors of the linear layers to float8 (e4m3) in those CAM passes of the training that serve nothing
    else. Needs a GPU of compute capability 8.9 or later."""

    @model_validator(mode="after")
    def _first_scale_is_one(self) -> Self:
        if self.scales[0] != 1.0:
            raise ValueError(f"scales: the first is {self.scales[0]}; it must be 1.0, whose features the step reuses")
        return self


class MaskConfig(Section):
    """Selection of the patches to mask in view 2 (Eq. 2-4, Table 3)."""

    strategy: Literal["uncertain", "random", "cam_strict", "edge_strict"] = "uncertain"
    """`uncertain` masks uncertain patches first, `random` any; `cam_strict` masks exactly the uncertain patches,
    `edge_strict` exactly those with edges, whatever the ratio."""
    ratio: float = Field(0.4, ge=0.0, lt=1.0)
    """Share r of the patches that are masked."""
    low: Probability = 0.2
    """Normalised activation β_l above which a patch is uncertain."""
    high: Probability = 0.7
    """Normalised activation β_h below which a patch is uncertain."""
    source: Literal["top", "aux"] = "top"
    """Classifier whose CAM guides the mask."""
    multi_scale: bool = False
    """Guide by the multi-scale CAM with flips instead of the single-scale CAM."""
    block: Count = 1
    """Side of the masked blocks, in patches (official code: 4)."""
    random_fraction: Probability = 0.0
    """Share of the training, from its start, in which masks are random (official code: 0.2)."""
    edge_sigma: float = Field(1.4, gt=0.0, le=8.0)
    """Smoothing of Canny's detector for `edge_strict`, in pixels; the paper gives none."""
    edge_low: float = Field(40.0, ge=0.0, le=255.0)
    """Sobel gradient, in grey levels, above which a pixel continues an edge; the paper gives none."""
    edge_high: float = Field(100.0, ge=0.0, le=255.0)
    """Gradient above which a pixel starts an edge; the paper gives none."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("low", "high"), ("edge_low", "edge_high")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low}: {getattr(self, low)} is not below {high}: {getattr(self, high)}; lower --mask.{low} or "
                    f"raise --mask.{high}"
                )
        return self


class PseudoLabelConfig(Section):
    """Pseudo labels for the decoder, refined by PAR, and for the affinity loss."""

    high: Probability = 0.7
    """Background score above which foreground is certain."""
    low: Probability = 0.25
    """Background score below which background is certain."""
    iterations: Count = 10
    """Iterations of pixel-adaptive refinement."""
    dilations: Dilations = (1, 2, 4, 8, 12, 24)
    """Distances of the neighbours, in pixels of the half-size image."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(
                f"low: {self.low} is not below high: {self.high}; lower --pseudo_label.low or raise --pseudo_label.high"
            )
        return self


class LossConfig(Section):
    """Weights of Eq. 10 and the iterations from which they hold. A weight of 0 also saves the work."""

    classification: Weight = 1.0
    """L_cls, both classifiers."""
    affinity: Weight = 0.2
    """L_aff, patch-token contrast."""
    segmentation: Weight = 0.1
    """L_seg."""
    uncertain: Weight = 0.1
    """L_u, Eq. 8."""
    class_token: Weight = 0.1
    """L_c, Eq. 9."""
    energy: Weight = 0.0
    """Dense-energy regularisation by exact Gaussians; multiplied by 1e-7. The official code's weight is 0.05, but its
    lattice sums to about 0.6 of the exact value: 0.03 gives the same gradient."""
    affinity_start: Iterations = 0
    """Iterations before L_aff counts (COCO: 12,000)."""
    segmentation_start: Iterations = 2000
    """Iterations before L_seg and the energy count (COCO: 8,000)."""
    extra: dict[str, Weight] = Field(default_factory=dict)
    """Weights of plug-ins' losses, by name."""
    normalise: Literal["global", "process"] = "global"
    """L_aff and L_seg are averaged over the patches and pixels of all processes (`global`), or of each process by
    itself (`process`; official code, where each has two images)."""

    @property
    def labels_pixels(self) -> bool:
        """Whether a loss reads pseudo labels."""
        return self.segmentation > 0 or self.energy > 0

    def weight(self, name: str) -> float:
        """Return the weight of a loss, of the method or of a plug-in."""
        return self.extra[name] if name in self.extra else float(getattr(self, name))


class TeacherConfig(Section):
    """The teacher and its targets."""

    encoder_momentum: Probability = 0.0
    """Momentum of encoder and aggregator, → 1 by a cosine unless 0. At 0 the teacher's encoder is the student's."""
    projector_momentum: Probability = 0.996
    """Momentum of the projector, → 1 by a cosine."""
    stochastic_depth: StochasticDepth = "never"
    """Stochastic depth in the teacher and the CAMs: `never` (paper); `always`, drawn for each pass (official code); or
    `shared`: drawn for the student alone, whose pass of view 1 also serves CAM and class token, one pass less."""
    student_temperature: Positive = 0.1
    """Temperature of the student's softmax."""
    temperature: tuple[Positive, Positive] = (0.04, 0.07)
    """Temperature of the teacher's softmax, from start to end."""
    temperature_fraction: Probability = 0.125
    """Share of the training over which it rises."""
    centre_momentum: Probability = 0.9
    """Momentum of the patch centre and the class centre."""


class OptimConfig(Section):
    """AdamW, its schedule and the batch."""

    iterations: Count = 20_000
    """Length of the training."""
    batch_size: Count = 8
    """Images per iteration, over all processes."""
    learning_rate: Positive = 6e-5
    """Base rate."""
    head_factor: Positive = 10.0
    """Factor on the learning rate of decoder, projector and classifiers."""
    weight_decay: float = Field(0.05, ge=0.0)
    """Weight decay of matrices; vectors, biases, position embedding, class and mask token have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moments, each below 1."""
    warmup: Iterations = 1500
    """Iterations of linear warm-up; cosine to 0 follows."""
    warmup_factor: Probability = 0.1
    """Factor on the learning rate at iteration 0."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; `none`: no clipping."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup >= self.iterations:
            raise ValueError(
                f"warmup: {self.warmup} is not below iterations: {self.iterations}; lower --optim.warmup or raise "
                "--optim.iterations"
            )
        return self
