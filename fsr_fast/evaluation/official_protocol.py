"""Inference as in the official scripts, which differs from ours only in sizes.

Pseudo labels come from CAMs on a square of the training's size, stretched to the picture. For the segmentation a
picture is scaled to whole pixels; partial patches are cut off, and the result is stretched to the picture.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.evaluation.inference import Inference
from fsr_fast.method.cam import ScalePass, merge_passes, split_batch
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import classify, to_map
from fsr_fast.runtime.precision import autocast


@torch.no_grad()
def infer_officially(
    network: Network,
    image: Tensor,
    labels: Tensor | None,
    *,
    cam_scales: Sequence[float],
    scales: Sequence[float],
    flip: bool,
    amp: str,
) -> Inference:
    """Run the network on one image; arguments and result are those of `infer` for B = 1.

    Args:
        network: in eval mode.
        image: (3, H, W), normalised.
        labels: (C,), 0 or 1; None: the likeliest class, and all that are likelier than not.
        cam_scales: of the square; the first is 1.0.
        scales: of the segmentation.
        flip: add the mirror image to the segmentation.
        amp: as in `infer`.

    Source: official code, validation while training (CAMs) and inference script (segmentation).
    """
    size, square = (image.shape[-2], image.shape[-1]), (network.image_size,) * 2
    with autocast(image.device, amp):
        passes = [_pass_both(network, _resize(image[None], square), scale) for scale in cam_scales]
        class_logits = classify(network.encoder.norm(passes[0].plain.tokens), network.top_classifier).float()
        likely = (class_logits == class_logits.amax(1, keepdim=True)) | (class_logits > 0)
        shown = likely.float() if labels is None else labels[None]
        count = max(1, int(shown.sum(1).max()))
        cams = merge_passes(network, passes, shown, classifier="top", max_classes=count, size=square, output_size=size)
        logits = [_segment(network, _pass_both(network, image[None], scale), size, flip) for scale in scales]
    nothing = class_logits.new_empty((1, 0, *size))
    return Inference(class_logits, shown, cams, reduce(torch.maximum, logits) if logits else nothing)


def _pass_both(network: Network, images: Tensor, scale: float) -> ScalePass:
    size = (int(images.shape[-2] * scale), int(images.shape[-1] * scale))
    scaled = _resize(images, size)
    return ScalePass(*split_batch(network.encoder(torch.cat([scaled, scaled.flip(-1)]))))


def _segment(network: Network, passed: ScalePass, size: tuple[int, int], flip: bool) -> Tensor:
    def decode(features: Features) -> Tensor:
        logits = network.decoder(to_map(network.encoder.norm(features.tokens), features.grid)).float()
        return _resize(logits, size)

    return decode(passed.plain) + decode(passed.mirrored).flip(-1) if flip else decode(passed.plain)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
