"""Images per second of the two pipelines: decoded, two augmented views of 448², normalised; with CPU and memory.

The photographs are those of FSR_VOC_ANIMALS (a folder in VOC layout), else the embedded data set. On a CPU DALI and
torchvision share the cores; on a GPU DALI decodes and augments there. FSR_BENCH_WORKERS sets the loader processes per
pipeline, which are also DALI's threads; by default one per core, at most 16.
"""

import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench.harness import record
from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import torch_pipeline
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.synthetic import generate

SIZE, WARM_UP = 448, 3  # pixels; batches
BATCH, SECONDS = {"cuda": 16, "cpu": 8}, {"cuda": 6.0, "cpu": 8.0}
RECIPES = {
    "VOC recipe": AugmentConfig(),
    "without jitter": AugmentConfig(jitter=0.0),
    "with blur, solarisation": AugmentConfig(blur=0.1, solarise=0.2),
    "AutoAugment": AugmentConfig(policy="autoaugment", jitter=0.0),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, ImageSet]:
    folder = os.environ.get("FSR_VOC_ANIMALS")
    if folder is None:
        root = tmp_path_factory.mktemp("data") / "set"
        generate(root, train=300, val=1)
        data = DataConfig(dataset="synthetic", root=root)
    else:
        classes = tuple(sorted({name for names in _labels(Path(folder)) for name in names}))
        lists = sorted(path.stem for path in (Path(folder) / "ImageSets/Segmentation").glob("train*.txt"))
        data = DataConfig(root=Path(folder), classes=classes, labels="csv", train_list=lists[0], val_list=None)
    return data, build_datasets(data)[0]


def _labels(root: Path) -> list[list[str]]:
    return [line.split(",")[1].split() for line in (root / "labels.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_data(
    recipe: str,
    photographs: tuple[DataConfig, ImageSet],
    benchmark: Any,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_pipeline, "CACHE_BYTES", 0)  # a full data set does not fit
    data, dataset = photographs
    workers = int(os.environ.get("FSR_BENCH_WORKERS", min(16, os.cpu_count() or 1)))
    rows = []
    for pipeline in ("torch", "dali"):
        changes = {"pipeline": pipeline, "workers": workers, "image_size": SIZE}
        rows.append(_measure(dataset, data.model_copy(update=changes), RECIPES[recipe], device))
        print("\n" + ", ".join(f"{key} {_number(value)}" for key, value in rows[-1].items()))
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(lambda: None)  # the table is ours: a stream has no single call to time
    where = "photographs" if "FSR_VOC_ANIMALS" in os.environ else "embedded data set"
    record(f"data {recipe}", device, {"images": where, "cores": os.cpu_count(), "workers": workers, "rows": rows})


def _measure(dataset: ImageSet, data: DataConfig, augment: AugmentConfig, device: torch.device) -> dict[str, Any]:
    """Take batches for a while."""
    batch_size, seconds = BATCH[device.type], SECONDS[device.type]
    norm = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    options = {"batch_size": batch_size, "rank": 0, "world_size": 1, "seed": 0, "device": device, **norm}
    stream = build_train_loader(dataset, data, augment, **options)
    list(islice(stream, WARM_UP + data.workers))
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    busy, began, batches, memory = _busy(family), time.perf_counter(), 0, 0
    while time.perf_counter() - began < seconds:
        views = [view.to(device) for view in next(stream).views]
        batches += 1
        memory = max(memory, sum(process.memory_full_info().pss for process in family))
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    busy = _busy(family) - busy
    stream.close()
    assert views[0].shape == (batch_size, 3, SIZE, SIZE)
    return {
        "implementation": data.pipeline,
        "images_per_second": batches * batch_size / elapsed,
        "cpu_cores": busy / elapsed,
        "cpu_ms_per_image": 1e3 * busy / (batches * batch_size),
        "host_memory_mib": memory / 2**20,
    }


def _busy(processes: list[psutil.Process]) -> float:
    """CPU seconds so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
