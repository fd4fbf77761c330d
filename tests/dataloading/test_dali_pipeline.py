"""The two pipelines give the same views: the draws are equal, the pixels up to rounding."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets

MEAN, LEVELS = (0.4, 0.5, 0.6), (1 / 255,) * 3  # views are counted in levels of 8 bits
PLAIN = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}
NONE = {"flip": 0.0, "jitter": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


@pytest.fixture(scope="module")
def train(creatures: DataConfig) -> SegmentationDataset:
    return build_datasets(creatures)[0]


def views(
    dataset: SegmentationDataset, pipeline: str, augment: dict[str, Any], *, size: int = 48, batches: int = 3
) -> Tensor:
    """Give the views of the first batches, (2, n, 3, H, W)."""
    data = DataConfig.model_validate({"image_size": size, "workers": 0, "pipeline": pipeline})
    options: dict[str, Any] = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 5, "mean": MEAN, "std": LEVELS}
    stream = build_train_loader(dataset, data, AugmentConfig.model_validate(augment), **options)
    return torch.cat([torch.stack(batch.views) for batch in islice(stream, batches)], 1)


def differences(dataset: SegmentationDataset, augment: dict[str, Any], **options: Any) -> Tensor:
    """Give the mean absolute difference of each view, in levels of 8 bits."""
    first, second = (views(dataset, pipeline, augment, **options) for pipeline in ("torch", "dali"))
    return (first - second).abs().mean((2, 3, 4))


def test_an_image_that_is_neither_cropped_nor_resized_is_equal(train: SegmentationDataset) -> None:
    assert differences(train, PLAIN, size=96).max() < 1e-3


@pytest.mark.parametrize(
    ("augment", "level"),
    [
        (NONE, 0.5),
        ({**NONE, "flip": 0.5}, 0.5),
        ({**NONE, "jitter": 1.0, "brightness": 0.4}, 0.7),
        ({**NONE, "jitter": 1.0, "contrast": 0.4}, 0.7),
        ({**NONE, "jitter": 1.0, "saturation": 0.4}, 0.7),
        ({**NONE, "jitter": 1.0, "hue": 0.5}, 1.2),
        ({**NONE, "blur": 0.5}, 1.5),
        ({**NONE, "solarise": 0.5}, 0.5),
        ({"jitter": 0.7}, 1.2),
    ],
    ids=["crop", "flip", "brightness", "contrast", "saturation", "hue", "blur", "solarise", "all jitter"],
)
def test_a_step_gives_the_pixels_of_the_torch_pipeline(
    train: SegmentationDataset, augment: dict[str, Any], level: float
) -> None:
    found = differences(train, augment)
    assert found.max() < level
    assert found.mean() < level / 2 + 0.05
