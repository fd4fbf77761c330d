"""Pixel-adaptive refinement, and the pseudo-label stage around it: one affinity for both background scores."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import pixel_adaptive_refinement, refine_pseudo_labels
from fsr_fast.kernels.refinement import DILATIONS
from fsr_fast.kernels.refinement_kernels import COLOUR_SCALE, EPSILON, neighbour_offsets, place_weights

ITERATIONS = 10
NEIGHBOURS = 8 * len(DILATIONS)


def refine_written_out(images: Tensor, maps: Tensor) -> Tensor:
    """The refinement as one writes it: all neighbours side by side, again in every iteration."""
    border = max(DILATIONS)

    def neighbours(planes: Tensor) -> Tensor:
        h, w = planes.shape[2:]
        padded = F.pad(planes, (border, border, border, border), mode="replicate")
        offsets = [(border + dy, border + dx) for dy, dx in neighbour_offsets(DILATIONS)]
        return torch.stack([padded[:, :, y : y + h, x : x + w] for y, x in offsets], dim=2)

    beside = neighbours(images)
    scale = (beside.std(dim=2, keepdim=True) + EPSILON) * COLOUR_SCALE
    logits = -((beside - images[:, :, None]) / scale).square().sum(dim=1)
    place = torch.tensor(place_weights(DILATIONS), device=images.device)
    affinity = logits.softmax(dim=1) + place[:, None, None]
    for _ in range(ITERATIONS):
        maps = torch.einsum("bnhw,bmnhw->bmhw", affinity, neighbours(maps))
    return maps


def label_written_out(images: Tensor, cams: Tensor, classes: Tensor, live: Tensor) -> Tensor:
    """The pseudo labels as one writes them: image by image, since each has its own classes."""
    labels = []
    for image, cam, index, alive in zip(images, cams, classes, live, strict=True):
        keys = torch.cat([index.new_zeros(1), index[alive] + 1])
        winners = []
        for background in (0.7, 0.25):
            scores = torch.cat([torch.full_like(cam[:1], background), cam[alive]]).softmax(dim=0)
            refined = refine_written_out(image[None], scores[None])
            winners.append(keys[F.interpolate(refined, scale_factor=2, mode="bilinear")[0].argmax(dim=0)])
        high, low = winners
        labels.append(torch.where((high == 0) & (low != 0), 255, high).to(torch.uint8))
    return torch.stack(labels)


def draw_images(generator: torch.Generator, B: int, side: int) -> Tensor:
    coarse = torch.rand(B, 3, side // 8, side // 8, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic")
    return smooth + 0.02 * torch.randn(B, 3, side, side, generator=generator)


def refinement_bytes(B: int, live: int, pixels: int) -> int:
    """Read the image, write the affinity once, read it and the maps and write the maps in every iteration."""
    return 4 * B * pixels * (3 + NEIGHBOURS + ITERATIONS * (NEIGHBOURS + 2 * live))


def refinement_flops(B: int, live: int, pixels: int) -> int:
    """Mean, std and distance of 3 channels, softmax; one multiply-add per neighbour, map and iteration."""
    return B * pixels * NEIGHBOURS * (3 * 7 + 5 + 2 * live * ITERATIONS)


def test_pixel_adaptive_refinement(benchmark: Any, device: torch.device) -> None:
    B, M, side = size(device, gpu=(16, 4, 224), cpu=(2, 2, 64))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        maps = torch.rand(B, M, side, side, generator=generator)
        return draw_images(generator, B, side).to(device), maps.to(device)

    floor = Floor(refinement_bytes(B, M, side**2), refinement_flops(B, M, side**2))
    compare(
        benchmark,
        device,
        f"pixel_adaptive_refinement fp32 B={B} M={M} {side}x{side}",
        ours=pixel_adaptive_refinement,
        eager=refine_written_out,
        inputs=inputs,
        floor=floor,
    )


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_refine_pseudo_labels(benchmark: Any, device: torch.device, small: bool) -> None:
    if small:
        B, M, side = 32, 4, 24
    else:
        B, M, side = size(device, gpu=(16, 4, 224), cpu=(2, 4, 64))
    classes_each = 2

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        coarse = torch.rand(B, M, max(2, side // 16), max(2, side // 16), generator=generator)
        cams = F.interpolate(coarse, size=(side, side), mode="bilinear")
        classes = torch.arange(M).expand(B, M).contiguous()
        live = (classes < classes_each).contiguous()
        return draw_images(generator, B, side).to(device), cams.to(device), classes.to(device), live.to(device)

    def ours(images: Tensor, cams: Tensor, classes: Tensor, live: Tensor) -> Tensor:
        return refine_pseudo_labels(images, cams, classes, live, size=(2 * side, 2 * side))

    # two background scores; the background's own channel follows from the others
    refined = 2 * classes_each
    floor = Floor(
        refinement_bytes(B, refined, side**2) + B * side**2 * (4 * classes_each + 4 * refined + 4),
        refinement_flops(B, refined, side**2),
    )
    compare(
        benchmark,
        device,
        f"refine_pseudo_labels fp32 B={B} M={M} {2 * side}x{2 * side}",
        ours=ours,
        eager=label_written_out,
        inputs=inputs,
        floor=floor,
    )
