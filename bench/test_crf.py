"""The dense CRF: exact Gaussians on the tiles against the matrix of all pairs in blocks, and against pydensecrf."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.evaluation.crf import dense_crf as dense_crf_of
from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.kernels import dense_crf
from fsr_fast.kernels.gaussian import bilateral_features

ROWS = 4096  # pixels whose weights to all others are held at a time
ITERATIONS = 10


def field_written_out(probabilities: Tensor, images: Tensor) -> Tensor:
    """The mean field as one writes it without holding all pairs: one block of rows of the matrix at a time."""
    B, _, h, w = probabilities.shape
    features = bilateral_features(images.float(), sigma_rgb=5.0, sigma_xy=121.0).mT.contiguous()
    places = 121.0 * features[..., 3:]

    def smooth(points: Tensor, values: Tensor) -> Tensor:
        blocks = [torch.exp(-0.5 * torch.cdist(rows, points).square()) @ values for rows in points.split(ROWS, dim=1)]
        return torch.cat(blocks, dim=1)

    ones = torch.ones(B, h * w, 1, device=images.device)
    scales = [smooth(points, ones).rsqrt() for points in (places, features)]
    unary = probabilities.clamp(min=1e-5).log().flatten(2).mT
    beliefs = unary.softmax(2)
    for _ in range(ITERATIONS):
        pairs = zip((1.0, 4.0), (places, features), scales, strict=True)
        beliefs = unary + sum(weight * scale * smooth(points, scale * beliefs) for weight, points, scale in pairs)
        beliefs = beliefs.softmax(2)
    return beliefs.mT.unflatten(2, (h, w))


def draw(classes: int, h: int, w: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smooth colours with a little noise, and a decoder's upsampled logits: few classes are likely anywhere."""
    coarse = torch.rand(1, 3, h // 16, w // 16, generator=generator)
    images = 255 * F.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0, 1)
    images = (images + 4 * torch.randn(1, 3, h, w, generator=generator)).clamp(0, 255).to(torch.uint8)
    logits = torch.randn(1, classes, h // 16, w // 16, generator=generator)
    logits -= 12 * (torch.arange(classes) > 3)[:, None, None]
    return F.interpolate(4 * logits, size=(h, w), mode="bilinear").softmax(1), images


@pytest.mark.parametrize("classes", [21, 81])
def test_dense_crf(benchmark: Any, device: torch.device, classes: int) -> None:
    if device.type == "cpu" and classes != 21:
        pytest.skip("the CPU is measured with VOC's classes")
    h, w = size(device, gpu=(375, 500), cpu=(48, 64))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(tensor.to(device) for tensor in draw(classes, h, w, generator))

    probabilities, images = draw(classes, h, w, torch.Generator().manual_seed(0))
    began = time.perf_counter()
    dense_crf_of(images[0].permute(1, 2, 0).numpy(), probabilities[0].numpy())
    print(f"\npydensecrf {classes} classes {h}x{w}: {1e3 * (time.perf_counter() - began):.1f} ms")
    pairs, tensor = (h * w) ** 2, 4 * classes * h * w
    floor = Floor(
        forward_bytes=2 * tensor + 3 * h * w,
        forward_flops=pairs * ((ITERATIONS + 1) * 15 + 2 * ITERATIONS * classes),  # every pair, none skipped
    )
    compare(
        benchmark,
        device,
        f"dense_crf fp32 C={classes} {h}x{w}",
        ours=dense_crf,
        eager=field_written_out,
        inputs=inputs,
        floor=floor,
    )


def beliefs_of(mask: np.ndarray, generator: torch.Generator) -> Tensor:
    """Imitate a decoder's output: the true mask, displaced, on a grid of patches, with noise; (1, 21, H, W)."""
    known = torch.from_numpy(np.where(mask == 255, 0, mask)).long()
    classes = F.one_hot(known, 21).permute(2, 0, 1)[None].float()
    shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
    grid = (max(1, mask.shape[0] // 16), max(1, mask.shape[1] // 16))
    logits = 7 * F.interpolate(classes.roll(shift, (2, 3)), size=grid, mode="area")
    logits += torch.randn(1, 21, *grid, generator=generator)
    absent = classes.amax((2, 3)) == 0
    absent[:, 0] = False
    logits -= 4 * absent[..., None, None]
    return F.interpolate(logits, size=mask.shape, mode="bilinear").softmax(1)


@pytest.mark.skipif("FSR_VOC_ANIMALS" not in os.environ, reason="FSR_VOC_ANIMALS names no folder of photographs")
def test_agreement_on_photographs(benchmark: Any, device: torch.device) -> None:
    """Both back ends on photographs: equal pixels, mean IoU, seconds per image. On a CPU, at half size."""
    root = Path(os.environ["FSR_VOC_ANIMALS"])
    names = (root / "ImageSets/Segmentation/val.txt").read_text().split()
    names = size(device, gpu=names, cpu=names[1:40:13])
    matrices = {kind: ConfusionMatrix(20) for kind in ("before", "pydensecrf", "exact")}
    seconds = dict.fromkeys(matrices, 0.0)
    equal = pixels = 0
    for number, name in enumerate(names):
        picture, mask = read(root, name, half=device.type == "cpu")
        beliefs = beliefs_of(mask, torch.Generator().manual_seed(number))[0].numpy()
        found = {"before": beliefs.argmax(0)}
        for backend in ("pydensecrf", "exact"):
            began = time.perf_counter()
            found[backend] = dense_crf_of(picture, beliefs, backend=backend, device=device).argmax(0)
            seconds[backend] += (time.perf_counter() - began) / len(names)
        for kind, labels in found.items():
            matrices[kind].update(labels, mask)
        equal += int((found["pydensecrf"] == found["exact"]).sum())
        pixels += mask.size
    benchmark.pedantic(lambda: None, rounds=1)
    means = ", ".join(f"{kind} {matrix.mean_iou():.2f}" for kind, matrix in matrices.items())
    print(f"\n{len(names)} photographs: {100 * equal / pixels:.2f} % of the pixels equal; mIoU {means}")
    print(f"seconds per image: pydensecrf {seconds['pydensecrf']:.3f}, exact {seconds['exact']:.3f} on {device}")


def read(root: Path, name: str, *, half: bool) -> tuple[np.ndarray, np.ndarray]:
    with (
        Image.open(root / "JPEGImages" / f"{name}.jpg") as image,
        Image.open(root / "SegmentationClassAug" / f"{name}.png") as mask,
    ):
        shape = (image.width // 2, image.height // 2) if half else image.size
        return np.asarray(image.convert("RGB").resize(shape)), np.asarray(mask.resize(shape, Image.Resampling.NEAREST))
