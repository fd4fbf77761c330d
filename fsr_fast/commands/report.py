"""Write a report of one run, or a comparison of several, as one HTML page: `fsr-fast report RUN [RUN2 …]`.

The page holds curves, scores by class, the confusion matrix, a gallery of the best, worst and random pictures of the
validation list, the attention of the network, masks over the training, configuration and environment. It is one file
and needs no network.
"""

from collections.abc import Sequence
from pathlib import Path

from fsr_fast.cli import run_command
from fsr_fast.commands.evaluate import check_origin
from fsr_fast.config import Config, DataConfig, build_config
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.models.build import restore_network
from fsr_fast.options import Parser
from fsr_fast.reporting.gallery import Gallery, look
from fsr_fast.reporting.page import is_page_of, render_page
from fsr_fast.reporting.record import RunRecord, read_run
from fsr_fast.runtime.checkpoint import list_checkpoints, read_checkpoint
from fsr_fast.runtime.distributed import start_process
from fsr_fast.runtime.files import write_text


def main(arguments: Sequence[str]) -> None:
    """Report as the arguments say."""
    options = build_parser().parse_args(arguments)
    for name in ("limit", "rows"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)}; expected 1 or more")
    runs = [read_run(folder) for folder in options.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs: two of them have one name: {', '.join(names)}; rename a folder")
    output = options.output or runs[0].folder / "report.html"
    if options.output is not None and output.exists() and not is_page_of(output, runs):
        raise UserError(f"--output: {output} exists and is no report of these runs; delete it or give another name")
    galleries: dict[str, Gallery] = {}
    classes: tuple[str, ...] = ()
    for run in runs:
        if list_checkpoints(run.folder) and run.config.get("data", {}).get("val_list") is not None:
            galleries[run.name], found = _look_at(run, options.limit, options.rows, options.device, options.root)
            if classes and found != classes:
                raise UserError(f"{run.folder}: its classes {found} are not those of {runs[0].folder}, {classes}")
            classes = found
    write_text(output, render_page(runs, galleries, classes))
    print(f"report: {output}")


def _look_at(run: RunRecord, limit: int, rows: int, device: str, root: str | None) -> tuple[Gallery, tuple[str, ...]]:
    checkpoint = read_checkpoint(run.folder)
    config: Config = build_config(checkpoint["config"], str(run.folder))
    if root is None:
        check_origin(config, str(run.folder))
    else:
        data = DataConfig.model_validate({**config.data.model_dump(), "root": root})
        config = config.model_copy(update={"data": data})
    _, dataset = build_datasets(config.data)
    network = restore_network(checkpoint, str(run.folder))
    if dataset.classes != network.classes:
        raise UserError(f"data: its classes {dataset.classes} are not those of the run, {network.classes}")
    target = start_process(device).device
    return look(network.to(target), dataset, config, target, limit=limit, rows=rows), network.classes


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared")
    parser.add_argument("--output", type=Path, help="page to write; by default report.html in the first run's folder")
    parser.add_argument("--limit", type=int, default=200, help="pictures of the validation list to look at")
    parser.add_argument("--rows", type=int, default=6, help="best, worst and random pictures to show of each")
    parser.add_argument("--root", help="folder or address of the data set, if not the folder of the training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


if __name__ == "__main__":
    run_command(main)
