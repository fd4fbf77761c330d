"""Class activation maps: multi-scale passes and the labels read off them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.kernels import MergedCams, merge_cams
from fsr_fast.models.encoder import Encoder, Features
from fsr_fast.models.network import Network, to_map


class ScalePass(NamedTuple):
    """Features of images at one scale and of their mirror images."""

    plain: Features
    mirrored: Features


def multi_scale_passes(
    encoder: Encoder,
    images: Tensor,
    scales: Sequence[float],
    *,
    first: Features | None = None,
    drop_path: Sequence[Tensor] | None = None,
    aux_only: bool = False,
    float8: bool = False,
) -> list[ScalePass]:
    """Pass images and their mirror images through the trunk at every scale, all scales as one sequence.

    Args:
        encoder: the trunk.
        images: (B, 3, H, W), normalised.
        scales: the first is 1.0.
        first: features of the images at scale 1.0, where already known.
        drop_path: stochastic depth of each scale's images, (depth, 2, 2B): images first, then mirror images.
        aux_only: stop after the auxiliary block.
        float8: round the factors of the blocks' linear layers to float8.

    Returns:
        One pair of features per scale. Source: paper, implementation details.
    """
    views = scaled_views(images, scales, encoder.patch_size, known=first is not None)
    factors = torch.cat(list(drop_path), dim=-1) if drop_path else None
    return pair_mirrored(encoder.forward_packed(views, factors, aux_only=aux_only, float8=float8), first)


def scaled_views(images: Tensor, scales: Sequence[float], patch_size: int, *, known: bool = False) -> list[Tensor]:
    """Resize images to every scale and add their mirror images.

    Args:
        images: (B, 3, H, W), normalised.
        scales: the first is 1.0.
        patch_size: pixels.
        known: leave out the images at the first scale, whose features are known.

    Returns:
        One (2B, 3, h, w) per scale, images first; (B, 3, h, w) at the first scale without the `known` images.
    """
    size = (images.shape[-2], images.shape[-1])
    scaled = [resize_images(images, scaled_size(size, scale, patch_size)) for scale in scales]
    whole = [torch.cat([one, one.flip(-1)]) for one in scaled[known:]]
    return [scaled[0].flip(-1), *whole] if known else whole


def pair_mirrored(features: Sequence[Features], first: Features | None = None) -> list[ScalePass]:
    """Split the features of `scaled_views` into those of images and of mirror images.

    Args:
        features: of each scale.
        first: features of the images at the first scale, if they were known.
    """
    if first is None:
        return [ScalePass(*split_batch(one)) for one in features]
    return [ScalePass(first, features[0]), *pair_mirrored(features[1:])]


def split_batch(features: Features) -> tuple[Features, Features]:
    """Split the features of 2B images into those of the first and of the second B."""
    first, second = zip(features.tokens.chunk(2), features.aux.chunk(2), strict=True)
    return features._replace(tokens=first[0], aux=first[1]), features._replace(tokens=second[0], aux=second[1])


def merge_passes(
    network: Network,
    passes: Sequence[ScalePass],
    labels: Tensor,
    *,
    classifier: Literal["top", "aux"],
    max_classes: int,
    size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
) -> MergedCams:
    """Turn the passes of all scales into normalised CAMs of the present classes.

    Args:
        network: whose classifier reads the features.
        passes: from `multi_scale_passes`.
        labels: (B, C), 0 or 1.
        classifier: which of the two classifiers, on which of the two feature maps.
        max_classes: M, at least the largest number of classes that an image has.
        size: H and W at which the maps are summed and normalised.
        output_size: size to which they are resized after that; None: `size`.

    Returns:
        Values (B, M, *output_size), float32 in 0…1. Source: paper, CAM; official code for the merging.
    """

    top = classifier == "top"
    all_features = [features for scale_pass in passes for features in scale_pass]  # plain, mirrored, plain, …
    maps = [features.tokens if top else features.aux for features in all_features]  # (B, N, D) each
    tokens = torch.cat([one.flatten(0, 1) for one in maps])  # one launch of each operator for all passes
    tokens = network.encoder.norm(tokens) if top else tokens
    weight = (network.top_classifier if top else network.aux_classifier).weight
    parts = F.linear(tokens, weight.flatten(1)).split([one.shape[0] * one.shape[1] for one in maps])
    cams = [
        to_map(part.unflatten(0, features.tokens.shape[:2]), features.grid)
        for part, features in zip(parts, all_features, strict=True)
    ]
    return merge_cams(cams[::2], cams[1::2], labels, max_classes=max_classes, size=size, output_size=output_size)


def normalise_cam(activation: Tensor) -> Tensor:
    """ReLU and min-max per image and class.

    Args:
        activation: (B, C, h, w), class activations before ReLU.

    Returns:
        (B, C, h, w), float32 in 0…1. Source: paper, Eq. 2.
    """
    cam = F.relu(activation.float())
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)


def scaled_size(size: tuple[int, int], scale: float, patch_size: int) -> tuple[int, int]:
    """Size of an image at a scale, rounded to whole patches.

    Args:
        size: height and width in pixels.
        scale: factor.
        patch_size: pixels.

    Returns:
        Height and width in pixels, multiples of the patch size and at least one patch.
    """
    height, width = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return height, width


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, 3, H, W) bilinearly to (B, 3, *size). Source: official code, CAM inference."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def merged_labels(cams: MergedCams, *, high: float, low: float, ignore_index: int = 255) -> Tensor:
    """Label every pixel by its strongest class where the activation is certain.

    Args:
        cams: normalised CAMs of the present classes, values (B, M, h, w).
        high: activation above which the class counts.
        low: activation up to which the pixel is background; between the two it is ignored.
        ignore_index: label of ignored pixels.

    Returns:
        (B, h, w), int64: 0 background, class + 1, or `ignore_index`. Source: paper, affinity loss; official code.
    """
    value, slot = cams.values.max(1)
    label = torch.gather(cams.classes, 1, slot.flatten(1)).view_as(slot) + 1
    return label.masked_fill_(value <= high, ignore_index).masked_fill_(value <= low, 0)


def dense_cams(cams: MergedCams, classes: int) -> Tensor:
    """Spread the CAMs of the present classes over all classes.

    Args:
        cams: values (B, M, H, W).
        classes: C.

    Returns:
        (B, C, H, W), 0 for absent classes.
    """
    batch, _, height, width = cams.values.shape
    dense = cams.values.new_zeros(batch, classes, height, width)
    index = cams.classes.view(batch, -1, 1, 1).expand_as(cams.values)
    return dense.scatter_add(1, index, cams.values)
