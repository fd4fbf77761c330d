"""Training on large pictures: crops are read by region where the format allows it."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import reading, regions, tiff
from fsr_fast.dataloading.batch import Batch
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.regions import read_crop

SIDE, TILE = 320, 64
SMALL = AugmentConfig(crop_scale=(0.005, 0.02), jitter=1.0, blur=0.5)


def pixels(channels: int = 3) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (20, 20, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., band]).resize((SIDE, SIDE)) for band in range(channels)]
    return np.stack([np.asarray(band) for band in bands], 2)


def batches(folder: Path, ending: str, values: np.ndarray, augment: AugmentConfig = SMALL) -> list[Batch]:
    """Load two batches of one picture."""
    (folder / "images").mkdir(parents=True)
    if ending == "png":
        Image.fromarray(values).save(folder / "images/a.png")
    else:
        planes = values if values.shape[2] == 3 else values.transpose(2, 0, 1)
        kind = "rgb" if values.shape[2] == 3 else "minisblack"
        tifffile.imwrite(folder / "images/a.tif", planes, tile=(TILE, TILE), photometric=kind)
    (folder / "train.csv").write_text("image,labels\na,cat\n")
    data = {"dataset": "own", "root": folder, "train_list": "train", "val_list": None, "classes": ["cat"], "workers": 0}
    config = DataConfig.model_validate({**data, "image_size": 32, "pipeline": "torch"})
    train, _ = build_datasets(config, reading.Reading(channels=values.shape[2]))
    channels = values.shape[2]
    options = {
        "batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "mean": [0.5] * channels,
        "std": [0.2] * channels,
    }
    return list(islice(build_train_loader(train, config, augment, **options), 2))


def views(found: list[Batch]) -> torch.Tensor:
    return torch.cat([view for batch in found for view in batch.views])


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The tiles that are decoded."""
    numbers: list[int] = []
    decode = tiff.Tiff._decode
    monkeypatch.setattr(
        tiff.Tiff, "_decode", lambda self, page, index: numbers.append(index) or decode(self, page, index)
    )
    return numbers


@pytest.mark.parametrize("channels", [3, 5])
def test_crops_of_a_large_tiff_are_read_by_region_and_are_those_of_the_whole_bit_for_bit(
    tmp_path, monkeypatch, decoded, channels
):
    values = pixels(channels)
    whole = views(batches(tmp_path / "whole", "tif", values))
    decoded.clear()
    monkeypatch.setattr(reading, "LARGE_PIXELS", 1000)
    assert torch.equal(views(batches(tmp_path / "region", "tif", values)), whole)
    assert 0 < len(set(decoded)) < (SIDE // TILE) ** 2


def test_other_formats_and_small_pictures_are_decoded_whole_as_ever(tmp_path, monkeypatch, decoded):
    values = pixels()
    png = views(batches(tmp_path / "png", "png", values))
    assert torch.equal(views(batches(tmp_path / "small", "tif", values)), png)
    monkeypatch.setattr(reading, "LARGE_PIXELS", 1000)
    assert torch.equal(views(batches(tmp_path / "large", "png", values)), png)
    assert decoded == []


class Rows:
    """A picture that remembers the most rows that were read at a time."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.most = values, 0

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        region = self.values[key]
        self.most = max(self.most, len(region))
        return region


def test_a_crop_of_too_many_pixels_is_averaged_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(regions, "BAND", 16)
    values = Rows(pixels())
    rows, columns = slice(3, 303), slice(10, 314)
    assert np.array_equal(read_crop(values, rows, columns, 32), values.values[rows, columns])
    values.most = 0
    monkeypatch.setattr(regions, "CROP_PIXELS", 1000)
    found = read_crop(values, rows, columns, 32)  # 300 pixels are more than four times 2 · 32
    assert values.most <= 16
    assert found.shape == (75, 76, 3)
    squares = values.values[rows, columns].reshape(75, 4, 76, 4, 3).mean((1, 3))
    assert np.abs(found - squares).max() < 0.51
