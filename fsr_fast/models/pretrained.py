"""Pretrained weights of the encoder, from timm's hub or from a local file."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from fsr_fast.config import ModelConfig
from fsr_fast.errors import UserError
from fsr_fast.models.encoder import resize_position_embedding


def load_pretrained(vit: Any, config: ModelConfig) -> None:
    """Fill the transformer with the weights that `model.pretrained` names.

    The position embedding of a file made for another image size is resized bicubically.

    Args:
        vit: transformer as `create_vit` gives it; changed in place.
        config: `backbone`, `backbone_options` and `pretrained`.

    Raises:
        UserError: the hub cannot be reached, the file is missing, unreadable or of another network.
    """
    if config.pretrained == "none":
        return
    origin = "the hub" if config.pretrained == "hub" else config.pretrained
    weights = _from_hub(config) if config.pretrained == "hub" else read_weights(Path(config.pretrained))
    expected = vit.state_dict()
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if "pos_embed" in weights:
        weights["pos_embed"] = _fit_position_embedding(weights["pos_embed"], vit)
    missing = [name for name in expected if name not in weights]
    other = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    if missing or other:
        name = (missing or other)[0]
        found = "is missing" if missing else f"has shape {tuple(weights[name].shape)}"
        whole = "encoder.patch_embed.proj.weight" in weights
        remedy = (
            "it is a whole network: give it as model.initial" if whole else "name the backbone that it was made for"
        )
        raise UserError(
            f"model.pretrained: {origin} does not hold the weights of {config.backbone}: {name!r} {found}, "
            f"expected {tuple(expected[name].shape)}; {remedy}"
        )
    vit.load_state_dict({name: weights[name] for name in expected})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict from `.safetensors` or a `.pth` of tensors; no pickled code is run.

    Raises:
        UserError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; expected a .safetensors or .pth file")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a broken file raises whatever its bytes happen to mean
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable weights file ({type(error).__name__}: {first_line})") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected a dictionary of tensors by parameter name")
    return content


def _from_hub(config: ModelConfig) -> dict[str, Tensor]:
    options: dict[str, Any] = dict(config.backbone_options)
    try:
        vit = timm.create_model(config.backbone, pretrained=True, num_classes=0, global_pool="token", **options)
    except Exception as error:  # timm and its hub client raise many kinds
        raise UserError(
            f"model.pretrained: the weights of {config.backbone} could not be fetched from the hub "
            f"({type(error).__name__}). Either give a local file, --model.pretrained FILE.safetensors (or .pth), "
            "or start from random weights, --model.pretrained none"
        ) from None
    return vit.state_dict()


def _fit_position_embedding(embedding: Tensor, vit: Any) -> Tensor:
    side = round((embedding.shape[1] - 1) ** 0.5)
    if embedding.ndim != 3 or side * side != embedding.shape[1] - 1:
        return embedding
    return resize_position_embedding(embedding, (side, side), vit.patch_embed.grid_size)
