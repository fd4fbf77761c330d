"""Scores from image labels alone: how well the classifier tells which classes a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.evaluation.evaluator import choose_images, in_eval_mode
from fsr_fast.evaluation.predictions import Result, predict_images
from fsr_fast.models import Network
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.terminal import track


def score_labels(network: Network, dataset: ImageSet, config: Config, process: Process) -> dict[str, Any]:
    """Compare the classifier with the image labels of a list; each process takes its share.

    Args:
        network: on the device of `process`; its mode is kept.
        dataset: images with labels; masks are not read.
        config: sections `evaluate`, `cam`, `data` and `run.amp`; it takes `evaluate.training_limit` images of the list.
        process: this process.

    Returns:
        As `label_scores`, and `images`, their number.
    """
    share = choose_images(len(dataset), config, during_training=True)[process.rank :: process.world_size]
    found: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    with in_eval_mode(network):
        stream = predict_images(network, dataset, share, config, process.device, [])
        for result in track(stream, "scoring labels", len(share)):
            if isinstance(result, Result):
                found.append((result.class_logits, result.sample.labels))
    if process.world_size > 1:
        parts: list[Any] = [None] * process.world_size
        torch.distributed.all_gather_object(parts, found)
        found = [pair for part in parts for pair in part]
    shape = (len(found), len(network.classes))
    logits = np.array([pair[0] for pair in found]).reshape(shape)
    labels = np.array([pair[1] for pair in found]).reshape(shape)
    return {"images": len(found), **label_scores(logits, labels, network.classes)}


def label_scores(logits: NDArray[Any], labels: NDArray[Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Return average precision and F1 of each class.

    Args:
        logits: (n, C), of the classifier; above 0 the class is found.
        labels: (n, C), 1 where the image shows the class, else 0.
        class_names: of the C classes.

    Returns:
        `mean_ap` and `mean_f1` over the classes that some image shows, and `classes`: for each `ap`, `f1`, `precision`,
        `recall`, all in percent, None where they are undefined, and `images`, the number that show it.
    """
    classes = {}
    for number, name in enumerate(class_names):
        shown, found = labels[:, number] > 0, logits[:, number] > 0
        both, count = int((shown & found).sum()), int(shown.sum())
        classes[name] = {
            "ap": average_precision(logits[:, number], shown),
            "f1": 200 * both / (count + int(found.sum())) if count else None,
            "precision": 100 * both / int(found.sum()) if found.any() else None,
            "recall": 100 * both / count if count else None,
            "images": count,
        }
    return {f"mean_{key}": _mean(one[key] for one in classes.values()) for key in ("ap", "f1")} | {"classes": classes}


def average_precision(scores: NDArray[Any], shown: NDArray[np.bool_]) -> float | None:
    """Return the mean of the precision at the rank of each picture that shows the class, percent; None without such.

    Pictures with equal scores share the last of their ranks.
    """
    if not shown.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(shown[order])
    last = np.searchsorted(-ranked, -ranked, side="right") - 1
    return float(100 * (hits[last] / (last + 1))[shown[order]].mean())


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
