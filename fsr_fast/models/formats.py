"""Weights of a vision transformer in the formats people have, recognised by their keys and renamed as in timm.

Supported are timm's own files (those of the official code among them), the original releases of DINO, DINOv2, DINOv3,
MAE, DeiT and EVA-02, OpenAI's and OpenCLIP's CLIP, and the `transformers` package's ViT, DINOv2 (with or without
registers), DINOv3, CLIP and SigLIP. Where timm has a filter for a release, the filter does the work.
"""

import re
from typing import Any

import torch
from timm.models import eva, vision_transformer
from torch import Tensor

from fsr_fast.errors import UserError

WRAPPERS = ("teacher", "model_ema", "state_dict", "model", "module")
"""Keys under which training files hold the weights; averaged ones first."""
_TIMM, _OPENAI = "patch_embed.proj.weight", "conv1.weight"
_TRANSFORMERS = tuple(
    f"embeddings.{name}.weight" for name in ("patch_embeddings.projection", "patch_embeddings", "patch_embedding")
)
MARKS = (_TIMM, *_TRANSFORMERS, _OPENAI)
"""Names of the patch embedding; whatever prefix they have, all names have."""

_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
        (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
        (r"^embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
        (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.(attention|self_attn)\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\3."),
        (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
        (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
        (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
    )
)
"""From the names of `transformers` to those of the original releases."""


def unwrap(content: Any) -> dict[str, Tensor] | None:
    """Find the tensors by name in the content of a file; None: there are none."""
    while isinstance(content, dict) and not (content and all(isinstance(value, Tensor) for value in content.values())):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return None
        content = inner
    return content if isinstance(content, dict) else None


def to_timm(weights: dict[str, Tensor], vit: Any) -> dict[str, Tensor] | None:
    """Rename weights to timm's names.

    Args:
        weights: tensors by name, in any of the known formats.
        vit: the transformer that they are meant for.

    Returns:
        Tensors by timm's names, with their shapes in the file; None: of no known format.
    """
    found = [(name, mark) for mark in MARKS for name in weights if name == mark or name.endswith(f".{mark}")]
    if not found:
        return None
    name, mark = min(found, key=lambda pair: ("teacher" not in pair[0], MARKS.index(pair[1]), len(pair[0])))
    before = name.removesuffix(mark)
    own = {key.removeprefix(before): value for key, value in weights.items() if key.startswith(before)}
    if mark == _OPENAI:
        own = {f"visual.{key}": value for key, value in own.items()}
    elif mark != _TIMM:
        own = _from_transformers(own, packed=not hasattr(vit.blocks[0].mlp, "fc1_g"))
    return _filter(_prepare(own, vit), vit)


def _from_transformers(weights: dict[str, Tensor], *, packed: bool) -> dict[str, Tensor]:
    """Rename, and join queries, keys and values; `packed`: gate and value of a SwiGLU, too."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    gated = any(".mlp.gate_proj." in name for name in weights)
    for name, value in weights.items():
        if gated:  # gate, value, and output projection
            for theirs, original in (("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3")):
                name = name.replace(f".mlp.{theirs}.", f".mlp.{original}.")
        for pattern, new in _RENAMES:
            name = pattern.sub(new, name)
        match = re.fullmatch(r"(blocks\.\d+)\.(attn\.([qkv])|mlp\.w([12]))\.(weight|bias)", name)
        if match and (match[3] or packed):
            joint = "attn.qkv" if match[3] else "mlp.w12"
            parts.setdefault(f"{match[1]}.{joint}.{match[5]}", {})[match[3] or match[4]] = value
        else:
            renamed[name] = value
    for name, one in parts.items():
        like = next(iter(one.values()))  # DINOv3's keys have no bias
        renamed[name] = torch.cat(
            [one.get(part, torch.zeros_like(like)) for part in ("qkv" if "attn" in name else "12")]
        )
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    return renamed


def _prepare(weights: dict[str, Tensor], vit: Any) -> dict[str, Tensor]:
    """Provide what timm's filters expect of the original releases."""
    weights = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in weights.items()}
    if "register_tokens" in weights and isinstance(vit, eva.Eva):
        weights["storage_tokens"] = weights.pop("register_tokens")
    if "register_tokens" in weights or (not isinstance(vit, eva.Eva) and any(".mlp.w12." in name for name in weights)):
        weights.setdefault("mask_token", torch.zeros(1))  # by which the filter recognises DINOv2
    if "storage_tokens" in weights and getattr(vit.blocks[0].attn, "q_bias", None) is None:
        biases = [name for name in weights if name.endswith(".qkv.bias")]
        if any(weights[name].any() for name in biases):  # timm's filter would drop them
            raise UserError(
                "model.pretrained: these weights of DINOv3 have biases of queries and values; the backbone's name in "
                "timm ends with '_qkvb' then"
            )
        weights = {name: value for name, value in weights.items() if name not in biases}
    return weights


def _filter(weights: dict[str, Tensor], vit: Any) -> dict[str, Tensor]:
    """Apply timm's filter, but leave positions as they are: the encoder resizes them once."""
    positions, vit.pos_embed = vit.pos_embed, None
    try:
        if isinstance(vit, eva.Eva):
            return dict(eva.checkpoint_filter_fn(weights, vit))
        return dict(vision_transformer.checkpoint_filter_fn(weights, vit, adapt_layer_scale=True))
    finally:
        vit.pos_embed = positions
