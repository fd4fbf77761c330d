"""Inference at several scales with mirror images: class activation maps and segmentation in the same passes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fsr_fast.config import CamConfig, Config, EvaluateConfig
from fsr_fast.dataloading.images import DamagedFileError
from fsr_fast.dataloading.reading import COLOURS, Reading
from fsr_fast.errors import UserError
from fsr_fast.evaluation.large import Cut, LargePicture, plan_picture
from fsr_fast.evaluation.passes import Passed, Side, pass_scales, passing_side, scale_pixels
from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import dense_cams, merge_passes
from fsr_fast.models import Network
from fsr_fast.models.network import classify
from fsr_fast.runtime.precision import autocast


@dataclass(frozen=True)
class Inference:
    """The network's outputs for images of one size."""

    class_logits: Tensor
    """(B, C), of the classifier at scale 1.0."""
    labels: Tensor
    """(B, C), 0 or 1: the classes whose CAMs were computed."""
    cams: MergedCams
    """Normalised multi-scale CAMs, values (B, M, H, W)."""
    seg_logits: Tensor
    """(B, C+1, H, W), float32, merged over the scales; without scales (B, 0, H, W)."""


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
    size: tuple[int, int] | None = None,
) -> Inference:
    """Run the network at every scale; a scale shared by CAMs and segmentation is run once.

    Args:
        network: in eval mode.
        images: (B, 3, H, W), normalised, any size: each scale is rounded to whole patches.
        labels: (B, C), 0 or 1, classes whose CAMs are wanted; None: the likeliest, and all that are
            likelier than not.
        cam_scales: scales of the CAMs; the first is 1.0.
        scales: scales of the segmentation; may be none.
        flip: add the mirror image to the segmentation; the CAMs always do.
        amp: `auto`, `off` or `bf16`, as in the configuration.
        size: height and width of the results; None: those of the images.

    Returns:
        CAMs and logits at that resolution. Source: paper, CAM and evaluation; official code for the merging.
    """
    with autocast(images.device, amp):
        passed = pass_scales(network, [images], cam_scales, scales, flip)
        return _read_out(network, passed, labels, size or (images.shape[-2], images.shape[-1]))


@torch.no_grad()
def infer_like(
    network: Network,
    images: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    *,
    cam_scales: Sequence[float],
    scales: Sequence[float],
    flip: bool,
    amp: str,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Inference]:
    """Run the network, in one batch, on images of different sizes whose grids of patches are equal at every scale.

    Args:
        network: in eval mode.
        images: each (3, H, W), normalised; `patch_sizes` must be the same for all.
        labels: of each image (C,), as in `infer`.
        cam_scales: as in `infer`.
        scales: as in `infer`.
        flip: as in `infer`.
        amp: as in `infer`.
        sizes: height and width of each result; None: those of the images.

    Returns:
        The result of each image, at that resolution, B = 1.
    """
    device = images[0].device
    with autocast(device, amp):
        passed = pass_scales(network, [image[None] for image in images], cam_scales, scales, flip)
    for index, (image, present) in enumerate(zip(images, labels, strict=True)):
        with autocast(device, amp):  # ends before the caller gets the result
            wanted = None if present is None else present[None]
            size = sizes[index] if sizes else (image.shape[-2], image.shape[-1])
            result = _read_out(network, passed.take(index), wanted, size)
        yield result


def _read_out(network: Network, passed: Passed, labels: Tensor | None, size: tuple[int, int]) -> Inference:
    """Resize CAMs and logits to the resolution of the images, which are of one size."""
    class_logits = classify(network.encoder.norm(passed.cams[0].plain.tokens), network.top_classifier).float()
    if labels is None:
        best = class_logits == class_logits.amax(1, keepdim=True)
        labels = (best | (class_logits > 0)).float()
    max_classes = max(1, int(labels.sum(1).max()))
    cams = merge_passes(network, passed.cams, labels, classifier="top", max_classes=max_classes, size=size)
    scaled = (F.interpolate(logits, size=size, mode="bilinear", align_corners=False) for logits in passed.logits)
    nothing = class_logits.new_empty((len(labels), 0, *size))
    return Inference(class_logits, labels, cams, reduce(torch.maximum, scaled) if passed.logits else nothing)


def inference_settings(config: Config) -> dict[str, Any]:
    """Return the inference settings of a configuration, as keyword arguments of `infer`."""
    return {
        "cam_scales": config.cam.scales,
        "scales": config.evaluate.scales,
        "flip": config.evaluate.flip,
        "amp": config.run.amp,
    }


Picture = Image.Image | np.ndarray | str | Path


@overload
def segment(
    network: Network, image: Picture, *, side: Side = "auto", tile: Side = "auto", overlap: float = 0.25
) -> Prediction: ...


@overload
def segment(
    network: Network, image: list[Picture], *, side: Side = "auto", tile: Side = "auto", overlap: float = 0.25
) -> list[Prediction]: ...


def segment(
    network: Network,
    image: Picture | list[Picture],
    *,
    side: Side = "auto",
    tile: Side = "auto",
    overlap: float = 0.25,
) -> Prediction | list[Prediction]:
    """Segment a picture, or several.

    Args:
        network: from `load_network`.
        image: a picture, an array (H, W, channels) or (H, W) of uint8, or a file, which is turned upright and whose
            values are mapped by the network's window; or a list of these.
        side: longest side, in pixels, at which the picture passes through the network, as `evaluate.side` of the
            configuration; None: every pixel.
        tile: side of the tiles for a picture that is still larger, as `evaluate.tile`; None: never.
        overlap: smallest share of a tile that overlaps the next one, 0 to 0.75.

    Returns:
        `mask`, (H, W) uint8, 0 background, 1… the classes in the order of `network.classes`; `scores`, the probability
        of each class by name; `cams` by name; `probabilities`, (C + 1, H, W). For a list, one per picture.

    Raises:
        UserError: a file is missing or not a picture, or an array has another shape or dtype.
    """
    for name, value in (("side", side), ("tile", tile)):
        if value not in ("auto", None) and not (isinstance(value, int) and value >= 1):
            raise UserError(f"{name}: {value!r}; expected 'auto', None, or a number of pixels")
    if not 0 <= overlap <= 0.75:
        raise UserError(f"overlap: {overlap}; expected 0 to 0.75")
    evaluate = EvaluateConfig(side=side, tile=tile, overlap=overlap)
    if isinstance(image, Picture):
        return segment_batch(network, [_open(image, network)], evaluate=evaluate)[0]
    return [segment_batch(network, [_open(one, network)], evaluate=evaluate)[0] for one in image]


def segment_batch(
    network: Network,
    images: Sequence[Image.Image | np.ndarray],
    config: Config | None = None,
    *,
    evaluate: EvaluateConfig | None = None,
) -> list[Prediction]:
    """Segment pictures of one size, in one pass unless they are cut into tiles.

    Args:
        network: from `load_network`.
        images: pictures, at least one, or arrays (H, W, channels) of uint8.
        config: sections `evaluate`, `cam` and `run.amp`; None: the paper's scales with mirror images.
        evaluate: used if there is no configuration.
    """
    settings = config.evaluate if config else evaluate or EvaluateConfig()
    options: dict[str, Any] = {"cam_scales": CamConfig().scales, "scales": settings.scales, "flip": True, "amp": "auto"}
    options = inference_settings(config) if config else options
    whole = [image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB")) for image in images]
    size = (whole[0].shape[0], whole[0].shape[1])
    cut = plan_picture(settings, network, size)
    if cut is not None:
        return [_segment_large(network, pixels, cut, options) for pixels in whole]
    longest = passing_side(settings, network)
    small = torch.stack([torch.tensor(scale_pixels(pixels, longest)).permute(2, 0, 1) for pixels in whole])
    result = infer(network, network.normalise(small), size=size, **options)
    cams = dense_cams(result.cams, len(network.classes)).cpu().numpy()
    masks = result.seg_logits.argmax(1).to(torch.uint8).cpu().numpy()
    probabilities = result.seg_logits.softmax(1).cpu().numpy()
    scores, labels = result.class_logits.sigmoid().tolist(), result.labels.tolist()
    return [
        Prediction(
            mask=masks[number],
            scores=dict(zip(network.classes, scores[number], strict=True)),
            cams={name: cams[number, index] for index, name in enumerate(network.classes) if labels[number][index]},
            probabilities=probabilities[number],
        )
        for number in range(len(images))
    ]


def _segment_large(network: Network, pixels: np.ndarray, cut: Cut, options: dict[str, Any]) -> Prediction:
    picture = LargePicture(network, pixels, cut, None, cams="all", **options)
    size = cut.network.size
    probabilities = np.empty((len(network.classes) + 1, *size), np.float32)
    mask = np.empty(size, np.uint8)
    for rows, logits in picture.bands():
        probabilities[:, rows] = logits.softmax(0).cpu().numpy()
        mask[rows] = logits.argmax(0).cpu().numpy()
    cams = {network.classes[index]: np.empty(size, np.float32) for index in picture.activations.classes.tolist()}
    for rows, found in picture.activations.bands():
        for cam, values in zip(cams.values(), found.values[0].numpy(), strict=True):
            cam[rows] = values
    return Prediction(mask, picture.scores(), cams, probabilities)


def _open(image: Picture, network: Network) -> np.ndarray:
    channels = network.reading.channels
    if isinstance(image, str | Path):
        return read_picture(Path(image), reading=network.reading)
    if isinstance(image, Image.Image):
        stored = image.mode == {1: "L", 2: "LA", 4: "RGBA"}.get(channels)
        image = np.asarray(image if stored else image.convert("RGB"))
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3 and image.shape[2] == 1 and channels == 3:
        image = np.repeat(image, 3, 2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
        raise UserError(
            f"image: an array {image.shape} of {image.dtype}; expected (H, W, {channels}) or (H, W) of uint8"
        )
    return image


def read_picture(source: Path | bytes, name: str = "", reading: Reading = COLOURS) -> np.ndarray:
    """Read a picture as a network takes it, (H, W, channels) of uint8, upright.

    Args:
        source: file, or its content.
        name: its name in messages; by default the path.
        reading: of the network.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    with another_picture():
        return reading.pixels(source, name)


@contextmanager
def another_picture() -> Iterator[None]:
    """Replace a data set's remedy by that for pictures given by hand.

    Raises:
        UserError: instead of a `DamagedFileError`; an option that it names is kept.
    """
    try:
        yield
    except DamagedFileError as error:
        reason, _, remedy = str(error).partition(";")
        option = re.search(r"(raise|give) --data\.\w+( LOW HIGH)?", remedy)
        raise UserError(f"{reason}; give another picture{f', or {option[0]}' if option else ''}") from None
