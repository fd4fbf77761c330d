"""Depth and channels: what a network sees of pictures of any kind, and what is measured once over the training list."""

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fsr_fast.commands.data import main as pack
from fsr_fast.config import AugmentConfig, DataConfig, build_config
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.images import DamagedFileError, Source, read_image
from fsr_fast.dataloading.measured import BLOCK, BLOCKS, measure
from fsr_fast.dataloading.reading import Reading, picture_size, to_bytes
from fsr_fast.errors import UserError
from tests import helpers

RANDOM = np.random.default_rng(0)
TWELVE = ((0.0, 4095.0),)


class Files:
    """A list of pictures."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> tuple[Source, str]:
        return self.paths[index], str(self.paths[index])


def window(files: Files, reading: Reading | None = None, **data: Any) -> Any:
    config = DataConfig.model_validate(data)
    return measure(files, config, reading or Reading(), normalisation=False).window


def save(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))
    else:
        tifffile.imwrite(path, values, photometric="rgb" if values.shape[-1] == 3 else "minisblack")
    return path


# --- depth


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "bmp", "webp"])
def test_pictures_of_eight_bits_are_as_pillow_reads_them_whatever_the_window(
    tmp_path: Path, mode: str, ending: str
) -> None:
    picture = Image.fromarray(RANDOM.integers(0, 256, (9, 11, 3), dtype=np.uint8)).convert(mode)
    try:
        picture.save(tmp_path / f"picture.{ending}")
    except (OSError, ValueError):
        return  # a format without this mode
    with Image.open(tmp_path / f"picture.{ending}") as stored:
        by_hand = (stored.convert("RGBA") if stored.mode == "P" else stored).convert("RGB")
    for reading in (Reading(), Reading(window=TWELVE)):
        np.testing.assert_array_equal(reading.pixels(tmp_path / f"picture.{ending}"), np.asarray(by_hand))


@pytest.mark.parametrize("ending", ["png", "tif", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_become_the_eight_upper_ones(tmp_path: Path, ending: str, channels: int) -> None:
    values = RANDOM.integers(0, 4096, (9, 11, channels), dtype=np.uint16)
    path = save(tmp_path / f"deep.{ending}", values)
    found = Reading(window=TWELVE).pixels(path)
    np.testing.assert_array_equal(found, np.broadcast_to(values >> 4, (9, 11, 3)))
    np.testing.assert_array_equal(Reading(window=TWELVE).image(path), found)


@pytest.mark.parametrize("bits", [12, 16])
def test_each_value_of_12_and_16_bits_becomes_its_upper_eight(bits: int) -> None:
    values = np.arange(2**bits, dtype=np.uint16)[:, None, None]
    np.testing.assert_array_equal(to_bytes(values, ((0, 2**bits - 1),)), values >> (bits - 8))


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32])
def test_the_ends_of_the_narrowest_window_are_black_and_white(dtype: Any) -> None:
    assert to_bytes(np.array([[[6], [7], [8], [9]]], dtype), ((7, 8),)).ravel().tolist() == [0, 0, 255, 255]


def test_floating_point_is_cut_into_256_equal_steps() -> None:
    values = np.array([[-9.0, -1.0, -0.9999, 0.0, 0.9921, 0.9922, 1.0, 7.0]], np.float32)
    assert to_bytes(values[..., None], ((-1.0, 1.0),))[..., 0].tolist() == [[0, 0, 0, 128, 254, 255, 255, 255]]


def test_each_channel_may_have_a_window_of_its_own() -> None:
    values = np.array([[[0, 1000], [128, 1128], [255, 1255]]], np.int32)
    np.testing.assert_array_equal(to_bytes(values, ((0, 255), (1000, 1255))), values % 1000)


def test_without_a_window_whole_numbers_are_read_as_before(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 2**16, (9, 11), dtype=np.uint16)
    path = save(tmp_path / "deep.png", values)
    np.testing.assert_array_equal(Reading().pixels(path)[..., 0], values >> 8)
    np.testing.assert_array_equal(Reading().pixels(path), np.asarray(read_image(path)))


def test_a_picture_that_would_be_nearly_black_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "deep.png", np.full((9, 11), 4095, np.uint16))
    for _ in range(2):
        Reading().pixels(path)
    (record,) = caplog.records
    assert "16 bits per channel, of which the highest value is 4095: nearly black" in record.message
    assert "--data.window LOW HIGH" in record.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "height.npy", np.array([[[1.0], [value]]], np.float32))
    with pytest.raises(DamagedFileError, match=r"height\.npy: holds values that are not finite \(NaN"):
        Reading(window=TWELVE).pixels(path)


def test_floating_point_without_a_window_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "height.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(DamagedFileError, match=r"floating point, and no window is known; give --data\.window"):
        Reading().pixels(path)


# --- channels


@pytest.mark.parametrize("ending", ["tif", "npy"])
def test_five_channels_are_read_whole_and_by_region(tmp_path: Path, ending: str) -> None:
    values = RANDOM.integers(0, 256, (9, 11, 5), dtype=np.uint8)
    path = tmp_path / f"bands.{ending}"
    if ending == "npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values.transpose(2, 0, 1), photometric="minisblack")
    reading = Reading(channels=5)
    np.testing.assert_array_equal(reading.pixels(path), values)
    np.testing.assert_array_equal(reading.open(path)[2:5, 3:9], values[2:5, 3:9])
    np.testing.assert_array_equal(reading.image(path), values[..., :3])
    np.testing.assert_array_equal(Reading(5, preview=(4, 2, 0)).image(path), values[..., [4, 2, 0]])
    np.testing.assert_array_equal(Reading(5, preview=(4,)).image(path), values[..., [4, 4, 4]])
    assert picture_size(path) == (11, 9)


@pytest.mark.parametrize(("found", "wanted"), [(3, 1), (5, 3), (2, 5), (3, 4), (1, 4)])
def test_another_number_of_channels_is_one_clear_error(tmp_path: Path, found: int, wanted: int) -> None:
    path = save(tmp_path / "picture.npy", np.zeros((9, 11, found), np.uint8))
    with pytest.raises(
        DamagedFileError, match=rf"{found} channels, but the network takes {wanted} \(model\.in_chans\)"
    ):
        Reading(channels=wanted).pixels(path)


@pytest.mark.parametrize("pages", [2, 4])
def test_no_page_of_a_tiff_is_left_out_as_transparency(tmp_path: Path, pages: int) -> None:
    values = RANDOM.integers(0, 256, (9, 11, pages), dtype=np.uint8)
    path = tmp_path / "dyes.tif"
    tifffile.imwrite(path, values.transpose(2, 0, 1), photometric="minisblack")
    with pytest.raises(DamagedFileError, match=rf"if all have as many, give --model\.in_chans {pages} to the training"):
        Reading().pixels(path)
    np.testing.assert_array_equal(Reading(channels=pages).pixels(path), values)


def test_channels_that_lie_first_are_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "picture.npy", np.zeros((5, 9, 11), np.uint8))
    with pytest.raises(DamagedFileError, match="they seem to be the first axis: store them last"):
        Reading(channels=5).pixels(path)


# --- found once


def test_the_window_is_from_the_lowest_to_the_highest_value_of_all_pictures(tmp_path: Path) -> None:
    files = Files(
        save(tmp_path / "a.png", np.array([[7, 40]], np.uint16)),
        save(tmp_path / "b.png", np.array([[[900, 20, 30]]], np.uint16)),
        save(tmp_path / "c.png", np.array([[0, 255]], np.uint8)),
    )
    assert window(files) == ((7.0, 900.0),)
    assert window(files, window=(0, 4095)) == TWELVE
    assert window(Files(files.paths[2])) is None


def test_channels_that_are_no_colours_have_a_window_each(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 5), np.float32)
    values[1] = [1, 10, 100, 1000, 0]
    found = window(Files(save(tmp_path / "a.npy", values)), Reading(channels=5))
    assert found == ((0, 1), (0, 10), (0, 100), (0, 1000), (0, 1))


def test_percentiles_leave_single_values_out(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    values[0, 0], values[0, 1] = 65535, 65535
    found = window(Files(save(tmp_path / "a.png", values)), window=("percentile", 1, 99))
    np.testing.assert_allclose(found, [[11.99, 989.01]], atol=2)


def test_a_window_that_single_values_stretch_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = RANDOM.integers(0, 4096, (100, 100), dtype=np.uint16)
    values[0, 0] = 65535
    window(Files(save(tmp_path / "a.png", values)))
    assert "try --data.window percentile 0.1 99.9" in caplog.text


def test_the_sample_is_the_same_each_time_and_leaves_damaged_pictures_out(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.npy", RANDOM.normal(size=(6, 5, 2)).astype(np.float32)) for number in range(9)]
    np.save(paths[3], np.full((6, 5, 2), np.nan))
    first, second = (measure(Files(*paths), DataConfig(), Reading(channels=2), normalisation=True) for _ in range(2))
    assert first == second
    values = np.stack([np.load(path) for number, path in enumerate(paths) if number != 3])
    assert first.window == tuple((float(one.min()), float(one.max())) for one in values.transpose(3, 0, 1, 2))


def test_mean_and_deviation_are_those_of_what_the_network_sees(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 256, (30, 20, 4), dtype=np.uint8)
    values[:9, ..., 0] = 250
    values[..., 3] = 9
    files = Files(save(tmp_path / "a.npy", values[:12]), save(tmp_path / "b.npy", values[12:]))
    found = measure(files, DataConfig(), Reading(channels=4), normalisation=True)
    np.testing.assert_allclose(found.mean, values.mean((0, 1)) / 255)
    np.testing.assert_allclose(found.std[:3], values.std((0, 1))[:3] / 255)
    assert found.std[3] == 1 / 255  # of a constant channel one grey level, not 0


def test_of_a_large_picture_blocks_are_looked_at(tmp_path: Path) -> None:
    side = BLOCK * BLOCKS + 100
    values = np.zeros((side, side, 1), np.uint16)
    values[-1, -1], values[BLOCK + 5, BLOCK + 5] = 500, 60000  # in a block, and between blocks
    assert window(Files(save(tmp_path / "a.npy", values)), Reading(channels=1)) == ((0, 500),)


# --- both pipelines


def scientific(root: Path, channels: int, ending: str = "npy") -> DataConfig:
    """Six smooth pictures of 12 bits with labels."""
    (root / "images").mkdir(parents=True)
    for number in range(6):
        coarse = torch.from_numpy(RANDOM.uniform(0, 4095, (1, channels, 4, 5)))
        smooth = torch.nn.functional.interpolate(coarse, size=(50, 60), mode="bicubic")[0].permute(1, 2, 0)
        save(root / "images" / f"{number}.{ending}", smooth.numpy().clip(0, 4095).astype(np.uint16))
    (root / "classes.txt").write_text("blob\n")
    (root / "train.csv").write_text("image,labels\n" + "".join(f"{number}.{ending},blob\n" for number in range(6)))
    values = {"dataset": "own", "root": root, "train_list": "train", "val_list": None, "image_size": 32, "workers": 0}
    return DataConfig.model_validate(values)


@pytest.mark.parametrize(("channels", "ending"), [(1, "png"), (3, "png"), (3, "tif"), (5, "npy")])
@pytest.mark.parametrize(
    ("changes", "largest"), [({"jitter": 0.0}, 2), ({"jitter": 1.0}, 4), ({"solarise": 1.0}, None)]
)
def test_both_pipelines_give_the_same_views(
    tmp_path: Path, channels: int, ending: str, changes: dict[str, float], largest: float | None
) -> None:
    data = scientific(tmp_path, channels, ending)
    train, _ = build_datasets(data, Reading(channels, TWELVE))
    options: dict[str, Any] = {"batch_size": 6, "rank": 0, "world_size": 1, "seed": 0}
    options |= {"mean": (0.0,) * channels, "std": (1 / 255,) * channels}
    first, second = (
        next(build_train_loader(train, data.model_copy(update={"pipeline": kind}), AugmentConfig(**changes), **options))
        for kind in ("torch", "dali")
    )
    for ours, theirs in zip(first.views, second.views, strict=True):
        assert ours.shape == (6, channels, 32, 32)
        assert ours.std() > 20
        difference = (ours - theirs).abs()
        assert difference.mean() < 1
        # solarisation turns a step at 128 into a leap, and hues are rounded otherwise
        assert largest is None or (channels == 3 and changes["jitter"]) or difference.max() <= largest


def test_brightness_and_contrast_change_channels_and_saturation_and_hue_do_not(tmp_path: Path) -> None:
    data = scientific(tmp_path, 5)
    train, _ = build_datasets(data, Reading(5, TWELVE))
    options: dict[str, Any] = {"batch_size": 6, "rank": 0, "world_size": 1, "seed": 0}
    options |= {"mean": (0.0,) * 5, "std": (1 / 255,) * 5}
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    for kind in ("torch", "dali"):
        views = {}
        for name in ("nothing", *none):
            augment = AugmentConfig(jitter=1.0, **{**none, **({} if name == "nothing" else {name: 0.4})})
            views[name] = next(
                build_train_loader(train, data.model_copy(update={"pipeline": kind}), augment, **options)
            ).views[0]
        for name, changed in (("brightness", True), ("contrast", True), ("saturation", False), ("hue", False)):
            assert (not torch.equal(views[name], views["nothing"])) == changed, (kind, name)


@pytest.mark.parametrize(("channels", "ending"), [(1, "png"), (3, "tif"), (5, "npy")])
def test_shards_hold_deep_pictures_as_they_are(tmp_path: Path, channels: int, ending: str) -> None:
    data = scientific(tmp_path / "set", channels, ending)
    pack(["pack", str(tmp_path / "set"), "--output", str(tmp_path / "shards")])
    shards = data.model_copy(update={"dataset": "shards", "root": tmp_path / "shards"})
    reading = Reading(channels, TWELVE)
    (files, _), (packed, _) = (build_datasets(one, reading) for one in (data, shards))
    for index in range(len(files)):
        assert packed.encoded(index).data == files.encoded(index).data
        np.testing.assert_array_equal(packed.pixels(index), files.pixels(index))
    assert measure(packed, data, reading, normalisation=True) == measure(files, data, reading, normalisation=True)
    other = packed.read_as(Reading(channels, ((0, 1),)))
    assert set(np.unique(other.pixels(0))) <= {0, 255}
    np.testing.assert_array_equal(packed.pixels(0), files.pixels(0))


# --- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"window": [5, 4]}}, r"data\.window: .*expected auto, percentile LOW HIGH"),
        ({"data": {"window": ["percentile", 5, 400]}}, r"data\.window"),
        ({"data": {"window": []}}, r"data\.window"),
        ({"data": {"window": [0, 1, 2]}}, r"data\.window"),
        ({"data": {"window": [0, 1, 0, 1]}}, r"data\.window: 2 pairs for 3 channels"),
        ({"data": {"preview_channels": [1, 2]}}, r"preview_channels: 2 channels; expected one or three"),
        ({"data": {"preview_channels": [1, 2, 4]}}, r"preview_channels: 4 of 3 channels"),
        ({"model": {"mean": [0.5], "std": [0.5]}}, r"mean: 1 numbers for 3 channels"),
        ({"model": {"mean": [0.5, 0.5, 0.5]}}, r"only one is given; give both"),
        ({"model": {"in_chans": 5}, "augment": {"policy": "autoaugment"}}, r"augment\.policy: .*three colours"),
        (
            {"model": {"in_chans": 5}, "run": {"engine": "reference"}},
            r"run\.engine: .*three colours",
        ),
    ],
)
def test_what_does_not_fit_the_channels_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(helpers.values(changes), "the test")


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ("auto", "auto"),
        ("percentile 1 99", ("percentile", 1, 99)),
        ("-1000 1000", (-1000, 1000)),
        ([0, 4095], (0, 4095)),
    ],
)
def test_a_window_is_read_as_text_or_as_list(given: Any, window: Any) -> None:
    assert DataConfig(window=given).window == window
