"""Write a trained network for other programs: `fsr-fast export --checkpoint RUN --to onnx --output network.onnx`.

safetensors: a folder with weights, description and a card with the scores, for `fsr_fast.from_pretrained(folder)`.
onnx, torch: one function of pictures of any number and size, compared with the network after writing.
official: the state dict of the official code.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.outputs import default_output
from fsr_fast.errors import UserError
from fsr_fast.evaluation.portable import write_onnx, write_program
from fsr_fast.models import Network
from fsr_fast.models.build import open_trained
from fsr_fast.models.folder import write_network
from fsr_fast.models.official import official_state_dict
from fsr_fast.options import given
from fsr_fast.reporting.card import model_card
from fsr_fast.reporting.record import read_run
from fsr_fast.runtime.files import atomic_path
from fsr_fast.runtime.terminal import working


def main(arguments: Sequence[str]) -> None:
    """Export as the arguments say."""
    options = parsers.export().parse_args(arguments)
    options.to = options.to or _ENDINGS.get(options.output.suffix if options.output else "", "safetensors")
    options.output = options.output or default_output(options.checkpoint, f"exported/{_NAMES[options.to]}")
    if options.output.exists():
        raise UserError(f"--output: {options.output} exists; delete it or give another name")
    network = open_trained(options.checkpoint, given(options), teacher=options.teacher).network
    with working(f"exporting to {options.output}"), atomic_path(options.output) as partial:
        if options.to == "safetensors":
            _write_folder(network, options, partial)
        elif options.to == "official":
            with partial.open("xb") as file:
                torch.save(official_state_dict(network), file)
        else:
            (write_onnx if options.to == "onnx" else write_program)(network, partial)
    channels = network.config.in_chans
    remark = _REMARKS[options.to].format("RGB" if channels == 3 else "channels", channels)
    print(f"{options.output}: {remark}; classes: {', '.join(network.classes)}")
    if options.to in _NEXT:
        print(f"next: {_NEXT[options.to].format(options.output)}")


_NAMES = {"safetensors": "network", "onnx": "network.onnx", "torch": "network.pt2", "official": "student.pth"}
_ENDINGS = {Path(name).suffix: to for to, name in _NAMES.items() if Path(name).suffix}
_REMARKS = {
    "safetensors": "read it by fsr_fast.from_pretrained",
    "onnx": "{} in 0…1, (B, {}, H, W), of any number and size, to segmentation, scores and cams",
    "torch": "read it by torch.export.load; {} in 0…1, (B, {}, H, W), to segmentation, scores and cams",
    "official": "images are normalised by ImageNet's mean and standard deviation; the file holds no class names",
}
_NEXT = {
    "safetensors": "fsr-fast predict --checkpoint {} PICTURES",
    "onnx": 'in Python, onnxruntime.InferenceSession("{}").run(None, {{"images": pictures}})',
    "torch": 'in Python, torch.export.load("{}").module()(pictures)',
}


def _write_folder(network: Network, options: argparse.Namespace, folder: Path) -> None:
    checkpoint: Path = options.checkpoint
    run = read_run(checkpoint) if (checkpoint / "config.yaml").is_file() else None
    if run is not None and options.teacher:
        run = replace(run, summary={**run.summary, "results": {}})  # the scores are the student's
    folder.mkdir()
    write_network(network, folder)
    (folder / "README.md").write_text(model_card(options.output.name, network, run), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
