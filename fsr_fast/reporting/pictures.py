"""Picture grids of a training and of an evaluation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fsr_fast.evaluation.evaluator import Example
from fsr_fast.reporting.figures import heatmap, picture_grid
from fsr_fast.step import StepOutput


def evaluation_grid(examples: Sequence[Example], classes: Sequence[str]) -> Image.Image:
    """Lay out image | truth | CAM | pseudo | seg, one row an example."""
    rows = [
        [example.image, example.truth, heatmap(example.image, example.cam), example.pseudo, example.seg]
        for example in examples
    ]
    return picture_grid(rows, ["image", "truth", "CAM", "pseudo", "seg"], classes)


def training_grid(
    images: Tensor, output: StepOutput, classes: Sequence[str], grid: tuple[int, int], count: int
) -> Image.Image:
    """Lay out view 1 | CAM | pseudo label | view 2's mask, one row an image.

    Args:
        images: (B, 3, H, W), view 1, 0…255.
        output: of the step on it, with pseudo labels.
        classes: names of the foreground classes.
        grid: h and w, patches.
        count: largest number of rows.
    """
    assert output.cams is not None
    assert output.pseudo_labels is not None
    size = images.shape[-2:]
    pictures = images[:count].permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
    cams = (
        F.interpolate(output.cams.values[:count].amax(1, keepdim=True), size=size, mode="bilinear")[:, 0].cpu().numpy()
    )
    pseudo_labels = output.pseudo_labels[:count].cpu().numpy()
    titles = ["view 1", "CAM", "pseudo label"]
    columns = [
        list(pictures),
        [heatmap(picture, cam) for picture, cam in zip(pictures, cams, strict=True)],
        list(pseudo_labels),
    ]
    if output.mask is not None:
        masks = F.interpolate(output.mask[:count].float().unflatten(1, grid)[:, None], size=size, mode="nearest")
        titles.append("mask of view 2")
        columns.append(list((masks.expand(-1, 3, -1, -1) * 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()))
    return picture_grid([list(row) for row in zip(*columns, strict=True)], titles, classes)
