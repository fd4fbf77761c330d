"""A small official checkpoint, its tensors listed one by one as the official code names and shapes them."""

from pathlib import Path

import torch
from torch import Tensor

DEPTH, WIDTH, PATCH, SIDE, PROTOTYPES = 4, 64, 8, 4, 16
IMAGE_SIZE = SIDE * PATCH
MODEL = {
    "backbone_options": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 1},
    "projector_hidden": 24,
    "bottleneck": 12,
}
"""The tiny recipe's network with the sizes of the checkpoint."""


def official_weights(*, classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a network with two aggregator blocks, none constant except the gains."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, WIDTH),
        "encoder.pos_embed": (1, 1 + SIDE**2, WIDTH),
        "encoder.mask_token": (1, WIDTH),
        "encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "encoder.patch_embed.proj.bias": (WIDTH,),
    }
    for index in range(DEPTH):
        shapes |= _linear(f"encoder.blocks.{index}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= _rest_of_block(f"encoder.blocks.{index}")
    for index in range(2):
        for part in ("q", "k", "v"):
            shapes |= _linear(f"encoder.cls_blocks.{index}.attn.{part}", WIDTH, WIDTH)
        shapes |= _rest_of_block(f"encoder.cls_blocks.{index}")
    shapes |= {
        "encoder.norm.weight": (WIDTH,),
        "encoder.norm.bias": (WIDTH,),
        "decoder.conv6.weight": (8, WIDTH, 3, 3),
        "decoder.conv7.weight": (8, 8, 3, 3),
        "decoder.conv8.weight": (classes + 1, 8, 1, 1),
        **_linear("projector.mlp.0", WIDTH, 24),
        **_linear("projector.mlp.2", 24, 24),
        **_linear("projector.mlp.4", 24, 12),
        "projector.last_layer.weight_g": (PROTOTYPES, 1),
        "projector.last_layer.weight_v": (PROTOTYPES, 12),
        "top_classifier.weight": (classes, WIDTH, 1, 1),
        "aux_classifier.weight": (classes, WIDTH, 1, 1),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {name: 1 + value for name, value in weights.items() if "norm" in name and name.endswith("weight")}
    weights["projector.last_layer.weight_g"] = torch.ones(PROTOTYPES, 1)
    return weights


def write_official(path: Path, **options: int) -> Path:
    """Write the checkpoint and return its path."""
    torch.save(official_weights(**options), path)
    return path


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _rest_of_block(name: str) -> dict[str, tuple[int, ...]]:
    norms = {f"{name}.{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {
        **norms,
        **_linear(f"{name}.attn.proj", WIDTH, WIDTH),
        **_linear(f"{name}.mlp.fc1", WIDTH, 4 * WIDTH),
        **_linear(f"{name}.mlp.fc2", 4 * WIDTH, WIDTH),
    }
