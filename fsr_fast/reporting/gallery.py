"""What a trained network sees: scores on the validation list, its best, worst and random pictures, its attention."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import Inference, infer
from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.evaluation.samples import Failure, Sample, read_samples
from fsr_fast.method.cam import merged_labels, resize_images
from fsr_fast.models import Network
from fsr_fast.reporting.analysis import attention_entropy, class_attention
from fsr_fast.runtime.terminal import track

CHOICES = ("best", "worst", "random")


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery; all maps in its size."""

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
    """(H, W), uint8; so are the next three but the CAM. None without a mask."""
    cam: np.ndarray
    """(H, W), float32 in 0…1, largest activation over the classes of the picture."""
    pseudo: np.ndarray
    seg: np.ndarray
    crf: np.ndarray
    attention: list[np.ndarray]
    """Attention of the class token to the patches, (h, w) per block, 0…1 (paper, Fig. 7); none where it pools."""


@dataclass(frozen=True)
class Gallery:
    """Result of looking at a list."""

    matrix: ConfusionMatrix | None
    """Of the segmentation, over all pictures that were looked at; None without masks."""
    seen: int
    """Pictures looked at."""
    listed: int
    """Pictures of the list."""
    entries: list[Entry]
    """By falling IoU."""
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
        dataset: with a mask for each picture, or with none.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        device: of the network.
        limit: look at the first pictures alone; none: at all.
        rows: pictures to keep of each choice.

    Raises:
        UserError: a picture cannot be read.
    """
    matrix, ious = ConfusionMatrix(len(network.classes)), dict[int, float | None]()
    seen = min(len(dataset), limit or len(dataset))
    for sample, result in _infer_all(network, dataset, config, device, limit, None):
        truth = _truth(sample)
        if truth is None:
            ious[sample.index] = None
            continue
        alone = ConfusionMatrix(len(network.classes))
        alone.update(result.seg_logits[0].argmax(0).cpu(), truth)
        matrix.merge(alone)
        ious[sample.index] = alone.mean_iou()
    chosen = _choose(ious, rows)
    entries, entropies = [], []
    side = network.image_size
    for sample, result in _infer_all(network, dataset, config, device, limit, set(chosen)):
        entries.append(_entry(network, config, sample, result, ious[sample.index], chosen[sample.index]))
        picture = resize_images(_normalised(network, sample.pixels), (side, side))
        entropies.append(attention_entropy(network, picture).cpu())
    return Gallery(
        matrix if any(iou is not None for iou in ious.values()) else None,
        seen,
        len(dataset),
        sorted(entries, key=lambda entry: -(entry.iou or 0.0)),
        torch.stack(entropies).mean(0),
        network.encoder.grid[0] * network.encoder.grid[1],
    )


def _infer_all(
    network: Network,
    dataset: ImageSet,
    config: Config,
    device: torch.device,
    limit: int | None,
    wanted: set[int] | None,
) -> Iterator[tuple[Sample, Inference]]:
    chosen = range(min(len(dataset), limit or len(dataset))) if wanted is None else sorted(wanted)
    samples = read_samples(dataset, chosen, config.data.workers)
    for sample in track(samples, "segmenting" if wanted is None else "drawing", len(chosen)):
        if isinstance(sample, Failure):
            raise UserError(sample.message)
        yield (
            sample,
            infer(
                network,
                _normalised(network, sample.pixels),
                torch.from_numpy(sample.labels)[None].to(device),
                cam_scales=config.cam.scales,
                scales=config.evaluate.scales,
                flip=config.evaluate.flip,
                amp=config.run.amp,
            ),
        )


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
    network: Network,
    config: Config,
    sample: Sample,
    result: Inference,
    iou: float | None,
    choices: tuple[str, ...],
) -> Entry:
    image = sample.image
    threshold = config.evaluate.threshold
    probabilities = result.seg_logits[0].softmax(0).float().cpu().numpy()
    return Entry(
        name=sample.name,
        choices=choices,
        iou=iou,
        classes=tuple(name for name, label in zip(network.classes, sample.labels, strict=True) if label > 0),
        image=image,
        truth=_truth(sample),
        cam=result.cams.values[0].amax(0).float().cpu().numpy(),
        pseudo=merged_labels(result.cams, high=threshold, low=threshold)[0].cpu().numpy().astype(np.uint8),
        seg=probabilities.argmax(0).astype(np.uint8),
        crf=dense_crf(image, probabilities).argmax(0).astype(np.uint8),
        attention=_attention(network, sample.pixels),
    )


def _attention(network: Network, pixels: np.ndarray) -> list[np.ndarray]:
    if network.encoder.aggregation != "mca":
        return []
    patch = network.encoder.patch_size
    size = tuple(max(1, round(side / patch)) * patch for side in pixels.shape[:2])
    weights = class_attention(network, resize_images(_normalised(network, pixels), (size[0], size[1])))[0]
    means = weights.mean(1).cpu()
    return [((block - block.min()) / (block.max() - block.min()).clamp(min=1e-12)).numpy() for block in means]


def _normalised(network: Network, pixels: np.ndarray) -> Tensor:
    return network.normalise(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))[None]


def _truth(sample: Sample) -> np.ndarray | None:
    return sample.truth
