"""Uncertain-patch selection: one product with the classifier, then everything else in registers."""

import pytest
import torch
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import uncertain_mask

K_SHARE = 0.4


def plain(features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 2-4 as one writes them in PyTorch: all classes, full-size maps, two sorts."""
    cam = torch.relu(features @ weight.to(features.dtype).T).float()
    cam = cam - cam.amin(1, keepdim=True)
    cam = cam / (cam.amax(1, keepdim=True) + 1e-5)
    value = (cam * (labels[:, None] > 0)).amax(2)
    soft = uniform + ((value > 0.2) & (value < 0.7)).float()
    k = int(K_SHARE * soft.shape[1])
    chosen = soft.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(soft, dtype=torch.bool).scatter_(1, chosen, True)
    order = mask.sort(dim=1, stable=True).indices
    return mask, order[:, -k:], order[:, :-k]


@pytest.mark.parametrize("C", [20, 80])
def test_uncertain_mask(benchmark: object, device: torch.device, C: int) -> None:
    B, N, D = size(device, gpu=(16, 784, 768), cpu=(2, 196, 192))
    present = 2 / C

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = torch.randn(B, N, D, generator=generator).to(device)  # float32, under autocast too
        weight = torch.randn(C, D, generator=generator).to(device)
        labels = (torch.rand(B, C, generator=generator) < present).float().to(device)
        return features, weight, labels, torch.rand(B, N, generator=generator).to(device)

    moved = 4 * B * N * D + 4 * C * D + B * N * (4 + 1 + 8)  # features, weight, uniform, mask, indices
    floor = Floor(forward_bytes=moved, forward_flops=2 * B * N * D * C * present)
    compare(
        benchmark,
        device,
        f"uncertain_mask float32 C={C}",
        ours=lambda *arguments: uncertain_mask(*arguments, k=int(K_SHARE * N)),
        eager=plain,
        inputs=inputs,
        floor=floor,
        graph=True,
    )
