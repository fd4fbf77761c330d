"""Evaluate a trained network: `fsr-fast evaluate --checkpoint RUN_OR_FILE`."""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich import print as rich_print

from fsr_fast.cli import run_command
from fsr_fast.config import Config, EvaluateConfig, build_config, read_yaml
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation.evaluator import Evaluation, evaluate_network
from fsr_fast.evaluation.journal import Journal, fingerprint
from fsr_fast.evaluation.report import write_report
from fsr_fast.models import Network
from fsr_fast.models.build import restore_network, restore_official
from fsr_fast.models.official import read_official
from fsr_fast.options import Parser
from fsr_fast.reporting.pictures import evaluation_grid
from fsr_fast.reporting.tables import score_table
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import Process, start_process, stop_process, wait_for_all
from fsr_fast.runtime.files import write_png
from fsr_fast.runtime.outputs import output_folder

PICTURES = 8


def main(arguments: Sequence[str]) -> None:
    """Evaluate as the arguments say."""
    options = build_parser().parse_args(arguments)
    network, config, iteration = load_evaluation(options)
    _, dataset = build_datasets(config.data)
    if iteration is None and len(network.classes) == len(dataset.classes):
        network.classes = dataset.classes  # an official checkpoint holds no names
    if dataset.classes != network.classes:
        raise UserError(f"data: its classes {dataset.classes} are not those of the checkpoint, {network.classes}")
    process = start_process(config.run.device)
    try:
        _evaluate(options, network, config, dataset, process, iteration)
    finally:
        stop_process()


def _evaluate(
    options: argparse.Namespace,
    network: Network,
    config: Config,
    dataset: ImageSet,
    process: Process,
    iteration: int | None,
) -> None:
    folder = options.output or _default_folder(options.checkpoint)
    settings = {"checkpoint": str(options.checkpoint), "iteration": iteration, "list": config.data.val_list}
    settings["protocol"] = config.evaluate.protocol
    with output_folder(folder, "evaluate", own=options.output is None) if process.is_main else nullcontext():
        wait_for_all()  # nobody else writes
        journal = Journal(folder, process.rank, _header(network, config))
        began = time.perf_counter()
        evaluation = evaluate_network(
            network.to(process.device), dataset, config, process, examples=PICTURES, journal=journal
        )
        wait_for_all()  # every process has closed its part of the journal
        if not process.is_main:
            return
        print(f"time: {time.perf_counter() - began:.1f} s")
        journal.join()
        _report(folder, evaluation, settings, network.classes)
    if evaluation.failed:
        name, message = next(iter(evaluation.failed.items()))
        raise UserError(
            f"{len(evaluation.failed)} of {len(evaluation.failed) + evaluation.images} images could not be "
            f"evaluated and are missing in the scores; the first is {name!r}: {message}"
        )


def _report(folder: Path, evaluation: Evaluation, settings: dict[str, Any], classes: tuple[str, ...]) -> None:
    metrics, report = write_report(folder, evaluation, settings, classes)
    rich_print(score_table(evaluation.results))
    print(f"metrics: {metrics}\nreport: {report}")
    if evaluation.examples:  # all may have been evaluated before an interruption
        picture = folder / "evaluation.png"
        write_png(picture, evaluation_grid(evaluation.examples, classes))
        print(f"picture: {picture}")


def _header(network: Network, config: Config) -> dict[str, Any]:
    """Describe what is evaluated: two evaluations with equal headers give the same counts."""
    return {
        "classes": list(network.classes),
        "list": config.data.val_list,
        "root": str(config.data.root),
        "weights": fingerprint(network),
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"crf_workers", "training_limit"}),
        "cam": config.cam.model_dump(mode="json"),
        "amp": config.run.amp,
    }


def load_evaluation(options: argparse.Namespace) -> tuple[Network, Config, int | None]:
    """Load the network, the settings of its evaluation, and the iteration that it was saved at.

    A run's checkpoint carries its settings. An official one carries tensors alone: a recipe gives the settings, and
    the iteration is unknown.

    Args:
        options: the command line.

    Raises:
        UserError: a checkpoint that cannot be read, a recipe that is missing or not wanted, a setting out of range.
    """
    origin = str(options.checkpoint)
    weights = read_official(options.checkpoint)
    if weights is None:
        checkpoint = read_checkpoint(options.checkpoint)
        if options.config is not None:
            raise UserError(f"--config: {origin} carries the configuration of its run; leave the option out")
        config = build_config(_with_options(checkpoint["config"], options), origin)
        if options.root is None:
            check_origin(config, origin)
        return restore_network(checkpoint, origin), config, checkpoint["iteration"]
    if options.config is None:
        raise UserError(
            f"{origin}: an official checkpoint does not say what data it is for; add the recipe and the folder, "
            "e.g. --config configs/voc_official.yaml --root VOCdevkit/VOC2012"
        )
    config = build_config(_with_options(read_yaml(options.config), options), str(options.config))
    return restore_official(weights, origin), config, None


def check_origin(config: Config, origin: str) -> None:
    """Refuse to open an address that nobody has given but the checkpoint, which may be a stranger's.

    Args:
        config: of the checkpoint.
        origin: its file, for messages.

    Raises:
        UserError: the data are behind an address.
    """
    if isinstance(config.data.root, str):
        raise UserError(
            f"{origin}: names the address {config.data.root!r} for its data; checkpoints open no addresses by "
            "themselves: give it, or a folder, by --root"
        )


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder, checkpoint, official student.pth")
    parser.add_argument("--config", type=Path, help="recipe, for an official checkpoint: its data and evaluation")
    parser.add_argument("--root", help="folder or address of the data set, if not the folder of the training")
    parser.add_argument("--list", help="name of the list, if not the validation list of the training")
    parser.add_argument("--scales", type=float, nargs="+", help="scales of the segmentation")
    parser.add_argument("--no-flip", action="store_true", help="leave the mirror images of the segmentation out")
    parser.add_argument("--threshold", type=float, help="background score of the pseudo labels")
    parser.add_argument(
        "--crf",
        nargs="?",
        const=EvaluateConfig().crf_backend,
        choices=("pydensecrf", "exact"),
        help="also report the segmentation after the dense CRF; exact is for a GPU (pydensecrf unless given)",
    )
    parser.add_argument(
        "--protocol",
        choices=("own", "official"),
        help="sizes of the pictures: their own, or those of the official scripts (own unless given)",
    )
    parser.add_argument("--limit", type=int, help="evaluate only the first images")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument(
        "--output", type=Path, help="folder for metrics.json, report.md and pictures; by default that of the run"
    )
    return parser


def _with_options(config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "data": {"root": options.root, "val_list": options.list},
        "run": {"device": options.device},
        "evaluate": {
            "scales": options.scales,
            "flip": False if options.no_flip else None,
            "threshold": options.threshold,
            "crf": True if options.crf else None,
            "crf_backend": options.crf,
            "protocol": options.protocol,
            "limit": options.limit,
        },
    }
    merged = {name: {} for name in given} | config
    for name, section in given.items():
        if isinstance(merged[name], dict):  # the check of the whole recipe refuses anything else
            merged[name] = merged[name] | {key: value for key, value in section.items() if value is not None}
    return merged


def _default_folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


if __name__ == "__main__":
    run_command(main)
