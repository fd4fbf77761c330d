"""Write a trained network for other programs: `fsr-fast export --checkpoint RUN --to onnx --output network.onnx`.

safetensors: a folder with weights, description and a card with the scores, for `fsr_fast.from_pretrained(folder)`.
onnx, torch: one function of pictures of any number and size, checked against the network after it was written.
official: the state dict of the official code.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fsr_fast.cli import run_command
from fsr_fast.config import ModelConfig, build_config
from fsr_fast.errors import UserError
from fsr_fast.evaluation.portable import write_onnx, write_program
from fsr_fast.models import Network, load_network
from fsr_fast.models.build import restore_network
from fsr_fast.models.folder import is_network_folder, read_folder, write_network
from fsr_fast.models.official import official_sizes, official_state_dict, read_official
from fsr_fast.options import Parser
from fsr_fast.reporting.card import model_card
from fsr_fast.reporting.record import read_run
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.files import atomic_path
from fsr_fast.runtime.terminal import working


def main(arguments: Sequence[str]) -> None:
    """Export as the arguments say."""
    options = build_parser().parse_args(arguments)
    if options.output.exists():
        raise UserError(f"--output: {options.output} exists; delete it or give another name")
    network = load_teacher(options.checkpoint) if options.teacher else load_network(options.checkpoint)
    with working(f"exporting to {options.output}"), atomic_path(options.output) as partial:
        if options.to == "safetensors":
            _write_folder(network, options, partial)
        elif options.to == "official":
            with partial.open("xb") as file:
                torch.save(official_state_dict(network), file)
        else:
            (write_onnx if options.to == "onnx" else write_program)(network, partial)
    print(f"{options.output}: {_REMARKS[options.to]}; classes: {', '.join(network.classes)}")


_REMARKS = {
    "safetensors": "read it by fsr_fast.from_pretrained",
    "onnx": "RGB in 0…1, (B, 3, H, W), of any number and size, to segmentation, scores and cams",
    "torch": "read it by torch.export.load; RGB in 0…1, (B, 3, H, W), to segmentation, scores and cams",
    "official": "images are normalised by ImageNet's mean and deviation; the file holds no names of the classes",
}


def load_teacher(path: Path) -> Network:
    """Load the averaged network of a run.

    Where only the projector is averaged, the rest is the student's: such a teacher's encoder is the student's.

    Args:
        path: run folder or checkpoint file.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another kind.
    """
    checkpoint = read_checkpoint(path)
    averaged = {}
    for name, value in checkpoint["teacher"].items():
        part, _, rest = name.partition(".")
        averaged[rest if part == "network" else f"projector.{rest}"] = value
    return restore_network({**checkpoint, "student": checkpoint["student"] | averaged}, str(path))


def _write_folder(network: Network, options: argparse.Namespace, folder: Path) -> None:
    checkpoint: Path = options.checkpoint
    run = read_run(checkpoint) if (checkpoint / "config.yaml").is_file() else None
    if run is not None and options.teacher:
        run = replace(run, summary={**run.summary, "results": {}})  # the scores are the student's
    folder.mkdir()
    write_network(network, _model_config(checkpoint), folder)
    (folder / "README.md").write_text(model_card(options.output.name, network, run), encoding="utf-8")


def _model_config(path: Path) -> ModelConfig:
    if is_network_folder(path):
        return read_folder(path)[0].model
    weights = read_official(path)
    if weights is not None:
        return official_sizes(weights, str(path)).model
    return build_config(read_checkpoint(path)["config"], str(path)).model


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser("export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, checkpoint, exported folder, official student.pth"
    )
    parser.add_argument("--to", choices=tuple(_REMARKS), default="safetensors", help="what to write")
    parser.add_argument("--output", type=Path, required=True, help="file to write; for safetensors a folder")
    parser.add_argument("--teacher", action="store_true", help="the averaged network instead of the student")
    return parser


if __name__ == "__main__":
    run_command(main)
