"""One small transformer per family that the encoder takes over."""

from typing import Any

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

FAMILIES = {
    "plain": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "DINO": "vit_small_patch16_224.dino",
    "MAE": "vit_base_patch16_224.mae",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-3": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DINOv2, giant": "vit_giant_patch14_dinov2.lvd142m",
    "DINOv3": "vit_small_patch16_dinov3.lvd1689m",
    "DINOv3, biases": "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "DINOv3, gated": "vit_small_plus_patch16_dinov3.lvd1689m",
    "EVA-02": "eva02_tiny_patch14_224.mim_in22k",
    "EVA-02, three projections": "eva02_base_patch14_224.mim_in22k",
    "EVA-02, CLIP": "eva02_base_patch16_clip_224.merged2b",
    "CLIP": "vit_base_patch16_clip_224.laion2b",
    "CLIP, QuickGELU": "vit_base_patch16_clip_quickgelu_224.openai",
    "SigLIP": "vit_base_patch16_siglip_224.webli",
}
"""Name and tag of timm by family."""
WITHOUT_PREFIX = {"SigLIP"}
"""Families that have neither class nor register token."""
WITH_REGISTERS = {"DINOv2, registers", "DINOv3", "DINOv3, biases", "DINOv3, gated"}


def model_values(family: str, **options: Any) -> dict[str, Any]:
    """Return the `model` section of a small transformer of a family."""
    return {"backbone": FAMILIES[family], "backbone_options": {**SMALL, **options}}
