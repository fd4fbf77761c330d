"""Check and measure everything on a GPU, part by part: ``make gpu``, which is ``python -m bench.gpu``.

A part that has passed at this commit is not run again, so that the command can be repeated after an interruption or
with a few minutes at a time (``--minutes 8``). What ran is listed in ``bench/results/<gpu>/parts``; the log of each
part is beside it while the commit stays the same.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, device_name, present_commit
from fsr_fast.cli import run_command
from fsr_fast.errors import UserError

ROOT = RESULTS.parent.parent
LONGEST = 480
"""Seconds after which a part is stopped."""
FIRST = ("attention_backends", "paper-vit_base")
"""Parts of the bench of whole steps that come right after the kernels' checks."""
SPLIT = {
    "test_step": (*FIRST, "official", "cuda_graphs", "vit_small", "vit_tiny", "the_batch", "the_processes"),
}
"""Benches that would take longer, divided into parts: substrings of their tests' names."""
NEXT = ("test_data", "test_crf", "test_evaluation")
"""Benches that come before those of single kernels."""
Parts = dict[str, list[str]]


def list_parts() -> Parts:
    """Return every part and its command, the most informative first.

    The kernels' checks, the step with each attention backend and the waterfall; ours beside the reference; the official
    preset, the data path, the CRF; the demonstration by both engines; then everything else.
    """
    pytest = [sys.executable, "-m", "pytest"]
    benches = [path.stem for path in sorted((ROOT / "bench").glob("test_*.py"))]

    def bench(name: str, chosen: str = "") -> None:
        parts[f"bench {name} {chosen}".strip()] = [*pytest, f"bench/{name}.py", "-k", chosen]

    checks = [*pytest, "-n", "6", "-m", "gpu"]  # nearly all of their time is compiling
    parts = {"check kernels": [*checks, "tests/kernels"]}
    for chosen in FIRST:
        bench("test_step", chosen)
    step = [sys.executable, "-m", "bench.step", "--batch", "16", "--iterations", "10"]
    ours = ["--amp", "bf16", "--compile", "--graphs"]
    parts["step ours"] = [*step, *ours]
    parts["profile"] = [sys.executable, "-m", "bench.profile", "--batch", "16", *ours]
    parts["step reference"] = [*step, "--engine", "reference", "--amp", "bf16"]
    bench("test_step", "official")
    for name in NEXT:
        bench(name)
    for engine, amp in (("fast", "bf16"), ("reference", "off")):
        run = ["--run.engine", engine, "--run.amp", amp, "--run.output", f"runs/gpu_{engine}"]
        parts[f"train {engine}"] = [sys.executable, "-m", "fsr_fast", "train", "--run.device", "cuda", *run]
    for name in benches:
        for chosen in SPLIT.get(name, ("",)):
            bench(name, chosen)  # those above keep their place
    parts["check the rest"] = [*checks, "tests", "--ignore", "tests/kernels"]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        small = [*pytest, "-m", "gpu", "tests/kernels/test_cross_attention.py", "-x"]
        parts["memory check"] = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *small]
    return parts


def rehearse(parts: Parts, folder: Path) -> list[str]:
    """Start every part without its work: tests are collected, settings are resolved.

    Args:
        parts: commands by name.
        folder: for logs.

    Returns:
        Names of the parts that do not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, command in parts.items():
        dry = "--collect-only" if "pytest" in command else "--print-config"
        part = _run([*command, dry], folder / f"{name.replace(' ', '_')}.log", time.monotonic)
        print(f"{name}: {'starts' if part['passed'] else 'FAILS'}, {part['last']}", flush=True)
        if not part["passed"]:
            failed.append(name)
    return failed


def run_parts(
    parts: Parts,
    folder: Path,
    commit: str,
    *,
    minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, dict[str, Any]]:
    """Run the parts that have not passed at this commit.

    Args:
        parts: commands by name.
        folder: for logs and parts.json, which is written after every part.
        commit: to be checked; the record of another one is dropped.
        minutes: no part is begun after that; None: all are run.
        clock: seconds; replaced in tests.

    Returns:
        Of every part that was run: `passed`, `seconds`, the last line that it printed, `tests` that ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parts.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    done: dict[str, dict[str, Any]] = record["parts"] if record.get("commit") == commit else {}
    began = clock()
    for name, command in parts.items():
        if done.get(name, {}).get("passed"):
            continue
        if minutes is not None and clock() - began > 60 * minutes:
            break
        done[name] = _run(command, folder / f"{name.replace(' ', '_')}.log", clock)
        file.write_text(json.dumps({"commit": commit, "parts": done}, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {'passed' if done[name]['passed'] else 'FAILED'}, {done[name]['last']}", flush=True)
    return done


def _run(command: list[str], log: Path, clock: Callable[[], float]) -> dict[str, Any]:
    began = clock()
    with log.open("w", encoding="utf-8") as file:
        try:
            environment = os.environ | {"FSR_RECORD": "1"}
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=LONGEST, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            file.write(f"\nstopped after {LONGEST} s\n")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    found = re.search(r"(\d+) passed", lines[-1])
    # pytest's exit code 5: no test in this file needs a GPU
    passed = code == 0 or (code == 5 and "deselected" in lines[-1])
    return {
        "passed": passed,
        "seconds": round(clock() - began, 1),
        "tests": int(found[1]) if found else 0,
        "last": lines[-1],
    }


def main(arguments: list[str]) -> None:
    """Run all parts, then draw and tabulate what they recorded."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, help="begin no part after this many; the next call continues")
    parser.add_argument("--rehearse", action="store_true", help="only check that each part starts; needs no GPU")
    options = parser.parse_args(arguments)
    if options.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            failed = rehearse(list_parts(), Path(folder))
        if failed:
            raise UserError(f"make gpu: {', '.join(failed)}: the command does not start; run it by hand to see why")
        return
    if not torch.cuda.is_available():
        raise UserError(
            "make gpu: torch sees no CUDA GPU; on a CPU, make test and make bench check what can be checked"
        )
    parts, folder = list_parts(), RESULTS / device_name(torch.device("cuda")) / "parts"
    done = run_parts(parts, folder, present_commit(), minutes=options.minutes)
    missing = [name for name in parts if not done.get(name, {}).get("passed")]
    print(
        f"{sum(part['tests'] for part in done.values())} tests ran; {len(parts) - len(missing)} of {len(parts)} passed"
    )
    if missing:
        raise UserError(f"not passed: {', '.join(missing)}; see the logs in {folder}, and repeat the command")
    subprocess.run([sys.executable, "-m", "bench.plot"], cwd=ROOT, check=True)


if __name__ == "__main__":
    run_command(main)
