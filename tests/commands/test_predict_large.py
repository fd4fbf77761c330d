"""`fsr-fast predict` on pictures that are cut into tiles and written in bands."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fsr_fast.commands.predict import main
from fsr_fast.config import CONFIG_FOLDER, EvaluateConfig, build_config, read_yaml
from fsr_fast.dataloading import label_files
from fsr_fast.dataloading.creatures import KINDS, draw_scene
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.evaluation import activations, large, tiling
from fsr_fast.evaluation.large import plan_picture
from fsr_fast.models import build_network, load_network
from fsr_fast.runtime.checkpoint import write_checkpoint

LARGE_MIB = 2048


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The demonstration's network, untrained."""
    folder = tmp_path_factory.mktemp("run")
    config = build_config(read_yaml(CONFIG_FOLDER / "synthetic.yaml"), "the test")
    classes = [kind.name for kind in KINDS]
    torch.manual_seed(0)
    network = build_network(config.model, tuple(classes), config.data.image_size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {"iteration": 1, "config": config.model_dump(mode="json"), "classes": classes}
    write_checkpoint(folder, {**state, "student": network.state_dict()})
    return folder


def mosaic(height: int, width: int) -> np.ndarray:
    """Creatures side by side."""
    scenes = [draw_scene(5, number).image for number in range(12)]
    draws = np.random.default_rng(0)
    rows, columns = -(-height // 96), -(-width // 96)
    placed = [np.concatenate([scenes[draws.integers(12)] for _ in range(columns)], 1) for _ in range(rows)]
    return np.ascontiguousarray(np.concatenate(placed)[:height, :width])


def check_centre(
    run: Path, pixels: np.ndarray, mask: np.ndarray, tile: int, row: int, column: int, folder: Path
) -> None:
    """Segment one tile by itself: where no other tile reaches, the labels are those of the whole picture."""
    rows, columns = (
        spans.slice(number) for spans, number in zip(_plan(run, pixels.shape, tile), (row, column), strict=True)
    )
    Image.fromarray(pixels[rows, columns]).save(folder / "part.png")
    main(["--checkpoint", str(run), str(folder / "part.png"), "--output", str(folder / "part")])
    (path,) = (folder / "part/masks").iterdir()
    with Image.open(path) as alone:
        inner = slice(tile // 2 - 8, tile // 2 + 8)
        there, here = np.asarray(alone)[inner, inner], mask[rows, columns][inner, inner]
        assert len(np.unique(alone)) > 1
    assert (there == here).mean() > 0.99  # but for rounding


def _plan(run, shape, tile):
    cut = plan_picture(EvaluateConfig(tile=tile), load_network(run), shape[:2])
    return cut.network.rows, cut.network.columns


@pytest.fixture
def small_limits(monkeypatch):
    """All that is particular about large pictures, for small ones."""
    monkeypatch.setattr(label_files, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(large, "WHOLE_PIXELS", 1000)
    monkeypatch.setattr(activations, "PREVIEW", 128)
    monkeypatch.setattr(tiling, "BAND_VALUES", 1)  # bands of one row, most of which no preview shows


def test_a_large_picture_is_written_as_tiled_tiff_with_the_labels_of_its_parts(run, tmp_path, small_limits):
    pixels = mosaic(500, 330)
    tifffile.imwrite(tmp_path / "large.tif", pixels, tile=(128, 128), photometric="rgb")
    main(["--checkpoint", str(run), str(tmp_path / "large.tif"), "--output", str(tmp_path / "out"), "--tile", "96"])
    with tifffile.TiffFile(tmp_path / "out/masks/large.tif") as file:
        page, mask = file.pages[0], file.asarray()
        assert (page.is_tiled, page.photometric.name, page.compression.name) == (True, "PALETTE", "ADOBE_DEFLATE")
    with Image.open(tmp_path / "out/masks/large.tif") as picture:  # as other programs read it
        assert (picture.mode, picture.size) == ("P", (330, 500))
        assert np.array_equal(np.asarray(picture), mask)
        assert np.array_equal(np.asarray(picture.convert("RGB")), voc_palette()[mask])
    for row, column in ((0, 0), (2, 1), (6, 3)):
        check_centre(run, pixels, mask, 96, row, column, tmp_path)
    scores = json.loads((tmp_path / "out/scores.json").read_text())[str(tmp_path / "large.tif")]["scores"]
    with (tmp_path / "out/results.csv").open() as file:
        areas = [int(row["pixels"]) for row in csv.DictReader(file)]
    assert areas == np.bincount(mask.ravel(), minlength=7).tolist()
    shown = [name for name, score in scores.items() if score > 0.5] or [max(scores, key=scores.get)]
    assert {path.name for path in (tmp_path / "out/cams").iterdir()} == {f"large_{name}.png" for name in shown}
    with Image.open(tmp_path / "out/overlays/large.png") as picture:
        assert picture.size == (83, 125)  # every fourth pixel


@pytest.mark.slow
def test_a_picture_of_ten_thousand_pixels_takes_less_than_two_gigabytes(run, tmp_path):
    pixels = mosaic(8000, 10_000)
    tifffile.imwrite(tmp_path / "large.tif", pixels, tile=(256, 256), photometric="rgb")
    paths = [str(tmp_path / "large.tif"), "--output", str(tmp_path / "out")]
    settings = ["--tile", "128", "--cam.scales", "1.0"]
    command = [sys.executable, "-m", "fsr_fast", "predict", "--checkpoint", str(run), *paths, *settings]
    subprocess.run(command, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 < LARGE_MIB
    mask = tifffile.imread(tmp_path / "out/masks/large.tif")
    assert mask.shape == (8000, 10_000)
    for row, column in ((0, 0), (40, 51), (82, 103)):
        check_centre(run, pixels, mask, 128, row, column, tmp_path)
