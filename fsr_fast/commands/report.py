"""Write a report of one run, or a comparison of several, as one HTML page: `fsr-fast report RUN [RUN2 …]`.

The page holds curves, scores by class, the confusion matrix, a gallery of the best, worst and random pictures of the
validation list, the attention of the network, masks over the training, configuration and environment. It is one file
and needs no network.
"""

import argparse
from collections.abc import Sequence

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.models.build import open_trained
from fsr_fast.options import given
from fsr_fast.reporting.gallery import Gallery, look
from fsr_fast.reporting.page import is_page_of, render_page
from fsr_fast.reporting.record import RunRecord, read_run
from fsr_fast.runtime.checkpoint import list_checkpoints
from fsr_fast.runtime.distributed import start_process
from fsr_fast.runtime.files import write_text


def main(arguments: Sequence[str]) -> None:
    """Report as the arguments say."""
    options = parsers.report().parse_args(arguments)
    for name in ("limit", "rows"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)}; expected 1 or more")
    runs = [read_run(folder) for folder in options.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs: two of them have the same name: {', '.join(names)}; rename a folder")
    output = options.output or runs[0].folder / "report.html"
    if options.output is not None and output.exists() and not is_page_of(output, runs):
        raise UserError(f"--output: {output} exists and is not a report of these runs; delete it or give another name")
    galleries: dict[str, Gallery] = {}
    classes: tuple[str, ...] = ()
    for run in runs:
        if list_checkpoints(run.folder):
            galleries[run.name], found = _look_at(run, options)
            if classes and found != classes:
                raise UserError(f"{run.folder}: its classes {found} are not those of {runs[0].folder}, {classes}")
            classes = found
    write_text(output, render_page(runs, galleries, classes))
    print(f"report: {output}\nnext: open it in a browser; fsr-fast predict --checkpoint {runs[0].folder} PICTURES")


def _look_at(run: RunRecord, options: argparse.Namespace) -> tuple[Gallery, tuple[str, ...]]:
    trained = open_trained(run.folder, given(options), options.config, with_data=True)
    network, config = trained.network, trained.config
    train, validation = build_datasets(config.data, network.reading)
    dataset = validation if len(validation) else train
    trained.match_classes(dataset.classes)
    target = start_process(config.run.device).device
    gallery = look(network.to(target), dataset, config, target, limit=options.limit, rows=options.rows)
    return gallery, network.classes


if __name__ == "__main__":
    run_command(main)
