"""Evaluate a trained network: `fsr-fast evaluate --checkpoint RUN_OR_FILE`."""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich import print as rich_print

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.outputs import evaluation_folder, run_of
from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation.evaluator import Evaluation, evaluate_network
from fsr_fast.evaluation.journal import Journal, fingerprint
from fsr_fast.evaluation.report import write_report
from fsr_fast.models import Network
from fsr_fast.models.build import open_trained
from fsr_fast.options import Given, given
from fsr_fast.reporting.pictures import evaluation_grid
from fsr_fast.reporting.tables import score_table
from fsr_fast.runtime.distributed import Process, start_process, stop_process, wait_for_all
from fsr_fast.runtime.files import write_png
from fsr_fast.runtime.outputs import output_folder

PICTURES = 8


def main(arguments: Sequence[str]) -> None:
    """Evaluate as the arguments say."""
    options = parsers.evaluate().parse_args(arguments)
    changes = given(options)
    if options.crf:
        crf = {"evaluate.crf": Given("--crf", "true"), "evaluate.crf_backend": Given("--crf", options.crf)}
        changes = crf | changes
    trained = open_trained(options.checkpoint, changes, options.config, with_data=True)
    network, config, iteration = trained.network, trained.config, trained.iteration
    _, dataset = build_datasets(config.data, network.reading)
    trained.match_classes(dataset.classes)
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
    folder = options.output or evaluation_folder(options.checkpoint)
    settings = {"checkpoint": str(options.checkpoint), "iteration": iteration, "list": config.data.val_list}
    settings["protocol"] = config.evaluate.protocol
    whose = None if options.output is None else str((run_of(options.checkpoint) or options.checkpoint).resolve())
    with output_folder(folder, "evaluate", whose, own=options.output is None) if process.is_main else nullcontext():
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
            f"evaluated and are missing from the scores; the first is {name!r}: {message}"
        )


def _report(folder: Path, evaluation: Evaluation, settings: dict[str, Any], classes: tuple[str, ...]) -> None:
    metrics, report = write_report(folder, evaluation, settings, classes)
    rich_print(score_table(evaluation.results))
    print(f"metrics: {metrics}\nreport: {report}")
    if evaluation.examples:  # empty if all were evaluated before an interruption
        picture = folder / "evaluation.png"
        write_png(picture, evaluation_grid(evaluation.examples, classes))
        print(f"picture: {picture}")
    checkpoint = settings["checkpoint"]
    print(f"next: fsr-fast pseudo-labels --checkpoint {checkpoint}, or fsr-fast compare {folder} ANOTHER_EVALUATION")


def _header(network: Network, config: Config) -> dict[str, Any]:
    """Describe what is evaluated: two evaluations with equal headers have the same counts."""
    return {
        "classes": list(network.classes),
        "list": config.data.val_list,
        "root": str(config.data.root),
        "weights": fingerprint(network),
        "evaluate": config.evaluate.model_dump(mode="json", exclude={"crf_workers", "training_limit"}),
        "cam": config.cam.model_dump(mode="json"),
        "amp": config.run.amp,
        **network.reading.settings(),
    }


if __name__ == "__main__":
    run_command(main)
