"""Evaluation of a network on a labelled list: pseudo labels, segmentation, segmentation after the dense CRF."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fsr_fast.cam import merged_labels
from fsr_fast.config import Config
from fsr_fast.dataloading.batch import EvaluationSample
from fsr_fast.dataloading.datasets import SegmentationDataset
from fsr_fast.dataloading.torch_pipeline import evaluation_samples
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.metrics import ConfusionMatrix, scores
from fsr_fast.models import Network
from fsr_fast.reporting.progress import track
from fsr_fast.runtime.distributed import Process

BATCH_PIXELS = 2**18
"""Images of one size are batched up to this many pixels."""


@dataclass(frozen=True)
class Example:
    """One evaluated image, for pictures."""

    name: str
    image: np.ndarray
    """(H, W, 3), uint8."""
    truth: np.ndarray
    """(H, W), uint8."""
    cam: np.ndarray
    """(H, W), float32, largest activation over the present classes."""
    pseudo: np.ndarray
    """(H, W), uint8."""
    seg: np.ndarray
    """(H, W), uint8."""


@dataclass
class Evaluation:
    """Result of an evaluation."""

    results: dict[str, dict[str, Any]]
    """Scores of `pseudo`, `seg` and, where asked for, `seg+crf`: mean IoU, per-class figures; percent."""
    examples: list[Example] = field(default_factory=list)
    """The first images of the list."""


def evaluate_network(
    network: Network, dataset: SegmentationDataset, config: Config, process: Process, *, examples: int = 0
) -> Evaluation:
    """Evaluate on a labelled list; each process takes its share.

    Args:
        network: on the device of `process`; its mode is kept.
        dataset: images with masks.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        process: this process.
        examples: how many images to keep for pictures.

    Raises:
        UserError: an image has no mask.

    Source: paper, evaluation.
    """
    names = ("pseudo", "seg", "seg+crf") if config.evaluate.crf else ("pseudo", "seg")
    matrices = {name: ConfusionMatrix(len(network.classes)) for name in names}
    kept: list[Example] = []
    count = min(len(dataset), config.evaluate.limit or len(dataset))
    samples = evaluation_samples(
        dataset,
        mean=network.mean,
        std=network.deviation,
        rank=process.rank,
        world_size=process.world_size,
        workers=config.data.workers,
        limit=config.evaluate.limit,
    )
    share = len(range(process.rank, count, process.world_size))
    was_training = network.training
    network.eval()
    for batch in _batches(track(samples, "evaluating", share)):
        for example, predictions in _evaluate_batch(network, batch, dataset, config, process.device):
            for name, prediction in predictions.items():
                matrices[name].update(prediction, example.truth)
            if len(kept) < examples:
                kept.append(example)
    network.train(was_training)
    for matrix in matrices.values():
        matrix.all_reduce()
    return Evaluation({name: scores(matrix, network.classes) for name, matrix in matrices.items()}, kept)


def _batches(samples: Iterable[EvaluationSample]) -> Iterator[list[EvaluationSample]]:
    batch: list[EvaluationSample] = []
    for sample in samples:
        shape = sample.image.shape
        if batch and (batch[0].image.shape != shape or (len(batch) + 1) * shape[1] * shape[2] > BATCH_PIXELS):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _evaluate_batch(
    network: Network,
    batch: list[EvaluationSample],
    dataset: SegmentationDataset,
    config: Config,
    device: torch.device,
) -> Iterator[tuple[Example, dict[str, np.ndarray]]]:
    result = infer(
        network,
        torch.stack([sample.image for sample in batch]).to(device),
        torch.stack([sample.labels for sample in batch]).to(device),
        cam_scales=config.cam.scales,
        scales=config.evaluate.scales,
        flip=config.evaluate.flip,
        amp=config.run.amp,
    )
    threshold = config.evaluate.threshold
    pseudo = merged_labels(result.cams, high=threshold, low=threshold).to(torch.uint8).cpu().numpy()
    seg = result.seg_logits.argmax(1).to(torch.uint8).cpu().numpy()
    cam = result.cams.values.amax(1).cpu().numpy()
    for index, sample in enumerate(batch):
        if sample.mask is None:
            raise UserError(f"{sample.name}: no mask; evaluation needs the mask of every image of the list")
        image = np.asarray(dataset.image(sample.index))
        predictions = {"pseudo": pseudo[index], "seg": seg[index]}
        if config.evaluate.crf:
            probabilities = result.seg_logits[index].softmax(0).cpu().numpy()
            predictions["seg+crf"] = dense_crf(image, probabilities).argmax(0).astype(np.uint8)
        truth = np.asarray(sample.mask)
        yield Example(sample.name, image, truth, cam[index], pseudo[index], seg[index]), predictions
