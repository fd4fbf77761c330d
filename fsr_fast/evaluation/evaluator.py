"""Evaluation of a network on a labelled list: pseudo labels, segmentation, segmentation after the dense CRF."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.errors import UserError
from fsr_fast.evaluation.activations import PREVIEW
from fsr_fast.evaluation.crf import require_pydensecrf
from fsr_fast.evaluation.journal import Journal
from fsr_fast.evaluation.predictions import Kind, Result, predict_images
from fsr_fast.evaluation.samples import Failure
from fsr_fast.evaluation.tally import Tally, count_image
from fsr_fast.models import Network
from fsr_fast.runtime.distributed import Process, wait_for_all
from fsr_fast.runtime.terminal import track

logger = logging.getLogger(__name__)


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
    """Result of an evaluation, over all processes."""

    results: dict[str, dict[str, Any]]
    """Scores of `pseudo`, `seg` and, where asked for, `seg+crf`: mean IoU, per-class figures; percent."""
    examples: list[Example] = field(default_factory=list)
    """The first images of the list that this process has evaluated."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """Counts behind the scores."""
    images: int = 0
    """Number of images that were scored."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why the other images could not be evaluated, by name."""


def evaluate_network(
    network: Network,
    dataset: ImageSet,
    config: Config,
    process: Process,
    *,
    examples: int = 0,
    during_training: bool = False,
    journal: Journal | None = None,
) -> Evaluation:
    """Evaluate on a labelled list; each process takes its share, each image counts once.

    Args:
        network: on the device of `process`; its mode is kept.
        dataset: images with masks.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        process: this process.
        examples: how many images to keep for pictures.
        during_training: take no more than `evaluate.training_limit` images, spread over the list.
        journal: records each image; images already in it are not evaluated again.

    Raises:
        UserError: there is no image, none could be evaluated, or pydensecrf is required and missing.

    Source: paper, evaluation.
    """
    if not len(dataset):
        raise UserError("data.val_list: none; evaluation needs a list of images with masks: --list NAME")
    kinds: list[Kind] = ["pseudo", "seg", "seg+crf"] if config.evaluate.crf else ["pseudo", "seg"]
    if config.evaluate.crf and config.evaluate.crf_backend == "pydensecrf":
        require_pydensecrf()  # before anything is written
    tallies: dict[str, Tally] = {kind: Tally(len(network.classes)) for kind in kinds}
    chosen = choose_images(len(dataset), config, during_training=during_training)
    done = 0
    if journal is not None:
        if process.is_main:
            done = _resume(journal, tallies)
        chosen = [index for index in chosen if dataset.ids[index] not in journal.found]
        wait_for_all()  # every process has read the journal
        journal.open()
    share = chosen[process.rank :: process.world_size]
    shown = set(share[:examples])
    kept: dict[int, Example] = {}
    failed: dict[str, str] = {}
    with in_eval_mode(network):
        stream = predict_images(network, dataset, share, config, process.device, kinds)
        for result in track(stream, "evaluating", len(share)):
            line = _count(result, len(network.classes), process.device)
            if journal is not None:
                journal.write(line)
            if "error" in line:
                failed[line["name"]] = line["error"]
                continue
            done += 1
            for kind in kinds:
                tallies[kind].add(line["counts"][kind])
            if isinstance(result, Result) and result.sample.index in shown:
                kept[result.sample.index] = _example(result)
    if journal is not None:
        journal.close()
    for tally in tallies.values():
        tally.all_reduce()
    done, failed = _gather(done, failed)
    _complain(failed, done, process)
    results = {kind: tally.scores(network.classes) for kind, tally in tallies.items()}
    return Evaluation(results, [kept[index] for index in sorted(kept)], tallies, done, failed)


def choose_images(count: int, config: Config, *, during_training: bool = False) -> Sequence[int]:
    """Return the numbers of the images to evaluate.

    Args:
        count: length of the list.
        config: `evaluate.limit`: only the first ones; `evaluate.training_limit`: every n-th of them, so that there are
            no more than that.
        during_training: whether `training_limit` applies.
    """
    count = min(count, config.evaluate.limit or count)
    limit = config.evaluate.training_limit
    return range(0, count, -(-count // limit) if during_training and limit else 1)


def _resume(journal: Journal, tallies: dict[str, Tally]) -> int:
    count = 0
    for line in journal.lines():
        if "error" not in line:
            count += 1
            for kind, tally in tallies.items():
                tally.add(line["counts"][kind])
    if count:
        print(f"{count} images were evaluated before the interruption", flush=True)
    return count


def _count(result: Result | Failure, classes: int, device: torch.device) -> dict[str, Any]:
    """Make an image's line in the journal."""
    if isinstance(result, Failure):
        return {"name": result.name, "error": result.message}
    sample = result.sample
    if sample.truth is None:
        return {"name": sample.name, "error": f"{sample.name}: no mask; evaluation needs the mask of every image"}
    counts = {kind: count_image(found.labels, sample.truth, classes, device) for kind, found in result.maps.items()}
    return {"name": sample.name, "counts": counts}


def _example(result: Result) -> Example:
    """Keep an image for display; of a large one, every n-th pixel."""
    sample = result.sample
    assert sample.truth is not None
    step = -(-max(sample.truth.shape) // PREVIEW)
    parts = (sample.image, sample.truth, *(result.maps[kind].labels for kind in ("pseudo", "seg")))
    image, truth, pseudo, seg = (part[::step, ::step].copy() if step > 1 else part for part in parts)
    return Example(sample.name, image, truth, result.cam, pseudo, seg)


def _gather(done: int, failed: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Add up over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return done, failed
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (done, failed))
    return sum(count for count, _ in parts), {name: text for _, part in parts for name, text in part.items()}


def _complain(failed: dict[str, str], done: int, process: Process) -> None:
    if failed and not done:
        name, message = next(iter(failed.items()))
        raise UserError(f"none of {len(failed)} images could be evaluated; the first was {name!r}: {message}")
    if failed and process.is_main:
        listed = "; ".join(f"{name!r}: {message}" for name, message in _first(failed.items(), 5))
        logger.warning("%d of %d images could not be evaluated: %s", len(failed), len(failed) + done, listed)


def _first(items: Iterable[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [item for item, _ in zip(items, range(count), strict=False)]


@contextmanager
def in_eval_mode(network: Network) -> Iterator[None]:
    """Put the network into eval mode within this context."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
