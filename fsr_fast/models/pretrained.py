"""Pretrained weights of the encoder, from timm's hub or from a local file."""

import argparse
import hashlib
import logging
import re
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors.torch import load_file
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from fsr_fast.config import ModelConfig
from fsr_fast.errors import UserError
from fsr_fast.models.backbone import check_name, position_entries
from fsr_fast.models.formats import MARKS, to_timm, unwrap
from fsr_fast.plugins import BACKBONES
from fsr_fast.runtime.tensors import read_tensors

HUB_FILE = "model.safetensors"
PATIENCE = 5.0
"""Seconds within which the hub must answer."""
HEADS = re.compile(
    r"(head|head_dist|fc_norm|attn_pool|pooler|mask_token|logit_\w+|dino_head|ibot_head|local_cls_norm)\b"
)
"""Parameters after a transformer's blocks, or for its own pretraining only."""
ROWS = 8
"""Largest number of rows in a table of differences."""

logger = logging.getLogger(__name__)


class StartWeights(NamedTuple):
    """The pretrained weights that a training starts from."""

    name: str
    """Name of the backbone in timm, with the tag of the weights."""
    file: str
    """Local path, or repository and file of the hub."""
    sha256: str | None
    """SHA-256 of the file; None: it is not on this machine yet."""
    mean: tuple[float, ...]
    """Mean of the images that the network has seen, in 0…1; empty for a plug-in's backbone, which has its own."""
    std: tuple[float, ...]
    """Likewise."""

    def __str__(self) -> str:
        if not self.mean:
            return f"{self.name}, {self.file}"
        digest = self.sha256 or "not fetched yet"
        return f"{self.name}, file {self.file} (sha256 {digest}), mean {self.mean}, std {self.std}"


def describe_start(config: ModelConfig) -> StartWeights | None:
    """Describe the pretrained weights that a configuration names, without fetching them; None: it names none.

    Raises:
        UserError: timm has no such weights.
    """
    if config.pretrained == "none" or config.initial is not None:
        return None
    file, local = config.pretrained, Path(config.pretrained)
    if config.backbone in BACKBONES:
        digest = _digest(local) if local.is_file() else None
        return StartWeights(config.backbone, "of its plug-in" if file == "hub" else file, digest, (), ())
    check_name(config.backbone)
    source = _source(config)
    if config.pretrained == "hub":
        cached = try_to_load_from_cache(source.hf_hub_id, HUB_FILE) if source.hf_hub_id else None
        file, local = f"{source.hf_hub_id}/{HUB_FILE}", Path(cached if isinstance(cached, str) else "")
    digest = _digest(local) if local.is_file() else None
    architecture = config.backbone.partition(".")[0]
    name = f"{architecture}.{source.tag}" if source.tag else architecture
    return StartWeights(name, file, digest, tuple(source.mean), tuple(source.std))


def load_pretrained(vit: Any, config: ModelConfig) -> None:
    """Fill the transformer with the weights that `model.pretrained` names.

    A file for another image size determines the transformer's position grid; the encoder resizes it.

    Args:
        vit: transformer from `create_vit`; changed in place.
        config: `backbone`, `backbone_options` and `pretrained`.

    Raises:
        UserError: the hub cannot be reached, the file is missing, unreadable or of another network.
    """
    if config.pretrained == "none" or (config.pretrained == "hub" and config.backbone in BACKBONES):
        return  # random ones, or those loaded by the plug-in
    path = _fetch(config) if config.pretrained == "hub" else Path(config.pretrained)
    found = read_weights(path)
    if "top_classifier.weight" in found:
        raise UserError(f"model.pretrained: {path} is a whole network of this method: give it as model.initial")
    origin = f"model.pretrained: {path} does not hold the weights of {config.backbone}"
    _check_patches(found, vit, origin)
    weights = to_timm(_with_channels(found, config.in_chans), vit)
    if weights is None:
        raise UserError(
            f"model.pretrained: {path} is of no known format: no patch embedding among its {len(found)} tensors "
            f"({', '.join(list(found)[:3])}, …); expected a name that ends with {' or '.join(MARKS)}"
        )
    if "norm.weight" not in weights:  # trained with a norm after the average of the patches
        weights = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in weights.items()}
    _fit_positions(vit, weights)
    _compare(vit.state_dict(), weights, origin)
    vit.load_state_dict({name: weights[name] for name in vit.state_dict()})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from `.safetensors` or a `.pth` of tensors; no pickled code is run.

    Raises:
        UserError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; expected a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # releases hold their command line
                content = read_tensors(path)
    except Exception as error:  # a broken file can raise anything
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a readable weights file ({type(error).__name__}: {first_line})") from None
    weights = unwrap(content)
    if not weights:
        raise UserError(f"{path}: expected a dictionary of tensors by parameter name")
    return weights


def _source(config: ModelConfig) -> Any:
    source = timm.get_pretrained_cfg(config.backbone, allow_unregistered=True)
    if source is None or (config.pretrained == "hub" and not source.hf_hub_id):
        raise UserError(
            f"model.pretrained: timm's hub has no weights of {config.backbone}; give a file, --model.pretrained "
            f"FILE.safetensors (or .pth){f', as that of {source.url}' if source and source.url else ''}, or start "
            "from random weights, --model.pretrained none"
        )
    return source


def _fetch(config: ModelConfig) -> Path:
    """Return the path of the hub's file for a backbone; once fetched, it stays on this machine."""
    repository: str = _source(config).hf_hub_id
    known = try_to_load_from_cache(repository, HUB_FILE)
    if isinstance(known, str):
        return Path(known)
    address = hf_hub_url(repository, HUB_FILE)
    try:
        get_session().head(address, timeout=PATIENCE)  # a download would retry for half a minute
        return Path(hf_hub_download(repository, HUB_FILE))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"model.pretrained: the weights of {config.backbone} could not be fetched from the hub "
            f"({type(error).__name__}). Either fetch {address} by other means and give the file, --model.pretrained "
            "FILE.safetensors (or .pth), or start from random weights, --model.pretrained none"
        ) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_channels(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Convert the patch embedding of colours to another number of channels, as timm does."""
    return {
        name: adapt_input_conv(channels, value) if _is_of_patches(name, value) and value.shape[1] == 3 else value
        for name, value in weights.items()
    }


def _is_of_patches(name: str, value: Tensor) -> bool:
    return name.endswith(MARKS) and value.ndim == 4


def _check_patches(weights: dict[str, Tensor], vit: Any, origin: str) -> None:
    """Refuse weights for other patches before timm's filter resizes them."""
    width, channels, *sides = vit.patch_embed.proj.weight.shape
    expected = width, channels, *sides
    for name, value in weights.items():
        if _is_of_patches(name, value) and tuple(value.shape) not in (expected, (width, 3, *sides)):
            raise UserError(
                f"{origin}: {name!r} has shape {tuple(value.shape)}, expected {expected}: it is for patches of "
                f"{value.shape[-1]} pixels and width {value.shape[0]}; name the backbone that it was made for"
            )


def _fit_positions(vit: Any, weights: dict[str, Tensor]) -> None:
    """Give the transformer the grid of the file's positions."""
    leading = position_entries(vit)
    if vit.pos_embed is None or "pos_embed" not in weights or weights["pos_embed"].ndim != 3:
        return
    patches = weights["pos_embed"].shape[1] - leading
    side = isqrt(max(patches, 0))
    if side * side == patches != vit.pos_embed.shape[1] - leading:
        pixels = side * vit.patch_embed.patch_size[0]
        vit.patch_embed.set_input_size((pixels, pixels))
        vit.pos_embed = nn.Parameter(torch.empty(1, leading + patches, vit.embed_dim))


def _compare(expected: dict[str, Tensor], weights: dict[str, Tensor], origin: str) -> None:
    """Raise an error with a table if a parameter is missing, has another shape, or belongs to a surplus block."""
    rows = []
    for name in {**expected, **weights}:
        found = tuple(weights[name].shape) if name in weights else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "none"
        if found != wanted and (name in expected or name.startswith("blocks.")):
            rows.append((name, wanted, found))
    left = [name for name in weights if name not in expected and not name.startswith("blocks.")]
    unknown = [name for name in left if not HEADS.match(name)]
    if rows:
        name, wanted, found = rows[0]
        problem = "is missing" if found == "missing" else f"has shape {found}"
        table = "\n".join(f"  {name:40} expected {wanted!s:20} found {found}" for name, wanted, found in rows[:ROWS])
        more = f"\n  and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
        raise UserError(
            f"{origin}: {name!r} {problem}, expected {wanted}; name the backbone that it was made for\n{table}{more}"
        )
    if unknown:
        logger.warning("%s: unused, of no known purpose: %s", origin.partition(" does not")[0], ", ".join(unknown))
    elif left:
        logger.info("%s: unused: %s", origin.partition(" does not")[0], ", ".join(left))
