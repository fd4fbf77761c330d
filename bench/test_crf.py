"""The dense CRF: exact Gaussians on the tiles against the matrix of all pairs in blocks, and against pydensecrf."""

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.evaluation.crf import dense_crf as dense_crf_of
from fsr_fast.kernels import dense_crf
from fsr_fast.kernels.gaussian_tiles import bilateral_features

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
