"""Write a trained network for the official code: `fsr-fast export --checkpoint RUN --output student.pth`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fsr_fast.cli import run_command
from fsr_fast.errors import UserError
from fsr_fast.models import Network, load_network
from fsr_fast.models.build import restore_network
from fsr_fast.models.official import official_state_dict
from fsr_fast.options import Parser
from fsr_fast.runtime.checkpoint import read_checkpoint


def main(arguments: Sequence[str]) -> None:
    """Export as the arguments say."""
    options = build_parser().parse_args(arguments)
    if options.output.exists():
        raise UserError(f"--output: {options.output} exists; delete it or give another name")
    network = load_teacher(options.checkpoint) if options.teacher else load_network(options.checkpoint)
    weights = official_state_dict(network)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(f".{options.output.name}.partial")
    torch.save(weights, partial)
    partial.replace(options.output)
    print(
        f"{options.output}: {len(weights)} tensors; images are normalised by ImageNet's mean and deviation; the file "
        f"holds no names of the {len(network.classes)} classes: {', '.join(network.classes)}"
    )


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


def build_parser() -> Parser:
    """Give the parser of this verb."""
    parser = Parser("export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint file")
    parser.add_argument("--to", choices=("official",), default="official", help="state dict of the official code")
    parser.add_argument("--output", type=Path, required=True, help="file to write, e.g. student.pth")
    parser.add_argument("--teacher", action="store_true", help="the averaged network instead of the student")
    return parser


if __name__ == "__main__":
    run_command(main)
