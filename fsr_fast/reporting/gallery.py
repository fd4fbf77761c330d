"""A gallery of a trained network: scores on a list, its best, worst and random pictures, its attention."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.regions import read_scaled
from fsr_fast.errors import UserError
from fsr_fast.evaluation.label_maps import Kind
from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.evaluation.passes import largest_side, scale_pixels
from fsr_fast.evaluation.predictions import Result, predict_images
from fsr_fast.evaluation.samples import Failure
from fsr_fast.method.cam import resize_images
from fsr_fast.models import Network
from fsr_fast.reporting.analysis import attention_entropy, class_attention
from fsr_fast.reporting.figures import SIDE
from fsr_fast.runtime.terminal import track

CHOICES = ("best", "worst", "random")


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery, no side longer than `SIDE` pixels; truth and labels have its size."""

    name: str
    choices: tuple[str, ...]
    """Which of `CHOICES` it belongs to."""
    iou: float | None
    """Mean IoU of the segmentation over the classes of its truth, percent; None without a mask."""
    classes: tuple[str, ...]
    """Its image labels."""
    image: np.ndarray
    """(H, W, 3), uint8."""
    truth: np.ndarray | None
    """(H, W), uint8, as are the three label maps. None without a mask."""
    cam: np.ndarray
    """(h, w), float32 in 0…1, largest activation over the classes of the picture."""
    pseudo: np.ndarray
    seg: np.ndarray
    crf: np.ndarray
    attention: list[np.ndarray]
    """Attention of the class token to the patches, (h, w) per block, 0…1 (paper, Fig. 7); empty if it pools."""


@dataclass(frozen=True)
class Gallery:
    """Scores and chosen pictures of a list."""

    matrix: ConfusionMatrix | None
    """Of the segmentation, over all pictures that were segmented; None without masks."""
    seen: int
    """Number of pictures that were segmented."""
    listed: int
    """Number of pictures on the list."""
    entries: list[Entry]
    """In order of decreasing IoU."""
    entropy: Tensor
    """(depth, heads), nats, mean over the entries (paper, Fig. 6)."""
    patches: int
    """Number N of patches at which the entropy was taken."""


def look(
    network: Network,
    dataset: ImageSet,
    config: Config,
    device: torch.device,
    *,
    limit: int | None,
    rows: int,
) -> Gallery:
    """Segment the pictures of a list and keep the best, the worst and some random ones; without masks random ones.

    Args:
        network: in eval mode, on the device.
        dataset: with a mask for every picture, or without masks.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        device: of the network.
        limit: number of pictures, from the first; None: all.
        rows: pictures to keep per choice.

    Raises:
        UserError: a picture cannot be read.
    """
    matrix, ious = ConfusionMatrix(len(network.classes)), dict[int, float | None]()
    seen = range(min(len(dataset), limit or len(dataset)))
    for result in _predict(network, dataset, config, device, seen, ("seg",), "segmenting"):
        sample = result.sample
        if sample.truth is None:
            ious[sample.index] = None
            continue
        alone = ConfusionMatrix(len(network.classes))
        alone.update(torch.from_numpy(result.maps["seg"].labels), sample.truth)
        matrix.merge(alone)
        ious[sample.index] = alone.mean_iou()
    chosen = _choose(ious, rows)
    entries, entropies = [], []
    for result in _predict(network, dataset, config, device, sorted(chosen), ("pseudo", "seg", "seg+crf"), "drawing"):
        index = result.sample.index
        pixels = scale_pixels(result.sample.pixels, largest_side("auto", network))
        images = network.normalise(torch.tensor(pixels).permute(2, 0, 1))[None]
        entries.append(_entry(result, network, ious[index], chosen[index], _attention(network, images)))
        entropies.append(attention_entropy(network, resize_images(images, (network.image_size,) * 2)).cpu())
    return Gallery(
        matrix if any(iou is not None for iou in ious.values()) else None,
        len(seen),
        len(dataset),
        sorted(entries, key=lambda entry: -(entry.iou or 0.0)),
        torch.stack(entropies).mean(0),
        network.encoder.grid[0] * network.encoder.grid[1],
    )


def _predict(
    network: Network,
    dataset: ImageSet,
    config: Config,
    device: torch.device,
    indices: Sequence[int],
    kinds: Sequence[Kind],
    what: str,
) -> Iterator[Result]:
    results = predict_images(network, dataset, indices, config, device, kinds)
    for result in track(results, what, len(indices)):
        if isinstance(result, Failure):
            raise UserError(f"{result.name}: {result.message}")
        yield result


def _choose(ious: Mapping[int, float | None], rows: int) -> dict[int, tuple[str, ...]]:
    order = sorted(ious, key=lambda index: (-np.nan_to_num(ious[index] or 0.0), index))
    drawn = random.Random(0).sample(order, min(rows, len(order)))
    scored = [index for index in order if ious[index] is not None]
    sets = {"best": scored[:rows], "worst": scored[-rows:], "random": drawn}
    return {
        index: tuple(choice for choice in CHOICES if index in sets[choice])
        for index in order
        if any(index in members for members in sets.values())
    }


def _entry(
    result: Result, network: Network, iou: float | None, choices: tuple[str, ...], attention: list[np.ndarray]
) -> Entry:
    """Reduce a result to what is shown: labels and truth are every n-th pixel."""
    sample, maps = result.sample, result.maps
    height, width = sample.image.shape[:2]
    step = -(-max(height, width) // SIDE)
    pseudo, seg, crf = (maps[kind].labels[::step, ::step].copy() for kind in ("pseudo", "seg", "seg+crf"))
    return Entry(
        name=sample.name,
        choices=choices,
        iou=iou,
        classes=tuple(name for name, label in zip(network.classes, sample.labels, strict=True) if label > 0),
        image=read_scaled(sample.image, slice(0, height), slice(0, width), (seg.shape[0], seg.shape[1])),
        truth=None if sample.truth is None else sample.truth[::step, ::step].copy(),
        cam=result.cam,
        pseudo=pseudo,
        seg=seg,
        crf=crf,
        attention=attention,
    )


def _attention(network: Network, images: Tensor) -> list[np.ndarray]:
    """Attention of the class token to one image (1, 3, H, W), at its size rounded to whole patches."""
    if network.encoder.aggregation != "mca":
        return []
    patch = network.encoder.patch_size
    size = (max(1, round(images.shape[-2] / patch)) * patch, max(1, round(images.shape[-1] / patch)) * patch)
    means = class_attention(network, resize_images(images, size))[0].mean(1).cpu()
    return [((block - block.min()) / (block.max() - block.min()).clamp(min=1e-12)).numpy() for block in means]
