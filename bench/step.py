"""Time whole training steps: ``python -m bench.step --preset paper --batch 2 --size 448 --engine fast``.

A step is everything that a training iteration computes: losses, gradients, AdamW, the teacher's average. Views and
weights are random, which does not change the work.
"""

import argparse
import contextlib
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor

from bench.harness import record
from fsr_fast import reference
from fsr_fast.config import CONFIG_FOLDER, Config, build_config, dump_config, read_yaml
from fsr_fast.engine import build_step
from fsr_fast.kernels import dense_energy
from fsr_fast.method.optim import build_optimiser, fill_missing_gradients
from fsr_fast.method.schedules import reaches_all, schedule_at
from fsr_fast.method.step import StepOutput
from fsr_fast.models.build import build_network
from fsr_fast.runtime.allocator import keep_freed_memory
from fsr_fast.runtime.distributed import Process, distribute
from fsr_fast.runtime.precision import autocast, dense_peak, measure_ceiling
from fsr_fast.runtime.terminal import peak_memory

PRESETS = {"paper": "voc_vit_b", "official": "voc_official"}
CLASSES = tuple(f"class {number}" for number in range(20))
PRESENT = 3  # classes of an image, at most


@dataclass(frozen=True)
class Technique:
    """How the step is computed; the result is always the same."""

    engine: str = "fast"
    """On a GPU the reference's dense energy is ours: its own loop over the pixels would take minutes."""
    amp: str = "off"
    attention: str = "sdpa"
    """`run.attention` of the fast step; the reference materialises the N by N matrix unless this is `fused`."""
    compile: bool = False
    graphs: bool = False
    """Replay the compiled blocks as CUDA graphs."""
    fp8: bool = False
    """Run the passes that only give CAMs in float8."""
    tune: bool = False
    """Let Inductor choose between matrix products of the library and Triton's, which GELU may end; takes minutes."""
    kernels: str = ""
    """FSR_KERNELS."""
    keep_memory: bool = True
    """Of the fast step on a CPU, as in training; the reference is timed without."""

    @property
    def warm_up(self) -> int:
        """Number of iterations before one takes its usual time; graphs are warmed up, then recorded, then replayed."""
        return 4 if self.graphs else 1


@dataclass(frozen=True)
class Setting:
    """What is computed."""

    preset: str = "paper"
    backbone: str = "vit_base_patch16_224"
    batch: int = 2
    size: int = 448


def measure(
    setting: Setting,
    technique: Technique,
    device: torch.device,
    iterations: int,
    *,
    warm_up: int | None = None,
    process: Process | None = None,
) -> dict[str, Any]:
    """Time iterations of one setting.

    Args:
        setting: what is computed.
        technique: how.
        device: where.
        iterations: number of timed iterations.
        warm_up: number of untimed ones; None: as the technique needs.
        process: this one among those that share the gradients; None: it is alone.

    Returns:
        `seconds` (median), `images_per_second`, `peak_gib` (of the device; on a CPU of the process since its start),
        for the fast step `units`, `tflops_per_second` and their share `of_ceiling` of a large matrix product
        and `of_peak` of the data sheet's figure, where that is known.
    """
    warm_up = technique.warm_up if warm_up is None else warm_up
    with running(setting, technique, device, process) as iterate:
        for number in range(warm_up):
            iterate(number)
        numbers = range(warm_up, warm_up + iterations)
        output, times, ceiling = (_time_on_gpu if device.type == "cuda" else _time_on_cpu)(
            iterate, numbers, device, technique.amp
        )
    seconds = statistics.median(times)
    row = {"seconds": seconds, "images_per_second": setting.batch / seconds, "peak_gib": peak_memory(device) / 2**30}
    row["ceiling_tflops_per_second"] = ceiling / 1e12
    if output.work is not None:
        rate = output.work.flops / seconds / 1e12
        row |= {"units": output.work.units, "tflops_per_second": rate}
        row["of_ceiling"] = rate / row["ceiling_tflops_per_second"]
        peak = dense_peak(device, technique.amp)
        if peak is not None:
            row |= {"peak_tflops_per_second": peak / 1e12, "of_peak": rate * 1e12 / peak}
    return row


def _time_on_gpu(
    iterate: Callable[[int], StepOutput], numbers: range, device: torch.device, amp: str
) -> tuple[StepOutput, list[float], float]:
    """Return the last output, seconds of the iterations, and the ceiling around them.

    The host does not wait between iterations, as in training.
    """
    before = measure_ceiling(device, amp)
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    ends[0].record()
    for number, end in zip(numbers, ends[1:], strict=True):
        output = iterate(number)
        end.record()
    torch.cuda.synchronize(device)
    times = [begin.elapsed_time(end) * 1e-3 for begin, end in itertools.pairwise(ends)]
    return output, times, statistics.mean((before, measure_ceiling(device, amp)))


def _time_on_cpu(
    iterate: Callable[[int], StepOutput], numbers: range, device: torch.device, amp: str
) -> tuple[StepOutput, list[float], float]:
    """Return the same; a CPU is shared with other programs, so the ceiling is measured between the iterations."""
    times, ceilings = [], []
    for number in numbers:
        ceilings.append(measure_ceiling(device, amp))
        began = time.perf_counter()
        output = iterate(number)
        times.append(time.perf_counter() - began)
    return output, times, statistics.median(ceilings)


def build_settings(setting: Setting, technique: Technique) -> Config:
    """Build the recipe of a preset with everything that a bench changes."""
    values = read_yaml(CONFIG_FOLDER / f"{PRESETS[setting.preset]}.yaml")
    attention = "sdpa" if technique.attention == "fused" else technique.attention
    amp = "off" if technique.engine == "reference" else technique.amp
    run = {"engine": technique.engine, "amp": amp, "attention": attention, "compile": technique.compile}
    run |= {"graphs": technique.graphs}
    changes: dict[str, dict[str, Any]] = {
        "run": run,
        "cam": {"fp8": technique.fp8},
        "optim": {"batch_size": setting.batch},
        "data": {"root": ".", "image_size": setting.size},
        "model": {"backbone": setting.backbone, "pretrained": "none"},
    }
    if setting.size // 16 % 4:  # blocks of 4 x 4 patches do not fill the grid
        changes["mask"] = {"block": 1}
    for section, content in changes.items():
        values[section] = values.get(section, {}) | content
    return build_config(values, "the bench")


def _build(setting: Setting, technique: Technique, process: Process) -> Callable[[int], StepOutput]:
    device = process.device
    if device.type == "cuda":  # what the setting before has left
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    config = build_settings(setting, technique)
    torch.manual_seed(0)
    network = build_network(config.model, CLASSES, setting.size).to(device)
    step = build_step(network, config, PRESENT).to(device)
    last = config.optim.iterations - 1  # every loss counts by then
    forward = distribute(step, process, all_reached=reaches_all(config, last))
    optimiser = build_optimiser(network, config.optim)
    first, second = torch.randn(2, setting.batch, 3, setting.size, setting.size).to(device)
    labels = torch.zeros(setting.batch, len(CLASSES))
    for number, row in enumerate(labels):
        row[: 1 + number % PRESENT] = 1
    labels = labels.to(device)
    schedule = schedule_at(config, last)

    def iterate(number: int) -> StepOutput:
        optimiser.zero_grad()
        draws = step.draw(setting.batch, torch.Generator().manual_seed(number))
        with autocast(device, technique.amp if technique.engine == "reference" else "off"):
            output: StepOutput = forward((first, second), labels, draws, schedule)
        output.loss.backward()
        fill_missing_gradients(optimiser)
        optimiser.step()
        step.teacher.update_ema(network, schedule.encoder_momentum, schedule.projector_momentum)
        return output

    return iterate


@contextlib.contextmanager
def running(
    setting: Setting, technique: Technique, device: torch.device, process: Process | None = None
) -> Iterator[Callable[[int], StepOutput]]:
    """Set everything up for one setting, and give a function that runs an iteration, whose number is its seed.

    Args:
        setting: what is computed.
        technique: how.
        device: where.
        process: this one among those that share the gradients; None: it is alone.
    """
    with _technique(technique, device):
        yield _build(setting, technique, process or Process(0, 1, device))


@contextlib.contextmanager
def _technique(technique: Technique, device: torch.device) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"FSR_KERNELS": technique.kernels}), contextlib.ExitStack() as stack:
        keep_freed_memory(technique.engine == "fast" and technique.keep_memory)
        stack.callback(keep_freed_memory, False)
        stack.enter_context(inductor.patch(max_autotune_gemm=technique.tune))
        torch.compiler.reset()  # all techniques compile one function, which Dynamo recompiles only a few times
        if technique.engine == "reference" and technique.attention == "fused":
            stack.enter_context(mock.patch.object(reference.encoder, "self_attention", _fused_attention))
        if technique.engine == "reference" and device.type == "cuda":
            # pixel by pixel, as in the reference, a step of the official preset would launch millions of kernels
            stack.enter_context(mock.patch.object(reference.losses, "dense_energy", _fast_energy))
        yield


def _fused_attention(state: dict[str, Tensor], name: str, tokens: Tensor, heads: int, *_: Any) -> Tensor:
    """The reference's self-attention by one call of torch's own, for backbones without rotary positions."""
    weight, bias = (state[f"{name}.qkv.{part}"] for part in ("weight", "bias"))
    query, key, value = F.linear(tokens, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return F.linear(mixed, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])


def _fast_energy(probabilities: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The reference's dense energy by our kernel."""
    return dense_energy(probabilities, images, labels.to(torch.uint8))


def read_options(
    arguments: Sequence[str], program: str, description: str | None
) -> tuple[argparse.Namespace, Setting, Technique]:
    """Read a setting and a technique from a command line.

    Args:
        arguments: without the program's name.
        program: its name.
        description: of what it does.

    Returns:
        All options, the setting and the technique among them.

    Raises:
        SystemExit: `--print-config`, which this does.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--engine", choices=("fast", "reference"), default="fast")
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--size", type=int, default=448, help="side of the views in pixels")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--attention", choices=("auto", "sdpa", "xformers", "varlen"), default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--graphs", action="store_true", help="replay the compiled blocks as CUDA graphs")
    parser.add_argument("--fp8", action="store_true", help="run the passes that only give CAMs in float8")
    parser.add_argument("--tune", action="store_true", help="let Inductor try products that end in GELU; takes minutes")
    parser.add_argument(
        "--iterations", type=int, default=2, help="number of timed iterations, after those that warm up"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_args(arguments)
    setting = Setting(options.preset, options.backbone, options.batch, options.size)
    chosen = ("engine", "amp", "attention", "compile", "graphs", "fp8", "tune")
    technique = Technique(**{name: getattr(options, name) for name in chosen})
    if options.print_config:
        print(dump_config(build_settings(setting, technique)), end="")
        raise SystemExit
    return options, setting, technique


def main(arguments: Sequence[str]) -> None:
    """Time the setting given on the command line."""
    options, setting, technique = read_options(arguments, "python -m bench.step", __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = measure(setting, technique, device, options.iterations)
    used = [name for name in ("compile", "graphs", "fp8", "tune") if getattr(technique, name)]
    case = f"step {setting.preset} {setting.backbone} {setting.size} batch {setting.batch} " + " ".join(
        [technique.engine, technique.amp, *used]
    )
    print(case, *(f"{name} {value:.4g}" for name, value in row.items()), sep="\n  ")
    record(case, device, {"setting": asdict(setting), "technique": asdict(technique), "rows": [row]})


if __name__ == "__main__":
    main(sys.argv[1:])
