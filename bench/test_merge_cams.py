"""The CAM merge of a batch: every class at full resolution against the present ones, resized on the fly."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import merge_cams

SLOTS = 4
SCALES = (1.0, 0.5, 1.5)


def written_out(labels: Tensor, *maps: Tensor, side: int, output: int | None) -> Tensor:
    """The merge as one writes it: all classes, then those that are present."""
    merged = torch.zeros((), device=labels.device)
    for cam, mirror in zip(maps[: len(SCALES)], maps[len(SCALES) :], strict=True):
        resized, unflipped = (
            F.interpolate(m.relu(), size=(side, side), mode="bilinear", align_corners=False).float()
            for m in (cam, mirror)
        )
        merged = merged + torch.maximum(resized, unflipped.flip(3))
    merged = merged - merged.amin((2, 3), keepdim=True)
    merged = merged / (merged.amax((2, 3), keepdim=True) + 1e-5) * labels[:, :, None, None]
    if output is None:
        return merged
    return F.interpolate(merged, size=(output, output), mode="bilinear", align_corners=False)


def ours(labels: Tensor, *maps: Tensor, side: int, output: int | None) -> Tensor:
    output_size = None if output is None else (output, output)
    cams, flipped = maps[: len(SCALES)], maps[len(SCALES) :]
    return merge_cams(cams, flipped, labels, max_classes=SLOTS, size=(side, side), output_size=output_size).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [20, 80])
@pytest.mark.parametrize("resized", [False, True], ids=["full", "resized"])
def test_merge_cams(benchmark: Any, device: torch.device, dtype: torch.dtype, classes: int, resized: bool) -> None:
    if device.type == "cpu" and (dtype != torch.float32 or classes != 20):
        pytest.skip("the CPU is measured in fp32 with VOC's classes")
    B, grid = size(device, gpu=(16, 28), cpu=(2, 14))
    side, output = 16 * grid, grid if resized else None

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        labels = (torch.rand(B, classes, generator=generator) < 2 / classes).float()
        maps = (
            torch.randn(B, classes, int(scale * grid), int(scale * grid), generator=generator).to(dtype).to(device)
            for scale in 2 * SCALES
        )
        return labels.to(device), *maps

    low = sum(int(scale * grid) ** 2 for scale in 2 * SCALES) * torch.finfo(dtype).bits // 8
    floor = Floor(
        forward_bytes=B * SLOTS * (low + 4 * (output or side) ** 2),
        forward_flops=B * SLOTS * side**2 * len(SCALES) * 8,  # rows of image and mirror 6, maximum, sum
    )
    options = {"side": side, "output": output}
    compare(
        benchmark,
        device,
        f"merge_cams {'bf16' if dtype == torch.bfloat16 else 'fp32'} B={B} C={classes} "
        f"{side}x{side} to {output or side}x{output or side}",
        ours=partial(ours, **options),
        eager=partial(written_out, **options),
        inputs=inputs,
        floor=floor,
        dtype=dtype,
        graph=True,
    )
