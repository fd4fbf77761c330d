"""Dense energy with its gradient: every pair of pixels, against the matrix of all pairs in blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import dense_energy
from fsr_fast.kernels.gaussian import bilateral_features

ROWS = 4096  # pixels whose weights to all others are held at a time


def energy_written_out(probabilities: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The energy as one writes it without holding all pairs: one block of rows of the matrix at a time."""
    scores = probabilities.detach().flatten(2)
    features = bilateral_features(images, sigma_rgb=15.0, sigma_xy=50.0).mT.contiguous()  # (B, P, 5)
    with torch.no_grad():
        blocks = [
            torch.exp(-0.5 * torch.cdist(rows, features).square()) @ scores.mT for rows in features.split(ROWS, dim=1)
        ]
        filtered = torch.cat(blocks, dim=1).mT.view_as(probabilities)
        gate = (1 - probabilities.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(labels[:, None] == 255, 1)
        pull = -gate * filtered / len(probabilities)
    energy = (probabilities * pull).sum()
    return 2 * energy - energy.detach()


@pytest.mark.parametrize("classes", [21, 81])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_dense_energy(benchmark: Any, device: torch.device, classes: int, small: bool) -> None:
    if device.type == "cpu" and classes != 21:
        pytest.skip("the CPU is measured with VOC's classes")
    B, side = (32, 24) if small else size(device, gpu=(4, 224), cpu=(1, 64))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        logits = torch.randn(B, classes, side, side, generator=generator)
        coarse = torch.rand(B, 3, side // 8, side // 8, generator=generator)
        images = 255 * F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
        labels = torch.randint(0, 256, (B, side, side), generator=generator, dtype=torch.uint8)
        return logits.softmax(dim=1).to(device).requires_grad_(), images.to(device), labels.to(device)

    pairs, tensor = B * side**4, 4 * B * classes * side**2
    floor = Floor(
        forward_bytes=2 * tensor + 4 * B * 3 * side**2,
        forward_flops=pairs * (15 + 2 * classes),  # distance 14, exponential 1; every pair, none skipped
        backward_bytes=2 * tensor,
        backward_flops=B * classes * side**2,
    )
    compare(
        benchmark,
        device,
        f"dense_energy fp32 B={B} C={classes} {side}x{side}",
        ours=dense_energy,
        eager=energy_written_out,
        inputs=inputs,
        floor=floor,
    )
