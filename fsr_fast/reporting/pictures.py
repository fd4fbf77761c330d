"""Picture grids of a training and of an evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fsr_fast.evaluation.evaluator import Example
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.reporting.figures import heatmap, picture_grid


def evaluation_grid(examples: Sequence[Example], classes: Sequence[str]) -> Image.Image:
    """Arrange image | truth | CAM | pseudo | seg, one row per example."""
    rows = [
        [example.image, example.truth, _map(example.image, example.cam), example.pseudo, example.seg]
        for example in examples
    ]
    return picture_grid(rows, ["image", "truth", "CAM", "pseudo", "seg"], classes)


def training_grid(step: FSRStep, views: Sequence[Tensor], output: StepOutput, count: int) -> Image.Image:
    """Arrange view 1 | CAM | uncertain | pseudo label | view 2 without its masked patches, one row per image.

    Uncertain are the pixels of view 1 whose activation lies between the mask's two thresholds; they are bright.

    Args:
        step: whose output it is.
        views: two of (B, 3, H, W), normalised.
        output: with CAMs and pseudo labels.
        count: largest number of rows.
    """
    assert output.cams is not None
    assert output.pseudo_labels is not None
    size = views[0].shape[-2:]
    pictures = _pixels(step.student.denormalise(views[0][:count]))
    cams = F.interpolate(output.cams.values[:count].amax(1, keepdim=True), size=size, mode="bilinear")[:, 0]
    uncertain = ((cams > step.config.mask.low) & (cams < step.config.mask.high)).cpu().numpy()
    titles = ["view 1", "CAM", "uncertain", "pseudo label"]
    columns = [
        list(pictures),
        [_map(picture, cam) for picture, cam in zip(pictures, cams.cpu().numpy(), strict=True)],
        [np.where(mask[..., None], picture, picture // 4) for picture, mask in zip(pictures, uncertain, strict=True)],
        list(output.pseudo_labels[:count].cpu().numpy()),
    ]
    if output.mask is not None:
        masked = output.mask[:count].float().unflatten(1, step.student.encoder.grid)[:, None]
        shown = step.student.denormalise(views[1][:count]) * (F.interpolate(masked, size=size, mode="nearest") == 0)
        titles.append("view 2, masked")
        columns.append(list(_pixels(shown)))
    return picture_grid([list(row) for row in zip(*columns, strict=True)], titles, step.student.classes)


def _pixels(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def _map(picture: np.ndarray, cam: np.ndarray) -> np.ndarray | None:
    """Draw a CAM, unless it is empty: its heat map would look like that of a low CAM."""
    return heatmap(picture, cam) if cam.any() else None
