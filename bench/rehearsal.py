"""Rehearse a training at full size: ``python -m bench.rehearsal --layout voc`` (or ``coco``).

Makes a data set with the counts of the real one and runs what depends on the count: start-up, an epoch of the loader
from files and from shards by both pipelines, ``data check``, ``data pack``, and evaluation, pseudo labels and report of
a network of one block. Each part is a process of its own; its seconds, memory and open files include all its child
processes. ``--divide 10`` uses a tenth of the counts: the comparison shows what grows with the count.
``FSR_RECORD=1`` writes ``bench/results/<device>/rehearsal.json``.
"""

import argparse
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.harness import record
from bench.rehearsal_sets import Layout, make_set
from fsr_fast.cli import run_command
from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError

PERIOD = 1.0
"""Seconds between two samples of a part's processes."""
BATCH, WORKERS = 8, 2
NETWORK = {
    "model.backbone": "vit_tiny_patch16_224",
    "model.backbone_options": "{img_size: 64, embed_dim: 32, depth: 1, num_heads: 1}",
    "model.pretrained": "none",
    "model.aux_block": "-1",
    "model.decoder_width": "16",
    "model.projector_hidden": "16",
    "model.bottleneck": "16",
    "model.prototypes": "16",
    "cam.scales": "[1.0]",
    "evaluate.scales": "[1.0]",
    "evaluate.flip": "false",
    "data.image_size": "64",
    "data.workers": "0",
    "data.pipeline": "torch",
    "optim.iterations": "2",
    "optim.warmup": "0",
    "optim.batch_size": "2",
    "run.device": "cpu",
}
"""A network whose cost is small compared with reading, resizing and counting."""


def list_parts(layout: str, root: Path, work: Path, limit: int | None, size: int) -> dict[str, list[str]]:
    """Return every part and its command, in the order in which they are run.

    Args:
        layout: `voc` or `coco`.
        root: folder of the data set.
        work: folder for shards, the run and labels.
        limit: number of images for evaluation and pseudo labels; None: all.
        size: side of the loader's views, in pixels.
    """
    module, verb = [sys.executable, "-m", "bench.rehearsal"], [sys.executable, "-m", "fsr_fast"]
    loader = [*module, "--layout", layout, "--size", str(size), "--load"]
    shards, run = work / "shards", work / "run"
    options = NETWORK | {
        "data.dataset": layout,
        "data.root": str(root),
        "run.output": str(run),
        "data.val_list": "null",
    }
    options |= {"data.train_list": "train"} if layout == "coco" else {}
    recipe = [text for key, value in options.items() for text in (f"--{key}", value)]
    some = ["--limit", str(limit)] if limit else []
    parts = {
        "start-up": [*loader, "none", "--folder", str(root)],
        "data check": [*verb, "data", "check", str(root), "--accept", "duplicate"],  # the linked ones
        "data pack": [*verb, "data", "pack", str(root), "--output", str(shards)],
    }
    for source, folder in (("files", root), ("shards", shards)):
        for pipeline in ("torch", "dali"):
            parts[f"epoch of {source}, {pipeline}"] = [*loader, pipeline, "--source", source, "--folder", str(folder)]
    return parts | {
        "two iterations": [*verb, "train", "--config", "voc_vit_b", *recipe],
        "evaluate": [*verb, "evaluate", "--checkpoint", str(run), "--list", "val", *some],
        "pseudo-labels": [*verb, "pseudo-labels", "--checkpoint", str(run), "--output", str(work / "labels"), *some],
        "report": [*verb, "report", str(run)],
    }


def open_data(layout: str, source: str, folder: Path) -> DataConfig:
    """Return the configuration of a data set's files or shards."""
    train = "train" if layout == "coco" else "train_aug"
    return DataConfig(
        dataset="shards" if source == "shards" else layout,
        root=folder,
        train_list=train,
        val_list="val",
        workers=WORKERS,
    )


def load_epoch(layout: str, source: str, folder: Path, pipeline: str, size: int) -> int:
    """Open a data set, and load one epoch with a pipeline unless it is `none`.

    Returns:
        Number of training images.
    """
    data = open_data(layout, source, folder).model_copy(update={"pipeline": pipeline, "image_size": size})
    train, _ = build_datasets(data)
    if pipeline == "none":
        return len(train)
    norm: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    loader = build_train_loader(
        train, data, AugmentConfig(), batch_size=BATCH, rank=0, world_size=1, seed=0, device="cpu", **norm
    )
    for batch in islice(loader, len(train) // BATCH):
        assert batch.views[0].shape == (BATCH, 3, size, size)
    loader.close()
    return len(train)


def run_part(command: Sequence[str], log: Path) -> dict[str, Any]:
    """Run a command and watch it with all its child processes.

    Args:
        command: to run.
        log: file for its output.

    Returns:
        `seconds` of wall time; `cpu_seconds` of all processes, which other work on the machine affects less;
        `memory_mib`, the peak of their summed proportional set sizes; `open_files`, the most at once.

    Raises:
        UserError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = {"memory_mib": 0.0, "open_files": 0}
    began, used = time.perf_counter(), _cpu_seconds()
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(list(command), stdout=file, stderr=subprocess.STDOUT)
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(process, peak, done))
        watch.start()
        code = process.wait()
        done.set()
        watch.join()
    if code:
        raise UserError(f"{' '.join(command)}: exit code {code}; see {log}")
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - used
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), **peak}


def _cpu_seconds() -> float:
    """Return the CPU time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch(process: psutil.Process, peak: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(PERIOD):
        memory, files = 0.0, 0
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for member in family:
            try:
                memory += member.memory_full_info().pss / 2**20
                files += member.num_fds()
            except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                continue
        peak["memory_mib"], peak["open_files"] = max(peak["memory_mib"], round(memory)), max(peak["open_files"], files)


def rehearse(layout: Layout, parts: Mapping[str, Sequence[str]], logs: Path, options: argparse.Namespace) -> None:
    """Run parts, print and record the cost of each."""
    name, images = options.layout, [one.images for one in layout.parts]
    for part, command in parts.items():
        measured = run_part(command, logs / f"{part.replace(' ', '_')}.log")
        limited = options.limit if part in ("evaluate", "pseudo-labels") else None
        print(f"{name} {part}: " + ", ".join(f"{key} {value}" for key, value in measured.items()), flush=True)
        content = {"layout": name, "part": part, "images": images, "limit": limited, **measured}
        content |= {"size": options.size} if part.startswith("epoch") else {}
        record(f"rehearsal {name} {images[0]} {part}", torch.device("cpu"), content)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__)
    parser.add_argument("--layout", choices=("voc", "coco"), required=True)
    parser.add_argument("--divide", type=int, default=1, help="all counts are divided by this")
    parser.add_argument("--folder", type=Path, help="of the data set (default: data/rehearsal/LAYOUT_DIVISOR)")
    parser.add_argument("--parts", nargs="+", default=[], help="run only these parts")
    parser.add_argument("--limit", type=int, help="number of images for evaluation and pseudo labels")
    parser.add_argument("--size", type=int, default=448, help="side of the views, in pixels")
    parser.add_argument("--load", choices=("none", "torch", "dali"), help="act as a part: open the set, load an epoch")
    parser.add_argument("--source", choices=("files", "shards"), default="files", help="of --load")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Rehearse, or act as one of the rehearsal's parts."""
    options = build_parser().parse_args(arguments)
    if options.load:
        count = load_epoch(options.layout, options.source, options.folder, options.load, options.size)
        print(f"{count} training images")
        return
    root = options.folder or Path("data/rehearsal") / f"{options.layout}_{options.divide}"
    work = root.with_name(f"{root.name}_work")
    parts = list_parts(options.layout, root, work, options.limit, options.size)
    unknown = set(options.parts) - set(parts)
    if unknown:
        raise UserError(f"--parts: unknown: {', '.join(sorted(unknown))}; known: {'; '.join(parts)}")
    root.parent.mkdir(parents=True, exist_ok=True)
    layout = make_set(root, options.layout, options.divide)
    rehearse(layout, {part: parts[part] for part in options.parts or parts}, work / "logs", options)


if __name__ == "__main__":
    run_command(main)
