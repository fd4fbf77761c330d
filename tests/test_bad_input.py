"""Every user's mistake ends in one message that names place, value, expectation and remedy; nothing is written."""

import errno
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_fast import trainer
from fsr_fast.cli import run_command
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.predict import main as predict
from fsr_fast.config import build_config
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.run_folder import open_run_folder
from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests import helpers


@pytest.fixture
def root(tmp_path) -> Path:
    return helpers.write_dataset(tmp_path / "data")


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refusal(folder: Path, recipe: dict) -> str:
    """Train and return the message; check that nothing was written."""
    path = helpers.write_config(folder / "recipe.yaml", recipe)
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        train(["--config", str(path)])
    assert contents(folder) == before
    return str(caught.value)


def assert_names(message: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"


# --- configuration


def test_an_unknown_key(tmp_path, root):
    recipe = helpers.values({"optim": {"lerning_rate": 1}}, root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "recipe.yaml", "'optim.lerning_rate'", "did you mean 'learning_rate'?")


def test_a_value_out_of_range(tmp_path, root):
    recipe = helpers.values({"mask": {"ratio": 1.5}}, root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "recipe.yaml", "mask.ratio", "less than 1", "1.5")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"data": {"image_size": 36}}, ("data.image_size", 36, "multiple of the patch size 8")),
        ({"mask": {"block": 3}}, ("mask.block", 3, "4 by 4")),
        ({"model": {"backbone": "vit_huge"}}, ("model.backbone", "vit_huge", "vit_")),
        ({"model": {"pretrained": "lost.pth"}}, ("lost.pth", ".safetensors or .pth")),
    ],
)
def test_a_network_that_does_not_fit(tmp_path, root, change, parts):
    recipe = helpers.values(change, root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), *parts)


def test_a_key_that_stands_twice(tmp_path, root):
    recipe = helpers.write_config(tmp_path / "recipe.yaml", helpers.values(root=root, output=tmp_path / "run"))
    recipe.write_text(f"{recipe.read_text()}optim: {{iterations: 3}}\n")
    with pytest.raises(UserError) as caught:
        train(["--config", str(recipe)])
    assert_names(str(caught.value), recipe, "'optim' stands twice", "line ")


# --- data


def test_a_missing_root(tmp_path):
    recipe = helpers.values(root=tmp_path / "lost", output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "data.root", tmp_path / "lost", "--data.root")


def test_a_root_of_another_layout(tmp_path):
    (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages").mkdir(parents=True)
    recipe = helpers.values(root=tmp_path / "VOCdevkit", output=tmp_path / "run")
    hint = f"did you mean {tmp_path / 'VOCdevkit' / 'VOC2012'}?"
    assert_names(refusal(tmp_path, recipe), "data.root", tmp_path / "VOCdevkit", "JPEGImages", hint)


@pytest.mark.parametrize("key", ["train_list", "val_list"])
def test_a_missing_list(tmp_path, root, key):
    recipe = helpers.values({"data": {key: "trian"}}, root=root, output=tmp_path / "run")
    path = root / "ImageSets/Segmentation/trian.txt"
    assert_names(refusal(tmp_path, recipe), f"data.{key}", path, "did you mean 'train'?")


def test_an_empty_list(tmp_path, root):
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    recipe = helpers.values(root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "data.train_list", "train.txt", "empty", "one id per line")


@pytest.mark.parametrize("name", ["picture_2", "picture_9"])
def test_an_id_without_an_image(tmp_path, root, name):
    (root / "JPEGImages" / f"{name}.jpg").unlink()
    recipe = helpers.values(root=root, output=tmp_path / "run")
    message = refusal(tmp_path, recipe)
    assert_names(message, root / "JPEGImages", repr(name), ".jpg", "take the id off the list")


def test_an_image_of_the_validation_list_without_a_mask(tmp_path, root):
    (root / "SegmentationClass" / "picture_9.png").unlink()
    recipe = helpers.values(root=root, output=tmp_path / "run")
    message = refusal(tmp_path, recipe)
    assert_names(message, root, "'picture_9'", f"add {root / 'SegmentationClass' / 'picture_9.png'}")


def test_training_images_need_no_mask(tmp_path, root):
    for number in range(8):
        (root / "SegmentationClass" / f"picture_{number}.png").unlink()
    config = build_config(helpers.values(root=root, output=tmp_path / "run"), "the test")
    Trainer(config, Process(0, 1, torch.device("cpu")))


def test_an_image_without_a_label(tmp_path, root):
    lines = (root / "labels.csv").read_text().splitlines()
    lines[3] = "picture_2,"
    (root / "labels.csv").write_text("\n".join(lines))
    recipe = helpers.values({"data": {"labels": "csv"}}, root=root, output=tmp_path / "run")
    message = refusal(tmp_path, recipe)
    assert_names(message, root, "'picture_2'", "has no label", "train.txt", "--data.negatives true", "or false")


def test_an_image_without_a_row_of_labels(tmp_path, root):
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text("\n".join(lines[:3]))
    recipe = helpers.values(root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), root / "labels.csv", "'picture_2'", "add it")


def test_an_unknown_class_name_in_the_labels(tmp_path, root):
    lines = (root / "labels.csv").read_text().splitlines()
    lines[3] = "picture_2,gren"
    (root / "labels.csv").write_text("\n".join(lines))
    recipe = helpers.values(root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), root / "labels.csv", "line 4", "'gren'", "did you mean 'green'?")


def test_an_unknown_class_name_in_the_subset(tmp_path, root):
    recipe = helpers.values({"data": {"subset": ["red", "grene"]}}, root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "data.subset", "'grene'", "did you mean 'green'?")


def test_an_image_that_cannot_be_decoded_is_named_and_training_goes_on_once_it_is_replaced(tmp_path, root):
    path = root / "JPEGImages" / "picture_5.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    recipe = helpers.values({"data": {"max_bad_fraction": 0}}, root=root, output=tmp_path / "run")
    command = ["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))]
    with pytest.raises(UserError) as caught:
        train(command)
    assert_names(str(caught.value), path, "cannot be decoded", "replace the file")
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert not (tmp_path / "run" / "summary.json").exists()
    path.write_bytes(whole)
    train(command)
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_undecodable_image_in_a_worker_is_named_alike(tmp_path, root):
    path = root / "JPEGImages" / "picture_5.jpg"
    path.write_bytes(b"not a picture")
    recipe = helpers.values({"data": {"workers": 1, "max_bad_fraction": 0}}, root=root, output=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    assert_names(str(caught.value), path, "cannot be decoded", "replace the file")
    assert "Traceback" not in str(caught.value)


def test_a_mask_of_another_size_than_its_image(tmp_path, root):
    path = root / "SegmentationClass" / "picture_9.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    state = checkpoint_of(tmp_path, root)
    with pytest.raises(UserError) as caught:
        evaluate(["--checkpoint", str(state), "--output", str(tmp_path / "out")])
    assert_names(str(caught.value), path, "8 x 8", "36 x 40", "one size")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["images"] == 3  # the others are scored
    assert list(metrics["failed"]) == ["picture_9"]


# --- machine and processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(tmp_path, root):
    recipe = helpers.values({"run": {"device": "cuda"}}, root=root, output=tmp_path / "run")
    assert_names(refusal(tmp_path, recipe), "device", "'cuda'", "no CUDA GPU", "--run.device cpu")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_the_processes_cannot_share(tmp_path, root, batch):
    recipe = helpers.values({"optim": {"batch_size": batch}}, root=root, output=tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        Trainer(build_config(recipe, "the test"), Process(1, 2, torch.device("cpu")))
    assert_names(str(caught.value), "optim.batch_size", f"{batch} images", "2 processes", "a multiple of 2")
    assert contents(tmp_path) == before


# --- run folder


def test_a_folder_that_holds_another_run(tmp_path, root):
    recipe = helpers.values(root=root, output=tmp_path / "run")
    train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    other = helpers.values({"mask": {"ratio": 0.25}}, root=root, output=tmp_path / "run")
    message = refusal(tmp_path, other)
    assert_names(message, "run.output", tmp_path / "run", "mask.ratio (0.4 there, 0.25 now)", "--run.output")


def test_a_folder_that_holds_something_else(tmp_path, root):
    recipe = helpers.values(root=root, output=root)
    assert_names(refusal(tmp_path, recipe), "run.output", root, "not a run", "give another folder")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_checkpoint_of_the_run_folder_that_is_damaged_or_of_another_shape(tmp_path, root, damage):
    recipe = helpers.values(root=root, output=tmp_path / "run")
    config = build_config(recipe, "the test")
    state = Trainer(config, Process(0, 1, torch.device("cpu")))._state()
    if damage == "other":
        state["student"]["top_classifier.weight"] = torch.zeros(5, helpers.WIDTH, 1, 1)
    open_run_folder(config)
    path = write_checkpoint(tmp_path / "run", state)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    expected = ("not a readable checkpoint",) if damage == "cut" else ("top_classifier", "does not fit this run")
    assert_names(refusal(tmp_path, recipe), path, *expected)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, root):
    change = {"optim": {"learning_rate": 1e20, "iterations": 8}}
    recipe = helpers.values(change, root=root, output=tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    assert_names(
        str(caught.value),
        "the loss or its gradient is not finite",
        "iteration",
        "optim.learning_rate",
        "optim.clip_norm",
    )
    assert not (tmp_path / "run" / "summary.json").exists()


def test_masks_that_say_nothing_give_no_score(tmp_path, root):
    for path in (root / "SegmentationClass").iterdir():
        Image.new("L", (36, 40), 255).save(path)
    recipe = helpers.values({"run": {"evaluate_every": 2}}, root=root, output=tmp_path / "run")
    train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seg_miou"] is None
    assert (tmp_path / "run" / "checkpoints" / "best.pt").is_file()


def test_a_run_ends_well_where_no_picture_of_the_validation_can_be_shown(tmp_path, root, monkeypatch):
    monkeypatch.setattr(trainer, "PICTURES", 1)
    (root / "SegmentationClass" / "picture_8.png").write_bytes(b"no mask")
    recipe = helpers.values(root=root, output=tmp_path / "run")
    train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seg_miou"] > 0
    assert "picture" not in summary


# --- checkpoints


def checkpoint_of(folder: Path, root: Path, **changes) -> Path:
    recipe = helpers.values(root=root, output=folder / "run")
    config = build_config(recipe, "the test")
    state = {
        "iteration": 1,
        "config": config.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": helpers.network(config).state_dict(),
        **changes,
    }
    return write_checkpoint(folder / "trained", state)


COMMANDS = {
    "evaluate": lambda checkpoint, root, output: evaluate(["--checkpoint", str(checkpoint), "--output", str(output)]),
    "predict": lambda checkpoint, root, output: predict(
        ["--checkpoint", str(checkpoint), str(root / "JPEGImages"), "--output", str(output)]
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "empty folder", "text", "dictionary", "another shape"])
def test_a_checkpoint_that_is_none_or_of_another_shape(tmp_path, root, command, kind):
    path = tmp_path / "file.pt"
    expected = {
        "missing": "no such checkpoint",
        "empty folder": "no checkpoint in this folder",
        "text": "not a readable checkpoint",
        "dictionary": "not a checkpoint of a run",
        "another shape": "do not fit the network",
    }[kind]
    if kind == "empty folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "dictionary":
        torch.save({"epoch": 3}, path)
    elif kind == "another shape":
        wide = helpers.network(helpers.config({"model": {"decoder_width": 16}})).state_dict()
        path = checkpoint_of(tmp_path, root, student=wide)
    with pytest.raises(UserError) as caught:
        COMMANDS[command](path, root, tmp_path / "out")
    assert_names(str(caught.value), path, expected)
    assert not (tmp_path / "out").exists()


def test_data_of_other_classes_than_the_checkpoint_s(tmp_path, root):
    path = checkpoint_of(tmp_path, root, classes=["red", "green", "violet"])
    with pytest.raises(UserError) as caught:
        evaluate(["--checkpoint", str(path), "--output", str(tmp_path / "out")])
    assert_names(str(caught.value), "classes", "violet", "blue")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [evaluate, predict])
def test_cuda_for_a_checkpoint_where_there_is_none(tmp_path, root, command):
    arguments = [
        "--checkpoint",
        str(checkpoint_of(tmp_path, root)),
        "--device",
        "cuda",
        "--output",
        str(tmp_path / "o"),
    ]
    with pytest.raises(UserError) as caught:
        command([*arguments, *([str(root / "JPEGImages")] if command is predict else [])])
    assert_names(str(caught.value), "'cuda'", "no CUDA GPU", "--run.device cpu")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [("--threshold", "2", "--threshold"), ("--scales", "9", "--scales"), ("--limit", "0", "--limit")],
)
def test_an_option_of_the_evaluation_out_of_range(tmp_path, root, option, value, key):
    with pytest.raises(UserError) as caught:
        evaluate(["--checkpoint", str(checkpoint_of(tmp_path, root)), option, value, "--output", str(tmp_path / "o")])
    assert_names(str(caught.value), key, value)
    assert not (tmp_path / "o").exists()


# --- the command line


def command_that(error: BaseException):
    def command(arguments):
        raise error

    return command


def test_a_mistake_is_one_paragraph_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(command_that(UserError("data.root: nothing there; give a folder")))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: data.root: nothing there; give a folder\n")


def test_a_path_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()

    def command(arguments):
        (tmp_path / "file" / "run").mkdir()

    with pytest.raises(SystemExit) as caught:
        run_command(command)
    assert caught.value.code == 2
    assert_names(capsys.readouterr().err, f"error: {tmp_path / 'file' / 'run'}: Not a directory")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("of a library")])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(command_that(error))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; check path, permissions"),
        (OSError(errno.EMFILE, "Too many open files"), "`ulimit -n 4096`, or lower data.workers"),
        (MemoryError("x"), "error: out of memory (x); reduce the sizes"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"), "error: out of memory"),
    ],
)
def test_a_machine_that_is_too_small_is_one_paragraph(monkeypatch, capsys, error, expected):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end
    with pytest.raises(SystemExit) as caught:
        run_command(command_that(error))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_a_loader_that_is_half_made_where_files_are_short_adds_no_traceback(monkeypatch, capsys):
    class Half:
        def __del__(self):
            raise AttributeError("_workers_status")

    def command(arguments):
        half = Half()
        raise OSError(errno.EMFILE, f"Too many open files for {half}")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with pytest.raises(SystemExit):
        run_command(command)
    gc.collect()
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interruption_is_silent(capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(command_that(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err == ""
