"""Evaluation: the latency of a single image, and images per second beside a plain loop with pydensecrf.

The plain loop is the obvious first version: image by image, the passes of the CAMs, then those of the segmentation,
each scale and each mirror image by itself, then pydensecrf on all classes in the same process. It runs the same
network. A network with random weights finds every class likely everywhere, a trained one only a few: the decoder's
last layer is set to imitate that. FSR_VOC_ANIMALS names the folder of photographs; without it the embedded data set is
used. The cost of a large picture is measured up to FSR_MEGAPIXELS.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_softmax
from torch import Tensor

from bench.harness import Floor, compare, record, size
from fsr_fast.config import Config, build_config
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets
from fsr_fast.evaluation.evaluator import evaluate_network
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.models import Network, build_network
from fsr_fast.models.network import activate, to_map
from fsr_fast.models.work import TrunkPass
from fsr_fast.runtime.allocator import keep_freed_memory
from fsr_fast.runtime.distributed import Process

CAM_SCALES, SCALES = (1.0, 0.5, 1.5), (1.0, 1.25, 1.5)
BACKBONES = {"ViT-Ti": "vit_tiny", "ViT-S": "vit_small", "ViT-B": "vit_base"}
IMAGES = 16
TILE = 128


def network_of(backbone: str, device: torch.device, classes: tuple[str, ...]) -> tuple[Network, Config]:
    recipe = {"model": {"backbone": f"{backbone}_patch16_224", "pretrained": "none"}, "run": {"device": device.type}}
    config = build_config({**recipe, "evaluate": {"crf": True}, "data": {"root": "unused"}}, "the bench")
    torch.manual_seed(0)
    return build_network(config.model, classes, 224).to(device).eval(), config


@torch.no_grad()
def plain_passes(network: Network, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """CAMs of the classes that `labels` (1, C) shows, and logits, at the size of the image."""
    height, width = image.shape[-2:]

    def features(scale: float, flip: bool) -> tuple[Tensor, tuple[int, int]]:
        grid = tuple(max(1, round(side * scale / 16)) for side in (height, width))
        scaled = F.interpolate(image, size=(16 * grid[0], 16 * grid[1]), mode="bilinear")
        found = network.encoder(scaled.flip(-1) if flip else scaled)
        return network.encoder.norm(found.tokens), found.grid

    def upsample(maps: Tensor, flip: bool) -> Tensor:
        return F.interpolate(maps.flip(-1) if flip else maps, size=(height, width), mode="bilinear")

    cams = []
    for scale in CAM_SCALES:
        both = [activate(*_with(network.top_classifier, features(scale, flip))).relu() for flip in (False, True)]
        cams.append(torch.maximum(*(upsample(cam, flip) for cam, flip in zip(both, (False, True), strict=True))))
    cam = sum(cams) * labels[..., None, None]
    cam = cam - cam.amin((2, 3), keepdim=True)
    cam = cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
    logits = []
    for scale in SCALES:
        both = [network.decoder(to_map(*features(scale, flip))) for flip in (False, True)]
        logits.append(upsample(both[0], False) + upsample(both[1], True))
    return cam, torch.stack(logits).amax(0)


def _with(classifier: torch.nn.Conv2d, found: tuple[Tensor, tuple[int, int]]) -> tuple[Any, ...]:
    return found[0], classifier, found[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_latency(benchmark: Any, device: torch.device, name: str) -> None:
    h, w = size(device, gpu=(375, 500), cpu=(224, 224))
    classes = tuple(f"class {number}" for number in range(20))
    network, _ = network_of(BACKBONES[name], device, classes)
    scales = [*CAM_SCALES, *(scale for scale in SCALES if scale not in CAM_SCALES)]
    groups = tuple((2, round(h * scale / 16) * round(w * scale / 16)) for scale in scales)
    flops = network.encoder.shape.flops([TrunkPass(groups, network.encoder.depth, gradient=False)])
    weights = sum(4 * parameter.numel() for parameter in network.parameters())

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = torch.zeros(1, len(classes))
        labels[0, :2] = 1
        return torch.randn(1, 3, h, w, generator=generator).to(device), labels.to(device)

    def ours(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = infer(network, image, labels, cam_scales=CAM_SCALES, scales=SCALES)
        return found.cams.values, found.seg_logits

    def eager(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return plain_passes(network, image, labels)

    floor = Floor(forward_bytes=weights, forward_flops=flops)
    compare(
        benchmark, device, f"evaluation_latency {name} {h}x{w}", ours=ours, eager=eager, inputs=inputs, floor=floor,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )  # fmt: skip


def plain_crf(picture: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    field = DenseCRF2D(picture.shape[1], picture.shape[0], len(probabilities))
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    field.addPairwiseGaussian(sxy=1, compat=1)
    field.addPairwiseBilateral(sxy=121, srgb=5, rgbim=np.array(picture, order="C"), compat=4)
    return np.array(field.inference(10)).reshape(probabilities.shape)


def plain_loop(network: Network, dataset: SegmentationDataset, indices: Sequence[int], device: torch.device) -> None:
    matrices = [ConfusionMatrix(len(network.classes)) for _ in range(3)]
    for index in indices:
        picture = np.asarray(dataset.image(index))
        image = network.normalise(torch.tensor(picture).permute(2, 0, 1))
        labels = torch.from_numpy(dataset.labels[index])[None].to(device)
        cam, logits = plain_passes(network, image[None].to(device), labels)
        refined = plain_crf(picture, logits[0].softmax(0).cpu().numpy())
        value, label = cam[0].max(0)
        found = [torch.where(value > 0.5, label + 1, 0), logits[0].argmax(0), torch.from_numpy(refined.argmax(0))]
        for matrix, prediction in zip(matrices, found, strict=True):
            matrix.update(prediction.cpu(), dataset.mask(index))


def setting(device: torch.device, likely: int) -> tuple[Network, SegmentationDataset, Config]:
    folder = os.environ.get("FSR_VOC_ANIMALS")
    data = {"dataset": "voc", "root": folder, "workers": 0} if folder else {"dataset": "synthetic", "workers": 0}
    recipe = {"data": data, "evaluate": {"crf": True, "limit": IMAGES}, "run": {"device": device.type}}
    config = build_config(recipe, "the bench")
    _, dataset = build_datasets(config.data)
    network, _ = network_of("vit_tiny", device, dataset.classes)
    with torch.no_grad():  # the layer's input is not negative
        network.decoder.conv8.weight[likely:] = -network.decoder.conv8.weight[likely:].abs()
    return network, dataset, config


def evaluate_share(rank: int, world_size: int, likely: int, folder: str) -> None:
    """Act as one of several processes on the CPU; the first records their total time."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    device = torch.device("cpu")
    keep_freed_memory()
    network, dataset, config = setting(device, likely)
    dist.barrier()
    began = time.perf_counter()
    evaluate_network(network, dataset, config, Process(rank, world_size, device))
    dist.barrier()
    if rank == 0:
        Path(folder, "seconds").write_text(str(time.perf_counter() - began))
    dist.destroy_process_group()


@pytest.mark.parametrize("likely", [4, 21])
def test_images_per_second(benchmark: Any, device: torch.device, tmp_path: Path, likely: int) -> None:
    network, dataset, config = setting(device, likely)
    began = time.perf_counter()
    plain_loop(network, dataset, range(IMAGES), device)
    seconds = {"plain loop": time.perf_counter() - began}

    def evaluate() -> None:
        keep_freed_memory(device.type == "cpu")  # as the command's processes do
        began = time.perf_counter()
        assert evaluate_network(network, dataset, config, Process(0, 1, device)).images == IMAGES
        seconds["one process"] = time.perf_counter() - began
        keep_freed_memory(False)

    benchmark.pedantic(evaluate, rounds=1)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        multiprocessing.spawn(evaluate_share, (cores, likely, str(tmp_path)), nprocs=cores)
        seconds[f"{cores} processes"] = float((tmp_path / "seconds").read_text())
    benchmark.extra_info.update(seconds)
    rates = ", ".join(f"{name} {IMAGES / value:.3f} images/s" for name, value in seconds.items())
    print(f"\n{IMAGES} images with CRF, {likely} classes likely: {rates}")
    record(f"evaluation {likely} classes likely", device, {"images": IMAGES, "seconds": seconds})


def cost_of(megapixels: float, tile: int | None) -> dict[str, float]:
    """Segment one picture in a process of its own, on one thread; its peak memory is that of the process."""
    command = [sys.executable, "-m", "bench.tiles", "cost", "--megapixels", str(megapixels)]
    command += ["--tile", str(tile)] if tile else []
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def test_cost_per_megapixel(benchmark: Any) -> None:
    """Whole where that takes a reasonable time, and in tiles of 128 pixels, from 0.25 to 100 megapixels."""
    largest = float(os.environ.get("FSR_MEGAPIXELS", "4"))  # of the tiled ones; 100 takes the better part of an hour
    tiled = [size for size in (0.25, 1, 4, 10, 30, 100) if size <= largest]
    rows = [{"tile": None, **cost_of(size, None)} for size in (0.0625, 0.25, 1) if size <= largest]
    rows += [{"tile": TILE, **cost_of(size, TILE)} for size in tiled[1:]]
    benchmark.pedantic(cost_of, (tiled[0], TILE), rounds=1)
    for row in rows:
        per = row["seconds"] / row["megapixels"]
        print(f"\n{row['megapixels']:7.2f} MP, tile {row['tile']}: {per:7.2f} s/MP, {row['peak_mib']:.0f} MiB", end="")
    load = os.getloadavg()[0]  # of other programs, too
    record("evaluation_cost", torch.device("cpu"), {"threads": 1, "load": load, "overlap": 0.25, "rows": rows})
