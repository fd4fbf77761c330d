"""The vision transformers of timm that the encoder can take over, by name and tag."""

import inspect
import re
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, AttentionRope, PatchEmbed
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fsr_fast.config import ModelConfig
from fsr_fast.errors import UserError, nearest
from fsr_fast.models.positions import rotary_obstacle
from fsr_fast.plugins import BACKBONES, HINT

MODULES = {"vision_transformer", "deit", "eva"}
"""timm's modules with transformers of the families below."""
DEEPEST = 1000
"""Largest number of blocks."""
PREFIX = ("cls_token", "dist_token", "reg_token")
"""Tokens in front of the patches: class, distillation (DeiT), registers (DINOv2, DINOv3)."""


def create_vit(config: ModelConfig) -> Any:
    """Build timm's transformer by name, without pretrained weights.

    Returns:
        A timm VisionTransformer or Eva; its parts are typed loosely by timm.

    Raises:
        UserError: unknown name or tag, or a transformer that the encoder cannot take over.
    """
    if config.backbone in BACKBONES:
        return _from_plugin(config)
    check_name(config.backbone)
    name = config.backbone.partition(".")[0]
    kind = Eva if is_model_in_modules(name, {"eva"}) else VisionTransformer
    known = inspect.signature(kind).parameters
    for option in config.backbone_options:
        if option not in known:  # create_model takes more than sizes, `pretrained` among them
            raise UserError(
                f"model.backbone_options: {option!r} is not an argument of {kind.__name__}{nearest(option, known)}"
            )
    depth = config.backbone_options.get("depth", 1)
    if not 1 <= depth <= DEEPEST:
        raise UserError(f"model.backbone_options: a depth of {depth} is out of range; expected 1 to {DEEPEST}")
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True, "in_chans": config.in_chans}
    options |= config.backbone_options
    if options["in_chans"] != config.in_chans:
        raise UserError("model.backbone_options: in_chans; the channels of the pictures are model.in_chans")
    distilled = "distilled" in name  # timm's class accepts no other pooling; it does not affect the weights
    try:
        vit: Any = timm.create_model(config.backbone, global_pool="token" if distilled else "", **options)
    except Exception as error:  # timm and torch raise many kinds
        raise UserError(
            f"model.backbone_options: {config.backbone} does not take {config.backbone_options}: {error}"
        ) from None
    obstacle = _obstacle(vit)
    if obstacle:
        raise UserError(
            f"model.backbone: {config.backbone} cannot be the encoder: {obstacle}; the closest that can is "
            f"{_substitute(name)!r}"
        )
    return vit


def _from_plugin(config: ModelConfig) -> Any:
    """Build the transformer of a plug-in."""
    if timm.is_model(config.backbone):
        raise UserError(f"model.backbone: {config.backbone!r} is a plug-in's and timm's; rename the plug-in's")
    vit = BACKBONES[config.backbone](pretrained=config.pretrained == "hub", **config.backbone_options)
    if obstacle := _obstacle(vit):
        raise UserError(f"model.backbone: {config.backbone}, of a plug-in, cannot be the encoder: {obstacle}")
    if not getattr(vit, "pretrained_cfg", None):
        vit.pretrained_cfg = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return vit


def keeps_prefix(vit: Any, config: ModelConfig) -> bool:
    """Decide whether the transformer's class and register tokens pass through the trunk.

    `auto` keeps them where there are registers: such a network was trained to store information about the whole image
    there, and without them would store it in patches. All others drop them, as the paper does.

    Raises:
        UserError: they are to be kept, but there are none.
    """
    if config.prefix_tokens == "keep" and not vit.num_prefix_tokens:
        raise UserError(f"model.prefix_tokens: {config.backbone} has no class or register token to keep; leave it out")
    return config.prefix_tokens == "keep" or (config.prefix_tokens == "auto" and vit.reg_token is not None)


def prefix_tokens(vit: Any) -> Tensor:
    """Return the transformer's class and register tokens as they enter its blocks, (1, P, D), positions added."""
    tokens = torch.cat([token.detach() for name in PREFIX if (token := getattr(vit, name, None)) is not None], 1)
    leading = position_entries(vit)
    return tokens + vit.pos_embed.detach()[:, :leading] if leading else tokens


def patch_positions(vit: Any) -> Tensor | None:
    """Return the transformer's position embedding with one entry in front of the patches', (1, 1 + N, D).

    That entry is the class token's, or 0 if it has none; None: the transformer has no position embedding.
    """
    if vit.pos_embed is None:
        return None
    positions, leading = vit.pos_embed.detach(), position_entries(vit)
    first = positions[:, :1] if leading else torch.zeros_like(positions[:, :1])
    return torch.cat([first, positions[:, leading:]], 1)


def position_entries(vit: Any) -> int:
    """Count the entries of the position embedding that belong to no patch."""
    return 0 if vit.pos_embed is None or vit.no_embed_class else int(vit.num_prefix_tokens)


def check_name(backbone: str) -> None:
    """Refuse a backbone that timm does not have.

    Raises:
        UserError: unknown name or tag; the message names the closest.
    """
    name, _, tag = backbone.partition(".")
    if not timm.is_model(name):
        names = [known for module in MODULES for known in timm.list_models(module=module)]
        raise UserError(
            f"model.backbone: {name!r} is not a vision transformer of timm {HINT}{nearest(name, [*names, *BACKBONES])}"
        )
    if not is_model_in_modules(name, MODULES):
        raise UserError(
            f"model.backbone: {name!r} is not a vision transformer of timm that the encoder can take over; "
            f"one that can is {_substitute(name)!r}"
        )
    tags = [known.partition(".")[2] for known in timm.list_models(f"{name}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(
            f"model.backbone: {name} has no weights {tag!r} in timm; known are: {', '.join(tags) or 'none'}"
        )


def _substitute(name: str) -> str:
    size = re.search("tiny|small|base|large", name)
    return f"vit_{size[0] if size else 'base'}_patch16_224"


def _obstacle(vit: Any) -> str | None:
    if not isinstance(vit, VisionTransformer | Eva) or not isinstance(vit.patch_embed, PatchEmbed):
        return "its patches or its blocks are of another kind"
    if not all(type(block) in (Block, EvaBlock) for block in vit.blocks):
        return "its blocks are not pre-norm attention followed by an MLP"
    for block in vit.blocks:
        attention: Any = block.attn
        if type(attention) not in (Attention, EvaAttention, AttentionRope) or attention.gate is not None:
            return "its attention is gated or of another kind"
        if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
            return "its heads share keys and values"
    if not isinstance(vit.norm, nn.LayerNorm) or not isinstance(vit.patch_embed.norm, nn.Identity):
        return "it has no LayerNorm after its blocks, or a norm of its patches"
    if vit.patch_embed.patch_size[0] != vit.patch_embed.patch_size[1]:
        return "its patches are not square"
    if any(getattr(part, "p", getattr(part, "drop_prob", 0)) for part in vit.modules()):
        return "it has dropout or stochastic depth of its own; use model.stochastic_depth"
    if getattr(vit, "rope", None) is not None:
        return rotary_obstacle(vit.rope)
    return None
