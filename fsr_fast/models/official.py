"""Official checkpoints: `student.pth` and `teacher.pth` of the official code, plain state dicts of the whole network.

Such a file only holds tensors. The rest is taken from the official code: attention heads of width 64, norms with
ε = 1e-6, the auxiliary feature map from the third block from the end, images normalised by ImageNet's mean and
standard deviation, and no mask in the aggregator. Parameters have the same names here and there.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import Attention
from torch import Tensor

from fsr_fast.config import ModelConfig
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.errors import UserError
from fsr_fast.models.network import Network
from fsr_fast.runtime.tensors import read_tensors

HEAD_WIDTH = 64
LARGEST_WIDTH = 1024
"""Up to this width D, ViT-L's, plain transformers have D / 64 heads."""
AUX_BLOCK = -3
EPSILON = 1e-6

_BLOCK = r"(norm[12]|attn\.{}|mlp\.fc[12])"
_NAMES = re.compile(
    r"encoder\.(cls_token|pos_embed|mask_token)"
    r"|encoder\.(patch_embed\.proj|norm)\.(weight|bias)"
    rf"|encoder\.blocks\.\d+\.{_BLOCK.format('(qkv|proj)')}\.(weight|bias)"
    rf"|encoder\.cls_blocks\.\d+\.{_BLOCK.format('(q|k|v|proj)')}\.(weight|bias)"
    r"|decoder\.conv[678]\.weight"
    r"|projector\.mlp\.[024]\.(weight|bias)|projector\.last_layer\.weight_[gv]"
    r"|(top|aux)_classifier\.weight"
)
_MARKS = ("encoder.patch_embed.proj.weight", "top_classifier.weight")


class Normalisation(NamedTuple):
    """What is subtracted from images in 0…1, and what they are divided by, one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class OfficialSizes(NamedTuple):
    """Sizes of the network of an official checkpoint."""

    model: ModelConfig
    classes: int
    """Number C of foreground classes."""
    image_size: int
    """Side of the training views, in pixels."""


def read_official(path: Path) -> dict[str, Tensor] | None:
    """Read a file, if it is an official checkpoint. No pickled code is run.

    Args:
        path: any file or folder.

    Returns:
        Its tensors by name; None if it is anything other than tensors by name, or cannot be read at all.

    Raises:
        UserError: tensors by name, but of another network.
    """
    try:
        content = read_tensors(path, mmap=True)
    except Exception:  # not for this reader; the reader of a run's checkpoints says what is wrong
        return None
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    missing = [name for name in _MARKS if name not in content]
    if missing:
        raise UserError(
            f"{path}: tensors by name, but not of this method's network: {missing[0]!r} is missing; expected a run, "
            "its checkpoint, or an official student.pth or teacher.pth"
        )
    return content


def official_sizes(weights: dict[str, Tensor], origin: str) -> OfficialSizes:
    """Infer the sizes of the network from its tensors.

    Args:
        weights: from `read_official`.
        origin: the file, for messages.

    Raises:
        UserError: a tensor that determines a size is missing or has another number of axes, or no network has the size.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != axes:
            found = f"has shape {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise UserError(f"{origin}: not a whole official checkpoint: {name!r} {found}, expected {axes} axes")
        return tuple(weights[name].shape)

    width, _, patch_size, _ = shape("encoder.patch_embed.proj.weight", 4)
    patches = shape("encoder.pos_embed", 3)[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(f"{origin}: 'encoder.pos_embed' is for {patches} patches, expected a square grid")
    if width % HEAD_WIDTH or width > LARGEST_WIDTH:
        raise UserError(
            f"{origin}: width {width} does not determine the number of attention heads; expected a multiple of "
            f"{HEAD_WIDTH} up to {LARGEST_WIDTH}, whose heads have width {HEAD_WIDTH}"
        )
    prototypes, bottleneck = shape("projector.last_layer.weight_v", 2)
    model = ModelConfig(
        backbone="vit_base_patch16_224",
        backbone_options={
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": _count(weights, "blocks"),
            "num_heads": width // HEAD_WIDTH,
            "mlp_ratio": shape("encoder.blocks.0.mlp.fc1.weight", 2)[0] / width,
            "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in weights,
        },
        pretrained="none",
        normalisation="imagenet",
        aux_block=AUX_BLOCK,
        aggregator_blocks=_count(weights, "cls_blocks"),
        mask_mode="none",
        decoder_width=shape("decoder.conv6.weight", 4)[0],
        projector_hidden=shape("projector.mlp.0.weight", 2)[0],
        bottleneck=bottleneck,
        prototypes=prototypes,
    )
    return OfficialSizes(model, shape("top_classifier.weight", 4)[0], side * patch_size)


def class_names(count: int) -> tuple[str, ...]:
    """Return names for the classes of a checkpoint without names: PASCAL VOC's (20), MS COCO's (80), or numbers."""
    known = {len(names): names for names in (VOC_CLASSES, COCO_CLASSES)}
    return known.get(count) or tuple(f"class_{number}" for number in range(1, count + 1))


def fill_network(network: Network, weights: dict[str, Tensor], origin: str) -> None:
    """Load all weights, none missing and none left over.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    expected = network.state_dict()
    for name in {**expected, **weights}:
        if name not in expected:
            raise UserError(
                f"{origin}: {name!r} does not belong to an official checkpoint; expected that of a plain ViT"
            )
        found = tuple(weights[name].shape) if name in weights else None
        if found != tuple(expected[name].shape):
            problem = "is missing" if found is None else f"has shape {found}"
            raise UserError(
                f"{origin}: {name!r} {problem}, expected {tuple(expected[name].shape)}; the file is damaged"
            )
    network.load_state_dict(weights)


def official_state_dict(network: Network) -> dict[str, Tensor]:
    """Return the weights in the form of an official checkpoint.

    The patch embedding is rewritten for ImageNet's normalisation if the network has another one.

    Args:
        network: student or teacher.

    Returns:
        Tensors by name, on the CPU; copies.

    Raises:
        UserError: the network has parts or sizes for which an official checkpoint has no place.
    """
    weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    encoder = network.encoder
    foreign = [name for name in weights if not _NAMES.fullmatch(name)]
    if foreign or encoder.aggregation != "mca":
        part = foreign[0] if foreign else f"model.aggregation {encoder.aggregation!r}"
        raise UserError(f"an official checkpoint has no place for {part}; expected a plain ViT with aggregator")
    if network.config.in_chans != 3:
        raise UserError(
            f"an official checkpoint is for three colours; this network takes {network.config.in_chans} channels"
        )
    own = {
        "attention heads": count_heads(network),
        "auxiliary block": encoder.aux_block,
        "epsilon of the norms": encoder.norm.eps,
        "activation": type(encoder.blocks[0].mlp.act).__name__,
    }
    read = {
        "attention heads": encoder.width / HEAD_WIDTH,
        "auxiliary block": AUX_BLOCK % encoder.depth,
        "epsilon of the norms": EPSILON,
        "activation": "GELU",
    }
    for name, value in own.items():
        if value != read[name]:
            raise UserError(
                f"an official checkpoint does not say the {name}: here {value}, but its readers take {read[name]}"
            )
    renormalise_patches(weights, Normalisation(network.mean, network.std), IMAGENET, "an official checkpoint")
    return weights


def renormalise_patches(weights: dict[str, Tensor], source: Normalisation, target: Normalisation, what: str) -> None:
    """Rewrite the patch embedding of a network's weights for another normalisation, in place.

    Raises:
        UserError: it has no bias, as in CLIP, and so cannot be rewritten.
    """
    weight, bias = (f"encoder.patch_embed.proj.{kind}" for kind in ("weight", "bias"))
    if source == target:
        return
    if bias not in weights:
        raise UserError(f"{what}: another normalisation, but the patch embedding has no bias to compensate for it")
    weights[weight], weights[bias] = renormalise(weights[weight], weights[bias], source, target)


def renormalise(weight: Tensor, bias: Tensor, source: Normalisation, target: Normalisation) -> tuple[Tensor, Tensor]:
    """Rewrite a patch embedding for another normalisation; its result stays the same.

    Args:
        weight: (D, channels, p, p).
        bias: (D,).
        source: of the images that the embedding was made for.
        target: of the images that it will see.

    Returns:
        Weight and bias; unchanged if the two are equal.
    """
    if source == target:
        return weight, bias
    (mean, std), (new_mean, new_std) = (
        [torch.tensor(values, dtype=torch.float64, device=weight.device).view(-1, 1, 1) for values in pair]
        for pair in (source, target)
    )
    exact = weight.double()
    shift = (exact * ((new_mean - mean) / std)).sum((1, 2, 3))
    return (exact * (new_std / std)).to(weight.dtype), (bias.double() + shift).to(bias.dtype)


def count_heads(network: Network) -> int:
    """Number of attention heads of the encoder."""
    attention = network.encoder.blocks[0].attn
    assert isinstance(attention, Attention)
    return attention.num_heads


def _count(weights: dict[str, Tensor], part: str) -> int:
    found = (re.match(rf"encoder\.{part}\.(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in found if match), default=0)
