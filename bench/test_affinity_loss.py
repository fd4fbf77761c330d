"""Affinity loss: tiles of all pairs, reduced where they are computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.method.losses import affinity_loss

KNOWN = 0.7  # share of patches with a label


def plain(features: Tensor, labels: Tensor) -> Tensor:
    """The loss as one writes it in PyTorch: every N x N matrix in memory."""
    direction = F.normalize(features, dim=2)
    similarity = (direction @ direction.transpose(1, 2)).float().abs()
    known = labels != 255
    pair = known[:, :, None] & known[:, None] & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    equal = labels[:, :, None] == labels[:, None]
    same, different = pair & equal, pair & ~equal
    same_mean = (similarity * same).sum() / (same.sum() + 1)
    return 0.5 * (1 - same_mean) + 0.5 * (similarity * different).sum() / (different.sum() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
def test_affinity_loss(benchmark: object, device: torch.device, dtype: torch.dtype, amp: bool) -> None:
    if amp and (device.type == "cpu" or dtype != torch.float32):
        pytest.skip("a step on a GPU passes float32 features under autocast")
    B, N, D = size(device, gpu=(16, 784, 768), cpu=(2, 196, 192))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        features = torch.randn(B, N, D, generator=generator).to(device, dtype).requires_grad_()
        labels = torch.randint(0, 3, (B, N), generator=generator)
        labels[torch.rand(B, N, generator=generator) > KNOWN] = 255
        return features, labels.to(device)

    known = KNOWN * N
    floor = Floor(
        forward_bytes=dtype.itemsize * B * N * D + 8 * B * N,
        forward_flops=B * known**2 * D,  # half of the pairs, by symmetry
        backward_bytes=2 * dtype.itemsize * B * N * D + 8 * B * N,
        backward_flops=4 * B * known**2 * D,  # the similarities again, and their product with the features
    )
    name = f"affinity_loss {str(dtype).removeprefix('torch.')}{' amp' if amp else ''}"
    compare(
        benchmark,
        device,
        name,
        ours=affinity_loss,
        eager=plain,
        inputs=inputs,
        floor=floor,
        dtype=torch.bfloat16 if amp else dtype,
        amp=amp,
        graph=True,
    )
