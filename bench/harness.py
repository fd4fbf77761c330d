"""Shared set-up of the kernel benches: one call times eager PyTorch, ``torch.compile`` of it, and ours.

A bench file holds the inputs, the two functions and the floor (bytes and FLOPs that must be moved and done)::

    def test_affinity_loss(benchmark, device):
        B, N, D = size(device, gpu=(16, 784, 768), cpu=(2, 49, 64))

        def inputs(generator):
            features = torch.randn(B, N, D, generator=generator).to(device).requires_grad_()
            return features, torch.randint(0, 3, (B, N), generator=generator).to(device)

        floor = Floor(forward_bytes=4 * B * N * D, forward_flops=2 * B * N * N * D, ...)
        compare(benchmark, device, "affinity_loss fp32", ours=affinity_loss, eager=plain, inputs=inputs, floor=floor)

On a GPU: medians with 20th and 80th percentiles of CUDA events, cold L2, rotating random inputs, A and B alternating
in one process, and the share of the roofline, whose ceilings (copy, matrix product) are measured in the same process.
Where a call takes microseconds, the time in which Python launches it would hide them: ``graph=True`` also replays the
calls as one CUDA graph, and the roofline is compared with that.
On a CPU: the torch path at a small size beside eager, as a ratio only; ``torch.compile`` is left out, since compiling
takes longer than it is worth. ``FSR_RECORD=1`` writes ``bench/results/<device>/<bench>.json``.
"""

import functools
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
ROTATION = 4  # input sets in turn, so that no time depends on one draw
ROUNDS = 5  # alternations of the implementations

Size = TypeVar("Size")
Inputs = Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Floor:
    """Minimum work of one call: bytes moved to and from memory, and floating-point operations.

    Backward figures are those of the backward pass alone; leave them 0 for an operation without gradient.
    """

    forward_bytes: float
    forward_flops: float
    backward_bytes: float = 0.0
    backward_flops: float = 0.0

    def seconds(self, phase: str, ceilings: dict[str, float]) -> float:
        """The roofline's time for a phase: the slower of memory and arithmetic."""
        both = phase != "forward"
        moved = self.forward_bytes + both * self.backward_bytes
        done = self.forward_flops + both * self.backward_flops
        return max(moved / ceilings["bytes_per_second"], done / ceilings["flops_per_second"])


def size(device: torch.device, *, gpu: Size, cpu: Size) -> Size:
    """The shape to measure on this device."""
    return gpu if device.type == "cuda" else cpu


def compare(
    benchmark: Any,
    device: torch.device,
    case: str,
    *,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Inputs,
    floor: Floor,
    dtype: torch.dtype = torch.float32,
    amp: bool = False,
    graph: bool = False,
) -> None:
    """Time ours against eager PyTorch (and its compiled form on a GPU) and report beside the roofline.

    Args:
        benchmark: the pytest-benchmark fixture; its table holds ours, the rest is in ``extra_info``.
        device: where the inputs live.
        case: name of the case, the bench's name first: ``"affinity_loss bf16"``.
        ours: the public operation with all options bound.
        eager: the same maths in plain PyTorch, same arguments.
        inputs: returns one set of fresh arguments from a seeded CPU generator; leaves that require a gradient are
            differentiated, and without any only the forward pass is timed.
        floor: the minimum work.
        dtype: of the matrix products, for the ceiling.
        amp: on a GPU call under autocast to bfloat16, as a training step does.
        graph: on a GPU also time all implementations as CUDA graphs; none of them may read back from the device.
    """
    sets = [inputs(torch.Generator().manual_seed(seed)) for seed in range(ROTATION if device.type == "cuda" else 1)]
    trainable = any(isinstance(value, Tensor) and value.requires_grad for value in sets[0])
    phases = ["forward", "forward + backward"] if trainable else ["forward"]
    functions = {"eager": eager, "ours": ours}
    if device.type == "cuda":
        torch.compiler.reset()  # all cases compile one function, which Dynamo recompiles only a few times
        functions = {"eager": eager, "compiled": torch.compile(eager, dynamic=False), "ours": ours}
        if amp:
            functions = {name: torch.autocast("cuda", torch.bfloat16)(call) for name, call in functions.items()}
        ceilings = _ceilings(dtype)
        rows = [row for phase in phases for row in _time_on_gpu(functions, sets, phase, floor, ceilings, graph)]
    else:
        ceilings = {}
        rows = [row for phase in phases for row in _time_on_cpu(functions, sets, phase)]
    print("\n" + "\n".join(_line(case, row) for row in rows))
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(_waiting(_call(functions["ours"], sets, phases[-1]), device), rounds=3, warmup_rounds=1)
    record(case, device, {"floor": asdict(floor), "ceilings": ceilings, "rows": rows})


def _call(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], phase: str) -> Callable[[], None]:
    """Return a function that runs one phase on the next set of inputs."""
    turn = itertools.cycle(sets)

    def forward() -> None:
        with torch.no_grad():
            function(*next(turn))

    def forward_and_backward() -> None:
        arguments = next(turn)
        output = function(*arguments)
        outputs = [output] if isinstance(output, Tensor) else [part for part in output if part.requires_grad]
        leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(part) for part in outputs], allow_unused=True)

    return forward if phase == "forward" else forward_and_backward


def _time_on_gpu(
    functions: dict[str, Callable[..., Any]],
    sets: Sequence[tuple[Any, ...]],
    phase: str,
    floor: Floor,
    ceilings: dict[str, float],
    graph: bool,
) -> list[dict[str, Any]]:
    """Return the median of the rounds' medians per implementation, taken in turn, and one call's peak memory."""
    from triton.testing import do_bench, do_bench_cudagraph

    calls = {name: _call(function, sets, phase) for name, function in functions.items()}
    rounds: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(do_bench(call, warmup=10, rep=40, quantiles=[0.5, 0.2, 0.8]))
    rows = []
    for name, call in calls.items():
        median, low, high = (sorted(values)[ROUNDS // 2] for values in zip(*rounds[name], strict=True))
        row = {"implementation": name, "phase": phase, "median_ms": median, "p20_ms": low, "p80_ms": high}
        if graph:
            row["graph_ms"] = do_bench_cudagraph(call, return_mode="median")
        share = floor.seconds(phase, ceilings) / (row.get("graph_ms", median) * 1e-3)
        rows.append(row | {"peak_bytes": _peak_bytes(call), "roofline_percent": 100 * share})
    return rows


def _time_on_cpu(
    functions: dict[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]], phase: str
) -> list[dict[str, Any]]:
    """Return the median wall time of a few alternating calls."""
    calls = {name: _call(function, sets, phase) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return [
        {"implementation": name, "phase": phase, "median_ms": sorted(values)[ROUNDS // 2]}
        for name, values in times.items()
    ]


def _peak_bytes(call: Callable[[], None]) -> int:
    """Return the memory of one call beyond its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _waiting(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Wrap a call so that it returns only once the GPU has finished."""

    def call_and_wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call_and_wait


@functools.cache
def _ceilings(dtype: torch.dtype) -> dict[str, float]:
    """Measure this GPU: bytes per second in a copy of 1 GiB, FLOPs per second in an 8192³ matrix product."""
    from triton.testing import do_bench

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    matmul_ms = do_bench(lambda: left @ right, return_mode="median")
    return {
        "bytes_per_second": 2 * source.nbytes / (copy_ms * 1e-3),
        "flops_per_second": 2 * 8192**3 / (matmul_ms * 1e-3),
    }


def _line(case: str, row: dict[str, Any]) -> str:
    """Format one row."""
    text = f"{case:36} {row['phase']:18} {row['implementation']:9} {row['median_ms']:9.4f} ms"
    if "graph_ms" in row:
        text += f", {row['graph_ms']:.4f} ms as a graph"
    if "roofline_percent" in row:
        text += f" ({row['p20_ms']:.4f}-{row['p80_ms']:.4f}), {row['roofline_percent']:5.1f} % of the roofline, "
        text += f"{row['peak_bytes'] / 2**20:.1f} MiB"
    return text


def present_commit(folder: Path = RESULTS.parent) -> str:
    """Return the commit that is checked out in a folder; empty if it is not under git."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the name of the device's folder in ``bench/results``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    return name.replace(" ", "-")


def record(case: str, device: torch.device | str, content: dict[str, Any]) -> None:
    """Add or replace a case in the JSON of its bench and device, if ``FSR_RECORD=1`` is set.

    Args:
        case: the bench's name, which is the file's, then what distinguishes the case.
        device: that was measured; the name of one that is not there.
        content: the measurement; device, versions and commit are added.
    """
    if os.environ.get("FSR_RECORD") != "1":
        return
    name = device if isinstance(device, str) else device_name(device)
    file = RESULTS / name / f"{case.split()[0]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    cases = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    versions = {"torch": torch.__version__, "triton": version("triton"), "commit": present_commit()}
    cases[case] = {"device": name, **versions, **content}
    file.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
