import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast.commands.predict import main, map_name
from fsr_fast.config import dump_config
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.dataloading.pictures import find_pictures
from fsr_fast.errors import UserError
from fsr_fast.evaluation.crf import dense_crf
from fsr_fast.evaluation.inference import Prediction, read_picture, segment, segment_batch
from fsr_fast.models import load_network
from fsr_fast.runtime.checkpoint import write_checkpoint
from tests import helpers

RECIPE = helpers.config()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    state = {
        "iteration": 1,
        "config": RECIPE.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": helpers.network(RECIPE).state_dict(),
    }
    write_checkpoint(folder, state)
    return folder


def save_pictures(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for name in names:
        Image.fromarray(draws.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(folder / name)
    return [folder / name for name in names]


def expected_of(run: Path, path: Path) -> Prediction:
    """Segment as the run evaluates: at scale 1.0 alone."""
    return segment_batch(load_network(run), [read_picture(path)], RECIPE)[0]


def test_files_and_folders_are_found_by_name_in_order(tmp_path):
    save_pictures(tmp_path / "folder", "b.png", "a.JPG", "c.webp")
    (tmp_path / "folder" / "notes.txt").touch()
    single = save_pictures(tmp_path, "z.bmp")
    assert list(find_pictures([*single, tmp_path / "folder"])) == ["z", "a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "part"), [(["lost.png"], "no such file or folder"), (["empty"], "no picture in this folder")]
)
def test_a_path_without_pictures_is_named(tmp_path, names, part):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=part) as caught:
        find_pictures([tmp_path / name for name in names])
    assert str(tmp_path / names[0]) in str(caught.value)


def test_folders_in_folders_are_looked_through_and_results_lie_likewise(run, tmp_path):
    paths = save_pictures(tmp_path / "in" / "deep" / "er", "a.png") + save_pictures(tmp_path / "in", "b.png")
    output = tmp_path / "in" / "results"
    for _ in range(2):  # the second time, the results lie there already
        main(["--checkpoint", str(run), str(tmp_path / "in"), "--output", str(output)])
        assert sorted(json.loads((output / "scores.json").read_text())) == sorted(map(str, paths))
    assert {file.relative_to(output / "masks").as_posix() for file in (output / "masks").rglob("*.png")} == {
        "b.png",
        "deep/er/a.png",
    }


def test_results_of_pictures_of_one_name_are_set_apart(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    save_pictures(one / "in", "a.png", "a.jpg", "b.png")
    save_pictures(two / "in", "b.png", "c.png")
    assert sorted(find_pictures([one])) == ["in/a.jpg", "in/a.png", "in/b"]
    assert sorted(find_pictures([one, two])) == ["in/a.jpg", "in/a.png", "in/c", "one/in/b", "two/in/b"]
    assert list(find_pictures([one / "in/b.png", one / "in/b.png"])) == ["b"]


def test_pictures_whose_results_would_overwrite_each_other_are_refused(tmp_path):
    paths = save_pictures(tmp_path / "one" / "in", "a.png") + save_pictures(tmp_path / "two" / "in", "a.png")
    with pytest.raises(UserError, match="rename one") as caught:
        find_pictures(paths)
    assert all(str(path) in str(caught.value) for path in paths)


def test_mask_overlay_cams_and_scores_are_those_of_the_network(run, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    main(["--checkpoint", str(run), str(path), "--output", str(tmp_path / "out")])
    prediction = expected_of(run, path)
    with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask), prediction.mask)
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (26, 20))
        assert not np.array_equal(np.asarray(overlay), np.asarray(read_picture(path)))
    assert {file.name for file in (tmp_path / "out" / "cams").iterdir()} == {
        f"a_{name}.png" for name in prediction.cams
    }
    (found,) = json.loads((tmp_path / "out" / "scores.json").read_text()).items()
    assert found[0] == str(path)
    assert found[1]["scores"] == pytest.approx(prediction.scores, rel=1e-5)


def test_a_class_name_is_no_path(tmp_path):
    names = ("fruit/apple", "fruit/pear", "fruit/plum")
    state = {"iteration": 1, "config": RECIPE.model_dump(mode="json"), "classes": list(names)}
    write_checkpoint(tmp_path / "run", {**state, "student": helpers.network(RECIPE).state_dict()})
    (path,) = save_pictures(tmp_path, "a.png")
    main(["--checkpoint", str(tmp_path / "run"), str(path), "--output", str(tmp_path / "out")])
    found = {file.name for file in (tmp_path / "out" / "cams").iterdir()}
    assert found
    assert found <= {"a_fruit_apple.png", "a_fruit_pear.png", "a_fruit_plum.png"}


@pytest.mark.parametrize(
    ("pictures", "classes"),
    [
        (["cat"], ["a/b", "a_b"]),
        (["cat", "cat_black"], ["black_dog", "dog"]),
        (["cat", "cat_a/b"], ["a/b_x", "x", "b_x"]),
        (["x" * 250, f"{'x' * 249}y"], ["y" * 100, "é" * 50]),
        (["deep/" + "é" * 125], ["y" * 99, "y" * 98 + "z"]),
    ],
)
def test_every_heat_map_has_a_file_of_its_own(pictures, classes):
    names = [map_name(picture, one, pictures, classes) for picture in pictures for one in classes]
    assert len(set(names)) == len(names)
    assert all(len(part.encode()) <= 250 for name in names for part in name.split("/"))
    assert [name.rpartition("/")[0] for name in names] == [
        picture.rpartition("/")[0] for picture in pictures for _ in classes
    ]


def test_a_heat_map_is_named_by_picture_and_class_where_that_is_clear():
    assert map_name("deep/cat", "a/b", ["deep/cat", "cat"], ["a/b", "b"]) == "deep/cat_a_b"


def test_a_picture_whose_results_could_not_bear_its_name_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "in").mkdir()
    try:
        save_pictures(tmp_path / "in", "\x1b[31m.png")
    except OSError:
        pytest.skip("a file system without such names")
    with pytest.raises(UserError, match="control characters"):
        main(["--checkpoint", str(run), str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_longest_name_that_is_allowed_gets_all_results(run, tmp_path):
    name = "x" * 246
    (path,) = save_pictures(tmp_path, f"{name}.png")
    main(["--checkpoint", str(run), str(path), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "masks" / f"{name}.png").is_file()
    assert list((tmp_path / "out" / "cams").iterdir())


def test_the_crf_refines_the_mask(run, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    main(["--checkpoint", str(run), str(path), "--output", str(tmp_path / "out"), "--crf"])
    prediction = expected_of(run, path)
    expected = dense_crf(np.asarray(read_picture(path)), prediction.probabilities).argmax(0)
    with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
        assert np.array_equal(np.asarray(mask), expected)
    assert not np.array_equal(expected, prediction.mask)


def test_patterns_find_pictures_and_a_file_of_that_name_goes_first(tmp_path):
    save_pictures(tmp_path / "trip" / "day", "b.png", "a[1].png")
    (tmp_path / "trip" / "day" / "c.txt").touch()
    assert list(find_pictures([f"{tmp_path}/trip/**/*"])) == ["a[1]", "b"]
    assert list(find_pictures([f"{tmp_path}/trip/day/a[1].png"])) == ["a[1]"]
    with pytest.raises(UserError, match=r"no picture matches this pattern"):
        find_pictures([f"{tmp_path}/trip/*.png"])


@pytest.mark.parametrize("address", ["http://example.org/a.jpg", "HTTPS://example.org/a.jpg", "s3://bucket/a.jpg"])
def test_addresses_of_the_web_are_refused(address):
    with pytest.raises(UserError, match="a URL, which is not fetched"):
        find_pictures([address])


def test_a_batch_gives_what_single_pictures_give(run, tmp_path):
    paths = save_pictures(tmp_path / "in", "a.png", "b.png", "c.png")
    Image.new("RGB", (30, 18), "red").save(tmp_path / "in" / "bb.png")
    for size in ("1", "8"):
        arguments = ["--checkpoint", str(run), str(tmp_path / "in"), "--output", str(tmp_path / size), "--batch", size]
        main(arguments)
    one, eight = (json.loads((tmp_path / size / "scores.json").read_text()) for size in ("1", "8"))
    assert list(one) == list(eight) == sorted(map(str, [*paths, tmp_path / "in" / "bb.png"]))
    for name, found in one.items():
        assert eight[name]["scores"] == pytest.approx(found["scores"], rel=1e-4)
        masks = [np.asarray(Image.open(tmp_path / size / "masks" / f"{Path(name).stem}.png")) for size in ("1", "8")]
        assert (masks[0] == masks[1]).mean() > 0.99


def test_opacity_and_legend_change_the_overlay(run, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    common = ["--checkpoint", str(run), str(path), "--output"]
    main([*common, str(tmp_path / "clear"), "--opacity", "0"])
    with Image.open(tmp_path / "clear/overlays/a.png") as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(read_picture(path)))
    main([*common, str(tmp_path / "named"), "--legend"])
    main([*common, str(tmp_path / "plain")])
    with Image.open(tmp_path / "named/overlays/a.png") as named, Image.open(tmp_path / "plain/overlays/a.png") as plain:
        assert named.height > plain.height
        left = (named.width - plain.width) // 2
        np.testing.assert_array_equal(np.asarray(named)[-plain.height :, left : left + plain.width], np.asarray(plain))
        prediction = expected_of(run, path)
        for label in set(np.unique(prediction.mask)) - {0}:
            legend = np.asarray(named)[: -plain.height]
            assert (legend == voc_palette()[label]).all(-1).any()


@pytest.mark.parametrize(("option", "value"), [("--opacity", "1.5"), ("--batch", "0")])
def test_numbers_out_of_range_are_refused(run, tmp_path, option, value):
    (path,) = save_pictures(tmp_path, "a.png")
    with pytest.raises(UserError, match=f"{option}: {value}; expected"):
        main(["--checkpoint", str(run), str(path), "--output", str(tmp_path / "out"), option, value])
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_decoded_is_named(run, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be decoded") as caught:
        main(["--checkpoint", str(run), str(tmp_path / "notes.png"), "--output", str(tmp_path / "out")])
    assert str(tmp_path / "notes.png") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_that_are_missing_or_unknown_are_named(run):
    with pytest.raises(UserError, match=r"required: --checkpoint; `fsr-fast predict --help`"):
        main(["picture.png"])
    with pytest.raises(UserError, match="unknown option '--crff'; did you mean '--crf'"):
        main(["--checkpoint", str(run), "p.png", "--output", "o", "--crff"])


def test_the_scales_are_those_of_the_run_unless_others_are_given(run, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    found = {}
    for name, options in (("run", []), ("paper", ["--scales", "1,1.25,1.5"]), ("side", ["--side", "16"])):
        main(["--checkpoint", str(run), str(path), "--output", str(tmp_path / name), *options])
        found[name] = json.loads((tmp_path / name / "scores.json").read_text())[str(path)]["scores"]
        with Image.open(tmp_path / name / "masks/a.png") as mask:
            assert mask.size == (26, 20)
    network = load_network(run)
    paper = segment(network, path).mask
    with Image.open(tmp_path / "paper/masks/a.png") as mask:
        assert np.array_equal(np.asarray(mask), paper)
    picture = Image.fromarray(read_picture(path)).resize((16, 12), Image.Resampling.LANCZOS)
    small = segment_batch(network, [picture], RECIPE)[0]
    assert found["side"] == pytest.approx(small.scores, rel=1e-4)
    assert found["run"] != pytest.approx(found["side"], rel=1e-4)


def test_results_go_to_the_run_by_default_with_a_table_of_areas(tmp_path, capsys):
    folder = tmp_path / "run"
    state = {"iteration": 1, "config": RECIPE.model_dump(mode="json"), "classes": list(helpers.CLASSES)}
    write_checkpoint(folder, {**state, "student": helpers.network(RECIPE).state_dict()})
    (folder / "config.yaml").write_text(dump_config(RECIPE))
    (path,) = save_pictures(tmp_path, "a.png")
    main(["--checkpoint", str(folder / "checkpoints/0000001.pt"), str(path)])
    with (folder / "predictions/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["background", *helpers.CLASSES]
    assert sum(int(row["pixels"]) for row in rows) == 26 * 20
    with Image.open(folder / "predictions/masks/a.png") as mask:
        areas = np.bincount(np.asarray(mask).ravel(), minlength=4).tolist()
    assert [int(row["pixels"]) for row in rows] == areas
    (found,) = json.loads((folder / "predictions/scores.json").read_text()).values()
    assert found["pixels"] == dict(zip(["background", *helpers.CLASSES], areas, strict=True))
    assert f"next: look at {folder / 'predictions/overlays'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (0, None),
        (50, "the decoder learns nothing and its masks are noise.*To train it: --loss.segmentation_start 3"),
        (8, "the decoder has learned nothing yet and its masks are noise.*To train it: let the training go on"),
    ],
)
def test_a_decoder_that_was_never_trained_is_named(tmp_path, caplog, start, said):
    recipe = helpers.config({"loss": {"segmentation_start": start}, "optim": {"iterations": 10}})
    state = {"iteration": 4, "config": recipe.model_dump(mode="json"), "classes": list(helpers.CLASSES)}
    write_checkpoint(tmp_path, {**state, "student": helpers.network(recipe).state_dict()})
    load_network(tmp_path)
    assert re.search(said, caplog.text) if said else "decoder" not in caplog.text
