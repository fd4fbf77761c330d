"""The segmentation loss of a batch: logits resized to the labels against cells of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.method.losses import segmentation_loss


def written_out(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as one writes it: resize, then cross-entropy once for each set."""
    resized = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).float()
    labels = labels.long()
    background = F.cross_entropy(resized, labels.where(labels == 0, 255), ignore_index=255)
    foreground = F.cross_entropy(resized, labels.where(labels != 0, 255), ignore_index=255)
    return 0.5 * (background + foreground)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels", [21, 81])
def test_segmentation_loss(benchmark: Any, device: torch.device, dtype: torch.dtype, channels: int) -> None:
    if device.type == "cpu" and (dtype != torch.float32 or channels != 21):
        pytest.skip("the CPU is measured in fp32 with VOC's classes")
    B, h, H = size(device, gpu=(16, 28, 448), cpu=(2, 14, 224))

    def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits = torch.randn(B, channels, h, h, generator=generator).to(dtype).to(device)
        if device.type == "cuda":  # as the decoder's are there
            logits = logits.to(memory_format=torch.channels_last)
        labels = torch.randint(0, channels + 1, (B, H, H), generator=generator)
        labels = labels.where(labels < channels, 255).where(torch.rand(B, H, H, generator=generator) > 0.5, 0)
        return logits.requires_grad_(), labels.to(torch.uint8).to(device)

    logit_bytes = torch.finfo(dtype).bits // 8 * B * channels * h * h
    floor = Floor(
        forward_bytes=logit_bytes + B * H * H,
        forward_flops=8 * B * channels * H * H,  # resize of the rows 3, softmax 5
        backward_bytes=logit_bytes,
        backward_flops=6 * B * channels * H * H,  # gradient 2, its share of two rows 4
    )
    compare(
        benchmark,
        device,
        f"segmentation_loss {'bf16' if dtype == torch.bfloat16 else 'fp32'} B={B} C+1={channels} {H}x{H}",
        ours=segmentation_loss,
        eager=written_out,
        inputs=inputs,
        floor=floor,
        dtype=dtype,
        graph=True,
    )
