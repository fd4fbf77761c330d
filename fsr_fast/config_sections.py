"""The sections of the configuration around the method: run, data, augmentation, evaluation.

Every field is described by the text below it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fsr_fast.config_fields import Count, Iterations, Positive, Probability, Scales, Section, Window

LOGGER_NAME = r"^(tensorboard|(wandb|mlflow)(:.+)?)$"


def _check_logger(name: str) -> str:
    if not re.search(LOGGER_NAME, name):
        raise PydanticCustomError("logger", "expected tensorboard, wandb or mlflow, the last two also as wandb:PROJECT")
    return name


LoggerName = Annotated[str, AfterValidator(_check_logger), Field(json_schema_extra={"pattern": LOGGER_NAME})]
BuiltInDataset = Literal["synthetic", "voc", "coco", "own", "shards"]
BUILT_IN_DATASETS: tuple[str, ...] = get_args(BuiltInDataset)


class RunConfig(Section):
    """Where and how the run happens."""

    output: Path = Path("runs/voc_vit_b")
    """Run folder: configuration, metrics, pictures and checkpoints. A folder that holds the same run is resumed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of every random draw; the draws of a run depend on nothing else."""
    seed_per_rank: bool = True
    """Each process draws its own stream; `false`: the same draws on all of them (official code)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if there is a GPU."""
    engine: Literal["fast", "reference"] = "fast"
    """`reference` computes every step by the literal, slow form of the method (one process, `amp: off`)."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Automatic mixed precision of the network passes; losses, softmax, norms and centres stay in fp32. `auto`: bf16 on
    a GPU, off on a CPU."""
    tf32: bool = False
    """On a GPU, round the factors of fp32 products to TF32; with `amp: bf16` few products are in fp32."""
    attention: Literal["auto", "sdpa", "xformers", "varlen"] = "auto"
    """How self-attention is computed: torch's own, one call per size; xformers or torch's `varlen`, all sizes in one
    call (GPU). `auto` measures all three at the start of a training in half precision on a GPU, and a resumed run keeps
    the choice. Evaluations there use xformers; everything else uses sdpa."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the transformer's blocks. `auto`: on a GPU only; the first iterations take longer."""
    graphs: Literal["auto"] | bool = "auto"
    """On a GPU, compile all blocks of a pass as one program and replay its launches as a CUDA graph: less work for the
    host, which can be what limits a GPU with few images. Compiling takes longer, and the graphs keep memory of their
    own. Neither with `checkpointing` nor with `shard`. `auto`: where blocks are compiled and one process trains."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: less memory, a third more work with gradient."""
    shard: bool = False
    """For backbones that do not fit on one GPU: shard weights, gradients, moments and averages over the processes
    (FSDP2). Blocks are not compiled then."""
    resume: bool = True
    """Resume from the newest checkpoint of the run folder. `false` refuses a folder that holds one."""
    log_every: Count = 50
    """Iterations between two lines of metrics.jsonl."""
    picture_every: Iterations = 1000
    """Iterations between two grids of training pictures; 0: no grids."""
    checkpoint_every: Count = 1000
    """Iterations between two checkpoints; the last iteration always writes one."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, beside the best one (`best.pt`: highest seg mIoU of the evaluations)."""
    keep_every: Iterations = 0
    """Checkpoints at multiples of this iteration are kept for good; 0: none."""
    evaluate_every: Iterations = 2000
    """Iterations between two evaluations on the validation list; 0: only at the end."""
    timeout: float = Field(1800.0, ge=0.0, le=1e6)
    """Seconds without a finished iteration after which a process reports where it hangs, and ends; 0: never."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Programs that show scalars and pictures during the run: `tensorboard`, `wandb`, `mlflow`, the last two with the
    name of a project unless it is `fsr_fast`, e.g. `wandb:weeds`. Only the packages of those named are imported."""
    plugins: tuple[str, ...] = ()
    """Python modules that are imported at the start and register losses, data sets or backbones (docs/extending.md).
    They run with your permissions; those named by a checkpoint are not imported."""
    profile: bool = False
    """Write a profile of iterations 6 to 10 after the start, per process, to the run folder (`profile/`)."""

    @model_validator(mode="before")
    @classmethod
    def _project_of_wandb(cls, values: Any) -> Any:
        """Version 0.1.0 named a project of Weights & Biases with `wandb`."""
        if not isinstance(values, dict) or "wandb" not in values:
            return values
        project, rest = values["wandb"], {key: value for key, value in values.items() if key != "wandb"}
        named = isinstance(project, str) and project.lower() not in ("none", "null")
        return {"loggers": ["tensorboard", f"wandb:{project}"], **rest} if named else rest

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.shard and self.compile is True:
            raise ValueError("shard: sharded blocks cannot be compiled; give --run.shard false or --run.compile false")
        if self.graphs is True and (self.shard or self.checkpointing or self.compile is False):
            raise ValueError(
                "graphs: a CUDA graph holds compiled blocks, neither sharded nor recomputed; give --run.graphs false, "
                "or --run.shard false --run.checkpointing false --run.compile auto"
            )
        return self


class DataConfig(Section):
    """The data set."""

    dataset: BuiltInDataset | str = "voc"
    """`synthetic` is generated on first use; `voc` is any folder in VOC layout; `coco` is MS COCO 2014, from
    its own annotations or in VOC layout; `own` is a folder of pictures with a table of labels (docs/custom_data.md);
    `shards` is what `fsr-fast data pack` writes. Others come from plug-ins."""
    root: Path | str | None = None
    """Folder of the data set; for `shards` also a URL of a store (`s3://…`). `synthetic` needs none."""
    train_list: str = "train_aug"
    """Name of the training list without extension (VOC layout: in ImageSets/Segmentation), or path of a list file."""
    val_list: str | None = "val"
    """The same for the validation list; `none`: train without one, and score the image labels of the training."""
    classes: tuple[str, ...] | None = None
    """Names of all foreground classes, in the order of the mask values 1, 2, …; `none`: the names of the data set, for
    `own` those in its classes.txt."""
    subset: tuple[str, ...] | None = None
    """Train on these classes only: labels are restricted to them, pixels of all others become 255 (ignored)."""
    labels: Literal["auto", "xml", "csv", "masks"] = "auto"
    """Source of the image labels: Annotations/*.xml, labels.csv or the training masks; `auto`: the first that exists,
    but for `coco` its annotations and for `own` its tables."""
    negatives: Literal["auto"] | bool = "auto"
    """Training images that show no class: `true` trains on them as background alone (for MS COCO's own annotations,
    the images without an object join the list), `false` leaves them out; `auto` trains on them where an empty label is
    intentional (`own`, labels from masks) and refuses them elsewhere. A set of one class cannot be learned without
    them."""
    mask_values: Literal["auto", "coco91"] | dict[int | str, int | str] = "auto"
    """Meaning of the mask values, unless 0 is background, 1, 2, … the classes, 255 ignored: a class (name or number),
    `background` or `ignore` by value or colour, e.g. `{"0": background, "255": crack}` or `{"#ff0000": crack}`;
    `coco91`: MS COCO's own numbers 1 to 90. `auto` detects masks of one class drawn as 0 and 255."""
    encoding: str | None = None
    """Encoding of lists and tables, e.g. `cp1252`; `none`: UTF-8, or UTF-16 where detected."""
    separator: str | None = Field(None, min_length=1, max_length=1)
    """Character between the columns of tables; `none`: inferred from the header."""
    label_separator: Literal["auto", "space", ",", ";", "|"] = "auto"
    """Separator of the class names in a table cell; `auto`: commas, semicolons, bars or spaces."""
    allow_links: tuple[Path, ...] = ()
    """Folders into which symbolic links of the data set may lead, such as the stores of DVC, git-annex and hub caches;
    links to any other place outside the data set are refused."""
    max_pixels: int = Field(80_000_000, ge=1, le=10**12)
    """Largest number of pixels of a picture; larger ones are refused before they are decoded, since they may be crafted
    to fill the memory (four bytes per pixel)."""
    window: Window = "auto"
    """Values of pictures deeper than 8 bits that become black and white: `auto`, the lowest and the highest of the
    training pictures; `percentile LOW HIGH`, percentiles of their values; or `LOW HIGH`, one pair for all channels or
    one per channel. What a training has measured stays with its network. Pictures of 8 bits stay as they are."""
    preview_channels: tuple[Count, ...] | None = None
    """Channels, from 1, shown to people as red, green and blue, or one shown as grey; the refinement of pseudo labels
    sees the same. `none`: the first three, or the first of one or two."""
    image_size: int = Field(448, ge=32, le=4096)
    """Side of the square training views, in pixels; a multiple of the patch size."""
    workers: int = Field(4, ge=0, le=256)
    """Loader processes per rank; with DALI, also the threads that decode and augment."""
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """Decoding and augmentation: NVIDIA DALI, or Pillow and torchvision. `auto`: DALI where it runs on a GPU."""
    max_bad_fraction: Probability = 0.001
    """Largest share of the training images that may be damaged: they are skipped and listed in bad_files.txt of the
    run folder; more stop the run. One is always allowed, unless this is 0."""

    fingerprint: Literal["sizes", "contents", "off"] = "sizes"
    """What a resumed run compares of its training set with that of the checkpoint: names in order, labels and sizes of
    the files, or also their contents, which reads every file at the start. `off` accepts another one."""

    @model_validator(mode="after")
    def _whole_window(self) -> Self:
        words = self.window if self.window != "auto" else (0.0, 1.0)
        shares = words[:1] == ("percentile",)
        ends = [word for word in words[shares:] if isinstance(word, float)]
        pairs = list(zip(ends[::2], ends[1::2], strict=False))
        whole = len(ends) == len(words) - shares and len(ends) % 2 == 0 and pairs and (len(pairs) == 1 or not shares)
        if not whole or not all(low < high for low, high in pairs) or (shares and not 0 <= ends[0] < ends[1] <= 100):
            text = " ".join(map(str, words))
            raise ValueError(
                f"window: {text!r}; expected auto, percentile LOW HIGH (0 to 100), or LOW HIGH for all channels or each"
            )
        if self.preview_channels is not None and len(self.preview_channels) not in (1, 3):
            raise ValueError(f"preview_channels: {len(self.preview_channels)} channels; expected one or three")
        return self

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


class EvaluateConfig(Section):
    """Inference on the validation list."""

    scales: Scales = (1.0, 1.25, 1.5)
    """Scales of the decoder's passes."""
    flip: bool = True
    """Add the mirror image at every scale."""
    side: Literal["auto"] | Count | None = "auto"
    """Longest side, in pixels, at which pictures pass through the network; larger ones are scaled down, and their masks
    and maps brought back to the picture's size. `auto`: twice `data.image_size`, at least 512; `none`: every pixel."""
    tile: Literal["auto"] | Count | None = "auto"
    """Side, in pixels, of the tiles for pictures that are still larger after `side`; rounded up to whole patches.
    With a number, `side: auto` means every pixel. `auto`: pictures of more than 16,384 patches pass in tiles of the
    size that `side: auto` stands for; `none`: never."""
    overlap: float = Field(0.25, ge=0, le=0.75)
    """Smallest share of a tile that overlaps the next one; there the logits of both are blended."""
    threshold: Probability = 0.5
    """Background score of the pseudo labels (COCO: 0.45)."""
    protocol: Literal["own", "official"] = "own"
    """`own`: every picture at its own size, scales rounded to whole patches. `official`: as the official scripts score,
    pseudo labels on squares of data.image_size, partial patches cut off."""
    crf: bool = False
    """Also report the decoder's result after the dense CRF."""
    crf_backend: Literal["pydensecrf", "exact"] = "pydensecrf"
    """`pydensecrf` filters with a permutohedral lattice, in processes of its own; `exact` with exact Gaussians, made
    for a GPU (a CPU core takes more than a minute per photograph)."""
    crf_workers: int | None = Field(None, ge=0, le=256)
    """Processes of the CRF per rank; 0: the rank itself; `none`: one per CPU core, divided among the ranks."""
    training_limit: Count | None = 500
    """Largest number of images in an evaluation during training, spread over the list; the final one takes all."""
    limit: Count | None = None
    """Evaluate only the first images of the list."""
