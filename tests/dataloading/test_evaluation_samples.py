from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets
from fsr_fast.dataloading.torch_pipeline import evaluation_samples
from fsr_fast.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def val(creatures: DataConfig) -> SegmentationDataset:
    return build_datasets(creatures)[1]


def numbers(samples: Iterator[Any]) -> list[int]:
    return [sample.index for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_once_in_order(val: SegmentationDataset, workers: int) -> None:
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "workers": workers}
    assert numbers(evaluation_samples(val, **options)) == list(range(7))
    assert numbers(evaluation_samples(val, rank=1, world_size=3, **options)) == [1, 4]
    assert numbers(evaluation_samples(val, limit=3, **options)) == [0, 1, 2]


def test_an_evaluation_sample_is_the_image_as_it_is(val: SegmentationDataset) -> None:
    sample = next(evaluation_samples(val, mean=MEAN, std=STD))
    expected = ((np.asarray(val.image(0), np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(sample.image.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert sample.image.dtype == torch.float32
    assert (sample.name, sample.index) == (val.ids[0], 0)
    np.testing.assert_array_equal(sample.labels.numpy(), val.labels[0])
    assert sample.mask is not None
    np.testing.assert_array_equal(sample.mask.numpy(), val.mask(0))
    assert sample.mask.dtype == torch.uint8


def test_an_image_without_mask_is_evaluated_without(folder: Any) -> None:
    train, _ = build_datasets(DataConfig(dataset="voc", root=folder, classes=("ant", "bee", "cat", "dog")))
    (folder / "SegmentationClassAug/one.png").unlink()
    assert next(evaluation_samples(train, mean=MEAN, std=STD)).mask is None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_named_without_a_traceback(folder: Any, workers: int) -> None:
    val = build_datasets(DataConfig(dataset="voc", root=folder, classes=("ant", "bee", "cat", "dog")))[1]
    (folder / "JPEGImages/six.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"six\.jpg: cannot be decoded") as error:
        list(evaluation_samples(val, mean=MEAN, std=STD, workers=workers))
    assert "Traceback" not in str(error.value)
