"""How threads that wait affect the demonstration beside another program: ``python -m bench.waiting``.

Trains the same short run under three settings of OpenMP, alone and beside a process that keeps one core busy.
``FSR_RECORD=1`` writes ``bench/results/<device>/waiting.json``.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.harness import record
from fsr_fast.cli import run_command
from fsr_fast.reporting.tracking import read_metrics

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
SETTINGS = {
    "openmp": {},
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
ITERATIONS, LOG_EVERY = 150, 50


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep cores busy with processes that do nothing else."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def train(setting: dict[str, str], threads: int, recipe: Sequence[str]) -> float:
    """Train for a short while; return the median pictures per second after the first interval."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with tempfile.TemporaryDirectory() as folder:
        options = {"run.output": folder, "run.log_every": LOG_EVERY, "run.picture_every": 0, "evaluate.limit": 1}
        options |= {"optim.iterations": ITERATIONS, "optim.warmup": 0}
        named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "fsr_fast.train", *named, *recipe]
        subprocess.run(
            command, env={**kept, "OMP_NUM_THREADS": str(threads), **setting}, check=True, stdout=subprocess.DEVNULL
        )
        rates = [line["images_per_second"] for line in read_metrics(Path(folder)) if "images_per_second" in line]
    return statistics.median(rates[1:])


def main(arguments: Sequence[str]) -> None:
    """Measure every setting, the settings in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.waiting", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the training; by default all")
    parser.add_argument("--rounds", type=int, default=2)
    options, recipe = parser.parse_known_args(arguments)
    for others in (0, 1):
        rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(options.rounds):
            for name, setting in SETTINGS.items():
                with busy(others):
                    rates[name].append(train(setting, options.threads, recipe))
                print(f"{others} other processes, {name}: {rates[name][-1]:.1f} pictures/s", flush=True)
        content = {"threads": options.threads, "cores": os.cpu_count(), "others": others, "pictures_per_second": rates}
        record(f"waiting {others} {options.threads}", torch.device("cpu"), content)


if __name__ == "__main__":
    run_command(main)
