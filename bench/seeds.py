"""Train the demonstration from several seeds: ``python -m bench.seeds``, which is ``make seeds``.

Each seed has a run folder of its own below ``--output``. A finished run is read, not repeated; an interrupted one is
resumed. ``FSR_RECORD=1`` writes ``bench/results/<device>/seeds.json``, from which ``python -m bench.plot`` makes the
table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import record
from fsr_fast import train
from fsr_fast.cli import run_command
from fsr_fast.reporting.tracking import read_metrics

KINDS = ("pseudo", "seg")


def run_seed(seed: int, output: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Train the demonstration from one seed, unless that has been done.

    Args:
        seed: of the run.
        output: folder of all runs.
        options: of the recipe, `--section.key value`.

    Returns:
        By kind (`pseudo`, `seg`): `mean`, and `classes` with the IoU of the background and of each class, in percent;
        `images_per_second`; `commit` that trained it; `curve`, the mIoUs of the intermediate evaluations, each with
        `iteration` and `wall_seconds`.
    """
    folder = output / f"seed_{seed}"
    if not (folder / "summary.json").is_file():
        train.main(["--run.seed", str(seed), "--run.output", str(folder), *options])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    scores = {
        kind: {
            "mean": result["mean_iou"],
            "classes": {name: values["iou"] for name, values in result["classes"].items()},
        }
        for kind, result in summary["results"].items()
        if kind in KINDS
    }
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    names = ("iteration", "wall_seconds", *(f"{kind}_miou" for kind in KINDS))
    curve = [{name: line[name] for name in names} for line in read_metrics(folder) if "seg_miou" in line]
    measured = {"images_per_second": summary["images_per_second"], "commit": environment["commit"]}
    return {**scores, **measured, "curve": curve}


def main(arguments: Sequence[str]) -> None:
    """Train and record every seed."""
    parser = argparse.ArgumentParser(prog="python -m bench.seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--name", default="seeds", help="name of the JSON file, if other options are measured")
    options, recipe = parser.parse_known_args(arguments)
    for seed in options.seeds:
        scores = run_seed(seed, options.output, recipe)
        worst = {kind: min(scores[kind]["classes"].items(), key=lambda item: item[1]) for kind in KINDS}
        print(
            f"seed {seed}: "
            + ", ".join(f"{k} {scores[k]['mean']:.1f} (worst {worst[k][0]} {worst[k][1]:.1f})" for k in KINDS)
        )
        setting = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
        content = {"seed": seed, "options": list(recipe), **setting, **scores}
        record(f"{options.name} {seed}", torch.device("cpu"), content)


if __name__ == "__main__":
    run_command(main)
