"""Whole steps: from the reference, one technique added at a time, to ours; and how the cost grows.

On a CPU tiny images, so that the benches always finish; on a GPU the paper's. The waterfall is drawn from what
is recorded here: ``FSR_RECORD=1 pytest bench/test_step.py && python -m bench.plot``.
"""

from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from bench.harness import record, size
from bench.step import Setting, Technique, measure
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.precision import has_fast_bf16

BACKBONES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")


def waterfall(device: torch.device) -> dict[str, Technique]:
    """Techniques by name, each with all before it."""
    half = "bf16" if has_fast_bf16(device) else "off"
    reference = Technique(engine="reference")
    fast = Technique(engine="fast", amp=half, kernels="torch")
    steps = {"reference": reference, "fused attention": replace(reference, attention="fused")}
    if half == "bf16":
        steps["bf16"] = replace(steps["fused attention"], amp=half)
    steps["no pass twice, packed passes"] = replace(fast, keep_memory=False)
    if device.type == "cuda":
        steps["Triton kernels"] = fast = replace(fast, kernels="", attention="auto")
        steps["compiled blocks"] = fast = replace(fast, compile=True)
        steps["CUDA graphs"] = fast = replace(fast, graphs=True)
        steps["CAM passes in float8"] = replace(fast, fp8=True)
    else:
        steps["memory kept"] = fast
    return steps


@pytest.mark.parametrize(
    ("preset", "backbone"), [*(("paper", backbone) for backbone in BACKBONES), ("official", BACKBONES[-1])]
)
def test_waterfall(benchmark, device, preset, backbone):
    batch, side, rounds = size(device, gpu=(16, 448, 3), cpu=(2, 64, 1))
    setting = Setting(preset, backbone, batch, side)
    rows = {}
    for name, technique in waterfall(device).items():
        rows[name] = measure(setting, technique, device, rounds)
    for name, row in rows.items():
        print(f"\n{preset} {backbone:22} {name:30} {row['images_per_second']:9.2f} images/s", end="")
    benchmark.extra_info["rows"] = rows
    record(f"step waterfall {preset} {backbone}", device, {"setting": asdict(setting), "rows": rows})
    ours = list(waterfall(device).values())[-1]
    benchmark.pedantic(lambda: measure(setting, ours, device, 1, warm_up=0), rounds=1)


def test_attention_backends(benchmark, device):
    """One step with each way to compute self-attention; a CPU only has sdpa."""
    batch, side, rounds = size(device, gpu=(16, 448, 10), cpu=(2, 64, 1))
    half = "bf16" if has_fast_bf16(device) else "off"
    setting = Setting("paper", size(device, gpu=BACKBONES[2], cpu=BACKBONES[0]), batch, side)
    rows = {}
    for attention in size(device, gpu=("sdpa", "xformers", "varlen"), cpu=("sdpa",)):
        rows[attention] = measure(setting, Technique(amp=half, attention=attention), device, rounds)
        print(f"\n{attention:10} {rows[attention]['images_per_second']:9.2f} images/s", end="")
    record(f"step attention paper {setting.backbone}", device, {"setting": asdict(setting), "rows": rows})
    benchmark.pedantic(lambda: measure(setting, Technique(amp=half), device, 1, warm_up=0), rounds=1)


@pytest.mark.parametrize("batch", [2, 16])
def test_cuda_graphs(benchmark, device, batch):
    """The step with one graph per pass, beside compiled blocks without; few images show the host's work most."""
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    setting = Setting("paper", BACKBONES[2], batch, 448)
    plain = Technique(amp="bf16", attention="auto", compile=True)
    techniques = {"compiled blocks": plain, "graphs": replace(plain, graphs=True)}
    rows = {name: measure(setting, one, device, 10) for name, one in techniques.items()}
    record(f"step graphs batch {batch}", device, {"setting": asdict(setting), "rows": rows})
    benchmark.pedantic(lambda: measure(setting, plain, device, 1, warm_up=0), rounds=1)


def test_growth_with_the_batch(benchmark, device):
    batches, side = size(device, gpu=((1, 2, 4, 8, 16, 32), 448), cpu=((1, 2, 4), 64))
    ours = list(waterfall(device).values())[-1]
    rows = {}
    for batch in batches:
        setting = Setting(backbone=size(device, gpu=BACKBONES[2], cpu=BACKBONES[0]), batch=batch, size=side)
        rows[batch] = measure(setting, ours, device, 3)
        print(f"\nbatch {batch:3} {rows[batch]['images_per_second']:9.2f} images/s", end="")
    record("step batches", device, {"setting": asdict(setting), "rows": rows})
    benchmark.pedantic(lambda: measure(setting, ours, device, 1, warm_up=0), rounds=1)


def test_growth_with_the_processes(benchmark, device, tmp_path):
    count = 2
    if device.type == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"{torch.cuda.device_count()} GPU, not {count}")
    setting = Setting(backbone=size(device, gpu=BACKBONES[2], cpu=BACKBONES[0]), size=size(device, gpu=448, cpu=64))
    rows = {}
    for processes in (1, count):
        arguments = [
            (setting, device.type, rank, processes, str(tmp_path / str(processes))) for rank in range(processes)
        ]
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            rows[processes] = sum(pool.starmap(_images_per_second, arguments))
    print("\n" + ", ".join(f"{processes} processes {rate:.2f} images/s" for processes, rate in rows.items()))
    record("step processes", device, {"setting": asdict(setting), "rows": rows})
    benchmark.pedantic(lambda: measure(setting, Technique(), device, 1, warm_up=0), rounds=1)


def _images_per_second(setting: Setting, kind: str, rank: int, processes: int, meeting: str) -> float:
    """One process of several that train together; on a CPU each has one thread."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        return measure(setting, Technique(), device, 3, process=Process(rank, processes, device))["images_per_second"]
    finally:
        dist.destroy_process_group()
