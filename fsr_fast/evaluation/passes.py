"""The passes of a picture through trunk and decoder, and its sizes there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fsr_fast.config import EvaluateConfig
from fsr_fast.dataloading.regions import apply_to_bands
from fsr_fast.method.cam import ScalePass, pair_mirrored, resize_images, scaled_size
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import to_map

Side = Literal["auto"] | int | None
"""Longest side at which pictures pass through the network; see `evaluate.side`."""


def working_size(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Return the height and width at which an image passes through the network.

    Args:
        size: its height and width.
        side: longest side, in pixels; None: unlimited.
    """
    if side is None or max(size) <= side:
        return size
    height, width = (max(1, round(length * side / max(size))) for length in size)
    return height, width


def largest_side(side: Side, network: Network) -> int | None:
    """Resolve `evaluate.side` for a network: the longest side in pixels, or None."""
    return max(512, 2 * network.image_size) if side == "auto" else side


def passing_side(evaluate: EvaluateConfig, network: Network) -> int | None:
    """Return the longest side at which pictures pass: with a number for `tile`, `side: auto` means every pixel."""
    every = evaluate.side == "auto" and isinstance(evaluate.tile, int)
    return None if every else largest_side(evaluate.side, network)


def scale_pixels(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """Scale a picture (H, W, channels) of uint8 down to the size at which it passes through the network."""
    height, width = working_size((pixels.shape[0], pixels.shape[1]), side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return apply_to_bands(pixels, lambda band: band.resize((width, height), Image.Resampling.LANCZOS))


def patch_sizes(size: tuple[int, int], scales: Sequence[float], patch_size: int) -> tuple[tuple[int, int], ...]:
    """Return the sizes, in pixels, of an image at the scales: whole patches."""
    return tuple(scaled_size(size, scale, patch_size) for scale in scales)


class Passed(NamedTuple):
    """A batch after trunk and decoder, on the grids of its scales."""

    cams: list[ScalePass]
    """Features at the scales of the CAMs."""
    logits: list[Tensor]
    """(B, C+1, h, w), decoder logits at each scale of the segmentation, mirror images added."""

    def take(self, index: int) -> Passed:
        """Return one image of the batch, B = 1."""
        part = slice(index, index + 1)

        def cut(features: Features) -> Features:
            return features._replace(tokens=features.tokens[part], aux=features.aux[part])

        cams = [ScalePass(cut(plain), cut(mirrored)) for plain, mirrored in self.cams]
        return Passed(cams, [logits[part] for logits in self.logits])


def pass_scales(
    network: Network, images: Sequence[Tensor], cam_scales: Sequence[float], scales: Sequence[float], flip: bool
) -> Passed:
    """Run trunk and decoder on images (B, 3, H, W), of one or more sizes whose grids of patches are equal."""

    def decode(features: Features) -> Tensor:
        return network.decoder(to_map(network.encoder.norm(features.tokens), features.grid)).float()

    wanted = [*cam_scales, *(scale for scale in scales if scale not in cam_scales)]
    views = []
    for scale in wanted:
        size = scaled_size((images[0].shape[-2], images[0].shape[-1]), scale, network.encoder.patch_size)
        scaled = torch.cat([resize_images(part, size) for part in images])
        views.append(torch.cat([scaled, scaled.flip(-1)]))
    passes = dict(zip(wanted, pair_mirrored(run_trunk(network, views)), strict=True))
    logits = []
    for plain, mirrored in (passes[scale] for scale in scales):
        logits.append(decode(plain) + decode(mirrored).flip(-1) if flip else decode(plain))
    return Passed([passes[scale] for scale in cam_scales], logits)


def run_trunk(network: Network, views: Sequence[Tensor]) -> list[Features]:
    """Pass images of several sizes (B, 3, h, w): all at once on a GPU; one by one on a CPU, which is cache-friendly."""
    if views[0].is_cuda:
        return network.encoder.forward_packed(views)
    found = [[network.encoder(image[None]) for image in view] for view in views]
    return [
        each[0]._replace(tokens=torch.cat([one.tokens for one in each]), aux=torch.cat([one.aux for one in each]))
        for each in found
    ]
