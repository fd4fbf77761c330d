"""Inference at several scales with mirror images: class activation maps and segmentation in the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as image_functions

from fsr_fast.cam import ScalePass, dense_cams, merge_passes, multi_scale_passes
from fsr_fast.config import CamConfig, EvaluateConfig
from fsr_fast.errors import UserError
from fsr_fast.kernels import MergedCams
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import classify, to_map
from fsr_fast.runtime.precision import autocast


@dataclass(frozen=True)
class Inference:
    """What the network says of images of one size."""

    class_logits: Tensor
    """(B, C), of the classifier at scale 1.0."""
    labels: Tensor
    """(B, C), 0 or 1: the classes whose CAMs were made."""
    cams: MergedCams
    """Normalised multi-scale CAMs, values (B, M, H, W)."""
    seg_logits: Tensor
    """(B, C+1, H, W), float32, merged over the scales."""


@dataclass(frozen=True)
class Prediction:
    """Result for one picture."""

    mask: np.ndarray
    """(H, W), uint8: 0 background, class + 1."""
    scores: dict[str, float]
    """Probability of each class, image level."""
    cams: dict[str, np.ndarray]
    """(H, W), float32 in 0…1, of the likeliest class and of all that are likelier than not."""
    probabilities: np.ndarray
    """(C+1, H, W), float32, softmax of the segmentation."""


@torch.no_grad()
def infer(
    network: Network,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    cam_scales: Sequence[float] = CamConfig().scales,
    scales: Sequence[float] = EvaluateConfig().scales,
    flip: bool = True,
    amp: str = "auto",
) -> Inference:
    """Run the network at every scale; a scale that CAMs and segmentation share is run once.

    Args:
        network: in eval mode.
        images: (B, 3, H, W), normalised, any size: each scale is rounded to whole patches.
        labels: (B, C), 0 or 1, classes whose CAMs are wanted; none: the likeliest, and all that are
            likelier than not.
        cam_scales: scales of the CAMs; the first is 1.0.
        scales: scales of the segmentation.
        flip: add the mirror image to the segmentation; the CAMs always do.
        amp: `auto`, `off` or `bf16`, as in the configuration.

    Returns:
        CAMs and logits at the images' own resolution. Source: paper, CAM and evaluation; official code for the merging.
    """
    size = (images.shape[-2], images.shape[-1])
    wanted = [*cam_scales, *(scale for scale in scales if scale not in cam_scales)]
    with autocast(images.device, amp):
        passes = dict(zip(wanted, multi_scale_passes(network.encoder, images, wanted), strict=True))
        top = network.encoder.norm(passes[cam_scales[0]].plain.tokens)
        class_logits = classify(top, network.top_classifier).float()
        if labels is None:
            best = class_logits == class_logits.amax(1, keepdim=True)
            labels = (best | (class_logits > 0)).float()
        cams = merge_passes(
            network,
            [passes[scale] for scale in cam_scales],
            labels,
            classifier="top",
            slots=max(1, int(labels.sum(1).max())),
            size=size,
        )
        seg_logits = _merge_segmentation(network, [passes[scale] for scale in scales], size, flip)
    return Inference(class_logits, labels, cams, seg_logits)


def segment(network: Network, image: Image.Image | str | Path) -> Prediction:
    """Segment one picture.

    Args:
        network: as `load_network` gives it.
        image: a picture or its file.

    Raises:
        UserError: the file is missing or is no picture.
    """
    picture = image if isinstance(image, Image.Image) else read_picture(Path(image))
    device = network.top_classifier.weight.device
    tensor = image_functions.to_dtype(image_functions.pil_to_tensor(picture.convert("RGB")), torch.float32, scale=True)
    normalised = image_functions.normalize(tensor, list(network.mean), list(network.deviation))[None].to(device)
    result = infer(network, normalised)
    cams = dense_cams(result.cams, len(network.classes))[0]
    found = [index for index in range(len(network.classes)) if result.labels[0, index] > 0]
    scores = result.class_logits[0].sigmoid().tolist()
    return Prediction(
        mask=result.seg_logits[0].argmax(0).to(torch.uint8).cpu().numpy(),
        scores=dict(zip(network.classes, scores, strict=True)),
        cams={network.classes[index]: cams[index].cpu().numpy() for index in found},
        probabilities=result.seg_logits[0].softmax(0).cpu().numpy(),
    )


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be decoded ({error}); replace or remove it") from None


def _merge_segmentation(network: Network, passes: Sequence[ScalePass], size: tuple[int, int], flip: bool) -> Tensor:
    def decode(features: Features) -> Tensor:
        return network.decoder(to_map(network.encoder.norm(features.tokens), features.grid)).float()

    scaled = []
    for plain, mirrored in passes:
        logits = decode(plain) + decode(mirrored).flip(-1) if flip else decode(plain)
        scaled.append(F.interpolate(logits, size=size, mode="bilinear", align_corners=False))
    return torch.stack(scaled).amax(0)
