"""The whole network as functions of a flat state dict with the official checkpoint's keys (paper, Figure 2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block import PLAIN, State, Trunk, layer_norm, linear
from .cam import class_activation_map
from .checks import require_shape
from .encoder import aggregate, embed_patches, forward_trunk, pool_unmasked


class NetworkOutput(NamedTuple):
    """Everything that the method reads from one pass of the network."""

    trunk_tokens: Tensor
    """(B, N, D), raw output of the trunk's last block."""
    patch_tokens: Tensor
    """(B, N, D), the same after the final norm."""
    class_token: Tensor
    """(B, D), the aggregator's class token after the final norm, or the pooled patch tokens."""
    patch_features: Tensor
    """(B, D, h, w), patch_tokens as the top feature map."""
    aux_features: Tensor
    """(B, D, h, w), output of the aux block, not normed."""
    class_logits: Tensor
    """(B, C), classifier on patch_features."""
    aux_class_logits: Tensor
    """(B, C), aux classifier on aux_features."""
    seg_logits: Tensor
    """(B, C + 1, h, w), the decoder's output."""
    cam: Tensor
    """(B, C, h, w), class activation maps of the top features, no gradient."""
    aux_cam: Tensor
    """(B, C, h, w), class activation maps of the aux features, no gradient."""


def decode(state: State, features: Tensor) -> Tensor:
    """Predict segmentation logits by two dilated convolutions and a projection.

    Args:
        state: flat state dict.
        features: (B, D, h, w) floating, top feature map.

    Returns:
        (B, C + 1, h, w).

    Source: official code, DeepLab-LargeFOV decoder.
    """
    hidden = torch.relu(F.conv2d(features, state["decoder.conv6.weight"], padding=5, dilation=5))
    hidden = torch.relu(F.conv2d(hidden, state["decoder.conv7.weight"], padding=5, dilation=5))
    return F.conv2d(hidden, state["decoder.conv8.weight"])


def classify(features: Tensor, weight: Tensor) -> Tensor:
    """Score classes by the projection of the features' global maximum.

    Args:
        features: (B, D, h, w) floating.
        weight: (C, D) floating.

    Returns:
        (B, C) logits.

    Source: official code, classifier.
    """
    return features.flatten(2).max(dim=2).values @ weight.T


def project(state: State, tokens: Tensor) -> Tensor:
    """Pass tokens through the projector up to its bottleneck.

    Args:
        state: flat state dict.
        tokens: (..., D) floating, after the encoder's final norm.

    Returns:
        (..., E), L2-normalised.

    Source: official code, projector.
    """
    hidden = F.gelu(linear(state, "projector.mlp.0", tokens))
    hidden = F.gelu(linear(state, "projector.mlp.2", hidden))
    return F.normalize(linear(state, "projector.mlp.4", hidden), dim=-1)


def prototype_logits(state: State, bottleneck: Tensor) -> Tensor:
    """Compare bottleneck vectors with every prototype: the weight-normalised last layer, its gain fixed to 1.

    Args:
        state: flat state dict.
        bottleneck: (..., E) floating, L2-normalised.

    Returns:
        (..., K) cosine similarities.

    Source: official code, projector.
    """
    direction = state["projector.last_layer.weight_v"]
    return bottleneck @ (direction / direction.norm(dim=1, keepdim=True)).T


def forward_network(
    state: State,
    images: Tensor,
    *,
    heads: int,
    patch_size: int,
    mask: Tensor | None = None,
    drop_path: Tensor | None = None,
    mask_mode: str = "exclude",
    aggregation: str = "mca",
    aux_block: int = -3,
    trunk: Trunk = PLAIN,
) -> NetworkOutput:
    """Run encoder, aggregator, classifiers and decoder on one view of each image.

    Args:
        state: flat state dict with the official checkpoint's keys.
        images: (B, 3, H, W) floating, normalised.
        heads: number of attention heads.
        patch_size: side of a patch, in pixels.
        mask: (B, N) bool, True = masked, or None for an unmasked view.
        drop_path: (depth, 2, B), stochastic-depth factors, see forward_trunk; None keeps all branches.
        mask_mode: how the aggregator treats masked patches: "exclude", "multiply" or "none".
        aggregation: where the class token comes from: "mca" (the aggregator), "gap" or "gmp" (see pool_unmasked).
        aux_block: the block whose output is the aux feature map, see forward_trunk.
        trunk: what the state does not determine.

    Returns:
        The named outputs; the projector is applied to them by `project`.

    Raises:
        ValueError: if a shape does not fit.

    Source: paper, Figure 2.
    """
    require_shape("images", images, "B", 3, "H", "W")
    tokens, grid = embed_patches(state, images, patch_size, mask)
    passed = forward_trunk(state, tokens, heads, drop_path, aux_block, trunk, grid)
    trunk_tokens, aux_tokens = (one[:, -grid[0] * grid[1] :] for one in passed)  # without class and register tokens
    if aggregation == "mca":
        class_token = aggregate(state, trunk_tokens, heads, mask, mask_mode, trunk.eps)
        # one final norm over [class token; patch tokens]
        normed = layer_norm(state, "encoder.norm", torch.cat([class_token[:, None], trunk_tokens], dim=1), trunk.eps)
        class_token, patch_tokens = normed[:, 0], normed[:, 1:]
    else:
        patch_tokens = layer_norm(state, "encoder.norm", trunk_tokens, trunk.eps)
        class_token = pool_unmasked(patch_tokens, mask, aggregation)
    patch_features = patch_tokens.transpose(1, 2).unflatten(2, grid)
    aux_features = aux_tokens.transpose(1, 2).unflatten(2, grid)
    weight, aux_weight = state["top_classifier.weight"][:, :, 0, 0], state["aux_classifier.weight"][:, :, 0, 0]
    with torch.no_grad():
        cam = class_activation_map(patch_features, weight)
        aux_cam = class_activation_map(aux_features, aux_weight)
    return NetworkOutput(
        trunk_tokens=trunk_tokens,
        patch_tokens=patch_tokens,
        class_token=class_token,
        patch_features=patch_features,
        aux_features=aux_features,
        class_logits=classify(patch_features, weight),
        aux_class_logits=classify(aux_features, aux_weight),
        seg_logits=decode(state, patch_features),
        cam=cam,
        aux_cam=aux_cam,
    )


class MultiScaleCams(NamedTuple):
    """Class activation maps of several scales, one entry per scale, for merge_cams."""

    cams: list[Tensor]
    """(B, C, h_s, w_s), top features."""
    flipped: list[Tensor]
    """(B, C, h_s, w_s), top features of the mirrored image, still mirrored."""
    aux_cams: list[Tensor]
    """(B, C, h_s, w_s), aux features."""
    aux_flipped: list[Tensor]
    """(B, C, h_s, w_s), aux features of the mirrored image, still mirrored."""


@torch.no_grad()
def multi_scale_cams(
    state: State,
    images: Tensor,
    *,
    heads: int,
    patch_size: int,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    drop_path: Sequence[Tensor] | None = None,
    aggregation: str = "mca",
    aux_block: int = -3,
    trunk: Trunk = PLAIN,
) -> MultiScaleCams:
    """Compute class activation maps at every scale of the image and of its mirror image.

    Args:
        state: flat state dict with the official checkpoint's keys.
        images: (B, 3, H, W) floating, normalised.
        heads: number of attention heads.
        patch_size: side of a patch, in pixels.
        scales: of the images' sides; a scaled side is rounded to whole patches, at least one. (The official code cuts
            off partial patches; at its 448 pixels there are none.)
        drop_path: one entry per scale, (depth, 2, 2B) stochastic-depth factors of the B images and then of their mirror
            images; None keeps all branches.
        aggregation: see forward_network.
        aux_block: see forward_trunk.

    Returns:
        The maps, not yet normalised.

    Raises:
        ValueError: if a shape does not fit.

    Source: official code, multi-scale class activation maps.
    """
    require_shape("images", images, "B", 3, "H", "W")
    result = MultiScaleCams([], [], [], [])
    for s, scale in enumerate(scales):
        size = [max(1, round(side * scale / patch_size)) * patch_size for side in images.shape[2:]]
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        both = torch.cat([resized, resized.flip(3)])
        output = forward_network(
            state,
            both,
            heads=heads,
            patch_size=patch_size,
            drop_path=drop_path[s] if drop_path else None,
            aggregation=aggregation,
            aux_block=aux_block,
            trunk=trunk,
        )
        for maps, original, mirrored in (
            (output.cam, result.cams, result.flipped),
            (output.aux_cam, result.aux_cams, result.aux_flipped),
        ):
            original.append(maps[: len(images)])
            mirrored.append(maps[len(images) :])
    return result
