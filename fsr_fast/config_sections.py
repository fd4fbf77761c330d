"""The sections of the configuration. Every field is described by the text below it.

The defaults are the paper's recipe for PASCAL VOC (`configs/voc_vit_b.yaml`).
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1000.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Iterations = Annotated[int, Field(ge=0)]
Scales = Annotated[tuple[Annotated[float, Field(ge=0.1, le=4.0)], ...], Field(min_length=1)]
Dilations = Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(min_length=1)]


def _name_stochastic_depth(value: object) -> object:
    """Version 0.1.0 said false for `shared` and true for `always`."""
    return {"false": "shared", "true": "always"}.get(str(value).lower(), value)


StochasticDepth = Annotated[Literal["never", "shared", "always"], BeforeValidator(_name_stochastic_depth)]


def _plain_word(value: Any, kind: Any) -> Any:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words = {word for part in (kind, *parts) if get_origin(part) is Literal for word in get_args(part)}
    if value is False and "off" in words and bool not in parts:
        return "off"
    if value is not None and not (isinstance(value, str) and value.lower() in ("none", "null")):
        return value
    return "none" if "none" in words else None if NoneType in parts else value


class Section(BaseModel):
    """One section of the configuration: unknown keys are refused, values are fixed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _one_word_for_nothing(cls, values: Any) -> Any:
        """Read `none`, `None`, `null` and nothing alike, and YAML's `off`, which is a boolean there, as the word."""
        if not isinstance(values, dict):
            return values
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        return values | {name: _plain_word(value, cls.model_fields[name].annotation) for name, value in fields.items()}


class RunConfig(Section):
    """Where and how the run happens."""

    output: Path = Path("runs/voc_vit_b")
    """Run folder: configuration, metrics, pictures and checkpoints. A folder that holds the same run is resumed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of every random draw; the draws of a run depend on nothing else."""
    seed_per_rank: bool = True
    """Each process draws its own stream; `false`: the same draws on all of them (official code)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU."""
    engine: Literal["fast", "reference"] = "fast"
    """`reference` computes every step by the literal, slow form of the method (one process, `amp: off`)."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Automatic mixed precision of the network passes; losses, softmax, norms and centres stay in fp32. `auto`: bf16 on
    a GPU, off on a CPU."""
    tf32: bool = False
    """On a GPU, round the factors of fp32 products to TF32; with `amp: bf16` few products are in fp32."""
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = "auto"
    """How self-attention is computed: torch's own, one call a size; xformers or torch's `varlen`, all sizes in one call
    (GPU). `auto`: xformers for half precision on a GPU, else sdpa."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the transformer's blocks. `auto`: on a GPU alone; the first iterations take longer."""
    checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass: less memory, a third more work with gradient."""
    shard: bool = False
    """For backbones that do not fit on one GPU: the processes share out weights, gradients, moments and averages
    (FSDP2) instead of holding them whole. Blocks are not compiled then."""
    resume: bool = True
    """Go on from the newest checkpoint of the run folder. `false` refuses a folder that holds one."""
    log_every: Count = 50
    """Iterations between two lines of metrics.jsonl."""
    picture_every: Iterations = 1000
    """Iterations between two grids of training pictures; 0: none."""
    checkpoint_every: Count = 1000
    """Iterations between two checkpoints; the last iteration always writes one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that stay, beside the best one (`best.pt`: highest seg mIoU of the evaluations)."""
    keep_every: Iterations = 0
    """Checkpoints at multiples of this iteration stay for good; 0: none does."""
    evaluate_every: Iterations = 2000
    """Iterations between two evaluations on the validation list; 0: only at the end."""
    timeout: float = Field(1800.0, ge=0.0, le=1e6)
    """Seconds without a finished iteration after which a process reports where it hangs, and ends; 0: never."""
    wandb: str | None = None
    """Project of Weights & Biases that takes the scalars, too; none: the package is not even imported."""
    profile: bool = False
    """Write a profile of iterations 6 to 10 after the start, a process, to the run folder (`profile/`)."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.shard and self.compile is True:
            raise ValueError(
                "shard: shared out, blocks cannot be compiled; give --run.shard false or --run.compile false"
            )
        return self


class DataConfig(Section):
    """The data set."""

    dataset: Literal["synthetic", "voc", "coco", "own", "shards"] = "voc"
    """`synthetic` is generated on first use; `voc` is any folder in VOC layout; `coco` is MS COCO 2014, from
    its own annotations or in VOC layout; `own` is a folder of pictures with a table of labels (docs/custom_data.md);
    `shards` is what `fsr-fast data pack` writes."""
    root: Path | str | None = None
    """Folder of the data set; for `shards` also a URL of a store (`s3://…`). `synthetic` needs none."""
    train_list: str = "train_aug"
    """Name of the training list, without ending (VOC layout: in ImageSets/Segmentation), or the path of a list file."""
    val_list: str | None = "val"
    """The same for the validation list; none: train without one, and without scores."""
    classes: tuple[str, ...] | None = None
    """Names of all foreground classes, in the order of the mask values 1, 2, …; none: the names of the data set, for
    `own` those of its classes.txt."""
    subset: tuple[str, ...] | None = None
    """Train on these classes alone: labels are restricted to them, pixels of all others become 255 (ignored)."""
    labels: Literal["auto", "xml", "csv", "masks"] = "auto"
    """Source of the image labels: Annotations/*.xml, labels.csv or the training masks; `auto`: the first that is there,
    but for `coco` its annotations and for `own` its tables."""
    negatives: Literal["auto"] | bool = "auto"
    """Training images that show no class: `true` trains on them as background alone (for MS COCO's own annotations,
    the images without an object join the list), `false` leaves them out; `auto` trains on them where an empty label is
    a statement (`own`, labels from masks) and refuses them elsewhere. A set of one class is learned from them."""
    mask_values: Literal["auto", "coco91"] | dict[int | str, int | str] = "auto"
    """What the masks hold, where it is not 0 background, 1, 2, … the classes, 255 ignored: a class (name or number),
    `background` or `ignore` by value or colour, e.g. `{"0": background, "255": crack}` or `{"#ff0000": crack}`;
    `coco91`: MS COCO's own numbers 1 to 90. `auto` sees by itself that masks of one class are drawn as 0 and 255."""
    encoding: str | None = None
    """Encoding of lists and tables, e.g. `cp1252`; None: UTF-8, or UTF-16 where the file shows it."""
    separator: str | None = Field(None, min_length=1, max_length=1)
    """Character between the columns of tables; None: told from the header."""
    label_separator: Literal["auto", "space", ",", ";", "|"] = "auto"
    """What stands between class names in a cell of a table; `auto`: commas, semicolons, bars or spaces."""
    allow_links: tuple[Path, ...] = ()
    """Folders below which symbolic links of the data set may lead, as the stores of DVC, git-annex and hub caches;
    links to all other places outside of the data set are refused."""
    max_pixels: int = Field(80_000_000, ge=1, le=178_000_000)
    """Largest number of pixels of a picture; larger ones are refused before they are decoded, as they may be made to
    fill the memory (four bytes per pixel)."""
    image_size: int = Field(448, ge=32, le=4096)
    """Side of the square training views, in pixels; a multiple of the patch size."""
    workers: int = Field(4, ge=0, le=256)
    """Loader processes a rank; with DALI, also the threads that decode and augment."""
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """Decoding and augmentation: NVIDIA DALI, or Pillow and torchvision. `auto`: DALI where it runs on a GPU."""
    max_bad_fraction: Probability = 0.001
    """Largest share of the training images that may be damaged: those are skipped and listed in bad_files.txt of the
    run folder, more stop the run. One is let pass in any case, unless this is 0."""

    fingerprint: Literal["sizes", "contents", "off"] = "sizes"
    """What a resumed run compares of its training set with that of the checkpoint: names in order, labels and sizes of
    the files, or their contents, too, which reads every file at the start. `off` goes on with another one."""

    @field_validator("root", mode="before")
    @classmethod
    def _folder_or_url(cls, value: object) -> object:
        return Path(value) if isinstance(value, str) and "://" not in value else value


class AugmentConfig(Section):
    """The random draws that make a view of an image (paper, implementation details and Table 5)."""

    crop_scale: tuple[Probability, Probability] = (0.32, 1.0)
    """Smallest and largest area of the random resized crop, as a share of the image."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.5
    """Probability of colour jitter."""
    brightness: float = Field(0.4, ge=0.0)
    """Largest relative change of brightness."""
    contrast: float = Field(0.4, ge=0.0)
    """Largest relative change of contrast."""
    saturation: float = Field(0.2, ge=0.0)
    """Largest relative change of saturation."""
    hue: float = Field(0.1, ge=0.0, le=0.5)
    """Largest change of hue, in turns."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur of radius 0.1 to 2.0 pixels (Table 5: 0.1)."""
    solarise: Probability = 0.0
    """Probability of solarisation above 128 (Table 5: 0.2)."""
    policy: Literal["none", "autoaugment", "randaugment"] = "none"
    """Learned policy: AutoAugment (paper) or `rand-m9-mstd0.5-inc1` with random erasing 0.25 (official code)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(f"{key}: {low} to {high} is not a range; give 0 < smallest <= largest")
        return self


class ModelConfig(Section):
    """The network: encoder, aggregator, projector, decoder."""

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    """Vision transformer of timm, by name and tag of its weights; the default is the official code's. Without a tag:
    timm's choice for the name. docs/recipes.md lists the families."""
    backbone_options: dict[str, int | float | bool] = Field(default_factory=dict)
    """Arguments of timm's VisionTransformer that differ from the named model, e.g. `{depth: 6, embed_dim: 128}`."""
    pretrained: Literal["hub", "none"] | str = "hub"
    """Weights of the encoder: `hub` (downloaded by timm), `none`, or a local `.safetensors` / `.pth` file."""
    prefix_tokens: Literal["auto", "drop", "keep"] = "auto"
    """Class and register tokens of the backbone: `drop` passes patches alone through the trunk (the paper), `keep`
    passes them, too, and takes them off afterwards. `auto` keeps them where the backbone has registers."""
    initial: Path | None = None
    """Trained network to start from, in place of `pretrained`: run folder, checkpoint, or official `student.pth`."""
    normalisation: Literal["checkpoint", "imagenet"] = "checkpoint"
    """Mean and standard deviation of the input: those of the pretrained weights, or ImageNet's (official code)."""
    stochastic_depth: float = Field(0.1, ge=0.0, lt=1.0)
    """Drop rate of the last block; it rises linearly from 0 at the first."""
    aux_block: int = -3
    """Block whose output is the auxiliary feature map, counted as in Python; -3: the 10th of 12."""
    aggregation: Literal["mca", "gap", "gmp"] = "mca"
    """Class token: masked cross-attention, or the average / maximum of the unmasked patches (Table 4)."""
    aggregator_blocks: int = Field(2, ge=1, le=100)
    """Blocks of the aggregator."""
    mask_mode: Literal["exclude", "multiply", "none"] = "exclude"
    """Masked patches in the aggregator: left out, Eq. 7 to the letter, or attended to (official code)."""
    decoder_width: Width = 512
    """Channels of the decoder's two dilated convolutions."""
    projector_hidden: Width = 2048
    """Width of the projector's hidden layers."""
    bottleneck: Width = 256
    """Width E of the vector that the prototypes see."""
    prototypes: int = Field(4096, ge=2, le=2**20)
    """Number K of prototypes of the projector."""


class CamConfig(Section):
    """Multi-scale class activation maps."""

    scales: Scales = (1.0, 0.5, 1.5)
    """Scales of the passes; each is run with its mirror image. The first must be 1.0."""
    fp8: bool = False
    """Round the factors of the linear layers to float8 (e4m3) in those CAM passes of the training that serve nothing
    else. For GPUs of compute capability 8.9 and later."""

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
    """Share of the training, from its start, that masks at random (official code: 0.2)."""
    edge_sigma: float = Field(1.4, gt=0.0, le=8.0)
    """Smoothing of Canny's detector for `edge_strict`, in pixels; the paper gives none."""
    edge_low: float = Field(40.0, ge=0.0, le=255.0)
    """Gradient, by Sobel's operator in grey levels, above which a pixel goes on with an edge; the paper gives none."""
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
    """Weights of Eq. 10 and the iterations from which they hold. A weight of 0 switches the work off, too."""

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
    lattice sums to about 0.6 of them: 0.03 has the same gradient."""
    affinity_start: Iterations = 0
    """Iterations before L_aff counts (COCO: 12,000)."""
    segmentation_start: Iterations = 2000
    """Iterations before L_seg and the energy count (COCO: 8,000)."""
    normalise: Literal["global", "process"] = "global"
    """Patches and pixels over whose number L_aff and L_seg are averaged: those of all processes, or of each process by
    itself (official code, where each has two images)."""


class TeacherConfig(Section):
    """The teacher and the targets that it gives."""

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
    """Images an iteration, over all processes."""
    learning_rate: Positive = 6e-5
    """Base rate."""
    head_factor: Positive = 10.0
    """Factor on the rate of decoder, projector and classifiers."""
    weight_decay: float = Field(0.05, ge=0.0)
    """Decay of matrices; vectors, biases, position embedding, class and mask token have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moments, each below 1."""
    warmup: Iterations = 1500
    """Iterations of linear warm-up; cosine to 0 follows."""
    warmup_factor: Probability = 0.1
    """Factor on the rate at iteration 0."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; none: no clipping."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup >= self.iterations:
            raise ValueError(
                f"warmup: {self.warmup} is not below iterations: {self.iterations}; lower --optim.warmup or raise "
                "--optim.iterations"
            )
        return self


class EvaluateConfig(Section):
    """Inference on the validation list."""

    scales: Scales = (1.0, 1.25, 1.5)
    """Scales of the decoder's passes."""
    flip: bool = True
    """Add the mirror image at every scale."""
    side: Literal["auto"] | Count | None = "auto"
    """Longest side, in pixels, at which pictures pass through the network; larger ones are scaled down, and their masks
    and maps brought back to the picture's size. `auto`: twice `data.image_size`, at least 512; none: every pixel."""
    tile: Literal["auto"] | Count | None = "auto"
    """Side, in pixels, of the tiles in which pictures pass that are larger after `side`; rounded up to whole patches.
    With a number, `side: auto` means every pixel. `auto`: pictures of more than 16,384 patches pass in tiles of the
    size that `side: auto` stands for; none: never."""
    overlap: float = Field(0.25, ge=0, le=0.75)
    """Least part of a tile that it shares with the next one; there the logits of both are blended."""
    threshold: Probability = 0.5
    """Background score of the pseudo labels (COCO: 0.45)."""
    protocol: Literal["own", "official"] = "own"
    """`own`: every picture at its own size, scales rounded to whole patches. `official`: as the official scripts score,
    pseudo labels on squares of data.image_size, what is left over of a patch cut off."""
    crf: bool = False
    """Also report the decoder's result after the dense CRF."""
    crf_backend: Literal["pydensecrf", "exact"] = "pydensecrf"
    """`pydensecrf` filters by a permutohedral lattice, in processes of its own; `exact` by exact Gaussians, made for a
    GPU (a CPU's core takes more than a minute for a photograph)."""
    crf_workers: int | None = Field(None, ge=0, le=256)
    """Processes of the CRF a rank; 0: the rank itself; none: one a CPU core, shared out among the ranks."""
    training_limit: Count | None = 500
    """Largest number of images of a validation during the training, spread over the list; the last one takes all."""
    limit: Count | None = None
    """Evaluate only the first images of the list."""
