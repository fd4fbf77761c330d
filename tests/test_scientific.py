"""Whole runs on pictures that are not photographs: 12 bits, five channels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fsr_fast import segment
from fsr_fast.commands import parsers
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.export import main as export
from fsr_fast.commands.predict import main as predict
from fsr_fast.commands.pseudo_labels import main as label
from fsr_fast.dataloading.measured import read_measured
from fsr_fast.errors import UserError
from fsr_fast.evaluation.portable import describe, export_program
from fsr_fast.models import load_network
from fsr_fast.models.build import build_network, open_trained
from fsr_fast.options import given
from fsr_fast.reporting.demo import DemoServer
from fsr_fast.runtime.checkpoint import list_checkpoints, read_checkpoint
from fsr_fast.train import main as train
from tests import helpers

CHANNELS = 5


def run(folder: Path, root: Path, *changes: dict[str, Any]) -> Path:
    """Train the tiny recipe and return its run folder."""
    recipe = helpers.values(*changes, root=root, output=folder / "run")
    folder.mkdir(parents=True, exist_ok=True)
    train(["--config", str(helpers.write_config(folder / "recipe.yaml", recipe))])
    return folder / "run"


def twins(folder: Path) -> tuple[Path, Path]:
    """Write the tiny data set with 8 bits, and with 12, whose upper eight are the same."""
    draws = np.random.default_rng(0)
    shallow, deep = (helpers.write_dataset(folder / name) for name in ("shallow", "deep"))
    for number, path in enumerate(sorted((shallow / "JPEGImages").glob("*.jpg"))):
        with Image.open(path) as picture:
            values = np.array(picture)
        path.unlink()
        (deep / "JPEGImages" / path.name).unlink()
        values[0, 0], values[0, 1] = 0, 255
        Image.fromarray(values).save(path.with_suffix(".png"))
        twelve = 16 * values.astype(np.uint16) + draws.integers(0, 16, values.shape, dtype=np.uint16)
        twelve[0, 0], twelve[0, 1] = 0, 4095
        target = deep / "JPEGImages" / path.stem
        if number % 2:
            tifffile.imwrite(target.with_suffix(".tif"), twelve, photometric="rgb", tile=(16, 16), compression="zlib")
        else:
            np.save(target.with_suffix(".npy"), twelve)
    return shallow, deep


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_twelve_bits_train_to_the_very_network_and_score_of_their_eight_bit_twin(tmp_path: Path, pipeline: str) -> None:
    changes = {"data": {"pipeline": pipeline}}
    runs = [run(tmp_path / root.name, root, changes) for root in twins(tmp_path)]
    first, second = (read_checkpoint(folder) for folder in runs)
    for name, value in first["student"].items():
        assert torch.equal(value, second["student"][name]), name
    scores = [json.loads((folder / "summary.json").read_text())["results"] for folder in runs]
    assert scores[0] == scores[1]
    assert (first["input"]["window"], second["input"]["window"]) == (None, [[0.0, 4095.0]])
    assert json.loads((runs[1] / "input.json").read_text()) == second["input"]


def test_what_a_training_has_found_is_used_afterwards_unless_another_window_is_given(tmp_path: Path) -> None:
    _, deep = twins(tmp_path)
    folder = run(tmp_path, deep)
    np.save(tmp_path / "dark.npy", np.full((40, 36, 3), 100, np.uint16))
    assert open_trained(folder).network.reading.pixels(tmp_path / "dark.npy").max() == 100 >> 4
    export(["--checkpoint", str(folder), "--output", str(tmp_path / "exported")])
    assert load_network(tmp_path / "exported").reading.window == ((0, 4095),)
    for number, source in enumerate((folder, tmp_path / "exported")):
        given = evaluation(source, tmp_path / f"scores_{number}", deep)
        assert given == json.loads((folder / "summary.json").read_text())["results"]["seg"]["mean_iou"]
    assert evaluation(folder, tmp_path / "other", deep, "--data.window", "4000", "4095") != given


def evaluation(checkpoint: Path, output: Path, root: Path, *more: str) -> float:
    """Evaluate and return the mean IoU of the segmentation."""
    recipe = helpers.write_config(output.with_suffix(".yaml"), helpers.values(root=root))
    evaluate(["--checkpoint", str(checkpoint), "--config", str(recipe), "--output", str(output), *more])
    return json.loads((output / "metrics.json").read_text())["results"]["seg"]["mean_iou"]


def test_a_run_goes_on_with_the_window_that_it_began_with(tmp_path: Path) -> None:
    _, deep = twins(tmp_path)
    short = {"optim": {"iterations": 4}, "run": {"checkpoint_every": 2, "keep_checkpoints": 5}}
    folder = run(tmp_path, deep, short)
    list_checkpoints(folder)[-1].unlink()
    for path in (deep / "JPEGImages").iterdir():  # another range, were it measured anew
        values = np.load(path) if path.suffix == ".npy" else tifffile.imread(path)
        path.unlink()
        np.save(path.with_suffix(".npy"), values // 2)
    run(tmp_path, deep, short, {"data": {"fingerprint": "off"}})
    assert read_checkpoint(folder)["input"]["window"] == [[0.0, 4095.0]]


def five_channels(root: Path) -> Path:
    """Write pictures whose classes only show in the last three channels."""
    helpers.write_dataset(root, train=12, val=4)
    draws = np.random.default_rng(0)
    for number, path in enumerate(sorted((root / "JPEGImages").glob("*.jpg"), key=lambda path: int(path.stem[8:]))):
        path.unlink()
        mask = np.asarray(Image.open(root / "SegmentationClass" / f"{path.stem}.png"))
        pixels = draws.normal(0, 1, (*mask.shape, CHANNELS)).astype(np.float32)
        for colour in range(3):
            pixels[..., 2 + colour] += 20 * (mask == colour + 1)
        if number % 2:
            np.save(path.with_suffix(".npy"), pixels)
        else:
            tifffile.imwrite(path.with_suffix(".tif"), pixels.transpose(2, 0, 1), photometric="minisblack")
    return root


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of five channels, and a run on it."""
    folder = tmp_path_factory.mktemp("five")
    root = five_channels(folder / "set")
    longer = {"optim": {"iterations": 60}, "model": {"in_chans": CHANNELS}, "run": {"picture_every": 30}}
    return root, run(folder, root, longer, {"data": {"preview_channels": [5, 4, 3]}})


def test_five_channels_are_learned_and_scored(five: tuple[Path, Path]) -> None:
    root, folder = five
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["results"]["pseudo"]["mean_iou"] > 40  # of noise: about 20
    found = read_checkpoint(folder)["input"]
    assert len(found["window"]) == len(found["mean"]) == len(found["std"]) == CHANNELS
    assert read_checkpoint(folder)["student"]["encoder.patch_embed.proj.weight"].shape[1] == CHANNELS
    assert evaluation(folder, folder / "again", root) == summary["results"]["seg"]["mean_iou"]
    assert (folder / "pictures").is_dir()


def test_five_channels_become_pseudo_labels_and_exports(five: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = five
    label(["--checkpoint", str(folder), "--output", str(tmp_path / "labels"), "--kind", "seg+crf", "--limit", "2"])
    assert len(list((tmp_path / "labels/labels").glob("*.png"))) == 2
    program: Any = export_program(load_network(folder)).module()
    assert program(torch.rand(1, CHANNELS, 40, 36))[0].shape == (1, 4, 40, 36)
    assert describe(load_network(folder))["input"] == "channels in 0…1, (B, 5, H, W)"
    export(["--checkpoint", str(folder), "--output", str(tmp_path / "network")])
    again, network = load_network(tmp_path / "network"), load_network(folder)
    assert (again.mean, again.std) == (network.mean, network.std)
    assert again.reading.window == network.reading.window
    with pytest.raises(UserError, match="an official checkpoint is for three colours; this network takes 5 channels"):
        export(["--checkpoint", str(folder), "--to", "official", "--output", str(tmp_path / "student.pth")])


def test_colour_pictures_do_not_fit_a_network_of_five_channels(five: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = five
    root = helpers.write_dataset(tmp_path / "colours")
    with pytest.raises(UserError, match=r"3 channels, but the network takes 5 \(model\.in_chans\)"):
        evaluation(folder, tmp_path / "scores", root)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pretrained_colours_are_spread_over_the_channels_as_timm_does(tmp_path: Path, channels: int) -> None:
    options = helpers.values()["model"]["backbone_options"]
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    model = {"in_chans": channels, "pretrained": str(tmp_path / "weights.safetensors")}
    network = build_network(helpers.config({"model": model}).model, helpers.CLASSES, 32)
    expected = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        in_chans=channels,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
        **options,
    )
    weight = network.encoder.patch_embed["proj"].weight
    torch.testing.assert_close(weight, expected.patch_embed.proj.weight)


@pytest.mark.parametrize(
    "entry",
    [
        {"window": "0 1", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"window": [[1, 0]], "mean": [0.5] * 3, "std": [0.5] * 3},
        {"window": None, "mean": [0.5], "std": [0.5] * 3},
        {"window": None, "mean": [0.5] * 3, "std": [0.0] * 3},
        ["window"],
    ],
)
def test_a_damaged_entry_of_a_checkpoint_is_named(entry: Any) -> None:
    with pytest.raises(UserError, match=r"^run: its entry input is damaged .*; give another checkpoint"):
        read_measured(entry, 3, "run")


# --- use


def geotiff(path: Path, pixels: np.ndarray) -> tuple[Any, Any]:
    """Write a GeoTIFF of channels (H, W, C) as others do; return its reference system and its transformation."""
    rasterio = pytest.importorskip("rasterio")
    crs, transform = rasterio.CRS.from_epsg(32632), rasterio.transform.from_origin(500_000, 5_400_000, 10, 10)
    height, width, channels = pixels.shape
    profile = {"height": height, "width": width, "count": channels, "dtype": pixels.dtype, "crs": crs}
    with rasterio.open(path, "w", driver="GTiff", transform=transform, **profile) as file:
        file.write(pixels.transpose(2, 0, 1))
    return crs, transform


def read_geotiff(path: Path) -> tuple[tuple[Any, Any], np.ndarray, dict[int, tuple[int, ...]]]:
    """Read reference system and transformation, labels, and colours as another program does."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as file:
        return (file.crs, file.transform), file.read(1), file.colormap(1)


def test_the_mask_of_a_geotiff_lies_where_the_picture_lies(five: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = five
    pixels = np.load(next((root / "JPEGImages").glob("*.npy")))
    place = geotiff(tmp_path / "field.tif", pixels)
    np.save(tmp_path / "plain.npy", pixels)
    pictures = [str(tmp_path / "field.tif"), str(tmp_path / "plain.npy")]
    predict(["--checkpoint", str(folder), *pictures, "--output", str(tmp_path / "out")])
    masks = tmp_path / "out/masks"
    assert sorted(path.name for path in masks.iterdir()) == ["field.png", "field.tif", "plain.png"]
    found, values, colours = read_geotiff(masks / "field.tif")
    assert found == place
    assert colours[1][:3] == (128, 0, 0)
    for name in ("field.png", "plain.png"):
        np.testing.assert_array_equal(values, np.asarray(Image.open(masks / name)))


def test_five_channels_pass_in_tiles_too(five: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = five
    place = geotiff(tmp_path / "field.tif", np.load(next((root / "JPEGImages").glob("*.npy"))))
    output = tmp_path / "out"
    options = ["--checkpoint", str(folder), "--output", str(output), "--tile", "32", "--crf"]
    predict([*options, str(tmp_path / "field.tif")])
    found, values, _ = read_geotiff(output / "masks/field.tif")
    assert found == place
    np.testing.assert_array_equal(values, np.asarray(Image.open(output / "masks/field.png")))
    assert (output / "overlays/field.png").is_file()


def test_people_see_the_channels_of_the_preview(five: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = five
    path = next((root / "JPEGImages").glob("*.npy"))
    pixels = load_network(folder).reading.pixels(path)
    command = ["--checkpoint", str(folder), str(path), "--output", str(tmp_path), "--opacity", "0"]
    for option, channels in (([], [4, 3, 2]), (["--data.preview_channels", "1"], [0, 0, 0])):
        predict([*command, *option])
        shown = np.asarray(Image.open(tmp_path / "overlays" / f"{path.stem}.png"))
        np.testing.assert_array_equal(shown, pixels[..., channels])


def test_files_and_arrays_are_segmented_alike(five: tuple[Path, Path]) -> None:
    root, folder = five
    path, network = next((root / "JPEGImages").glob("*.tif")), load_network(folder)
    from_file, from_array = (segment(network, one).mask for one in (path, network.reading.pixels(path)))
    np.testing.assert_array_equal(from_file, from_array)
    with pytest.raises(UserError, match=r"expected \(H, W, 5\)"):
        segment(network, np.zeros((40, 36, 3), np.uint8))


def test_the_page_takes_deep_pictures_too(five: tuple[Path, Path]) -> None:
    root, folder = five
    trained = open_trained(folder)
    with DemoServer(("127.0.0.1", 0), trained.network, largest=2**24, side=64, config=trained.config) as server:
        for path in sorted((root / "JPEGImages").iterdir())[:2]:
            assert server.answer(path.read_bytes())["scores"]


@pytest.mark.parametrize("verb", ["predict", "serve", "pseudo-labels", "evaluate"])
def test_the_limit_of_pixels_is_an_option_of_every_verb_and_its_message_names_it(
    five: tuple[Path, Path], tmp_path: Path, verb: str
) -> None:
    root, folder = five
    picture = next((root / "JPEGImages").glob("*.npy"))
    common = ["--checkpoint", str(folder), "--output", str(tmp_path / "out")]

    def use(limit: int) -> None:
        option = ["--data.max_pixels", str(limit)]
        if verb == "predict":
            predict([*common, *option, str(picture)])
        elif verb == "serve":
            options = given(parsers.serve().parse_args(["--checkpoint", str(folder), *option]))
            trained = open_trained(folder, options)
            with DemoServer(("127.0.0.1", 0), trained.network, largest=2**24, side=64, config=trained.config) as server:
                server.answer(picture.read_bytes())
        elif verb == "evaluate":
            evaluate([*common, *option])
        else:
            label([*common, *option])

    with pytest.raises(UserError, match=r"more than 1,439 pixels.* raise --data\.max_pixels"):
        use(36 * 40 - 1)
    use(36 * 40)
