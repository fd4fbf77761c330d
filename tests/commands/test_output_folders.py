"""Results never destroy what another command, network or person has put there, and end whole or not at all."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fsr_fast.commands import predict
from fsr_fast.commands.compare import main as compare
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.pseudo_labels import main as label
from fsr_fast.commands.report import main as report
from fsr_fast.config import build_config
from fsr_fast.errors import UserError
from fsr_fast.evaluation import evaluator
from fsr_fast.runtime import locks
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.locks import locked
from fsr_fast.runtime.run_folder import locked_run_folder, open_run_folder
from tests import helpers


def trained(folder: Path, root: Path, seed: int = 0) -> Path:
    config = build_config(helpers.values(root=root, output=folder), "the test")
    open_run_folder(config)
    state = {
        "iteration": 1,
        "config": config.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": helpers.network(config, seed).state_dict(),
    }
    write_checkpoint(folder, state)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, the runs of two networks on it, and an evaluation."""
    place = tmp_path_factory.mktemp("outputs")
    root = helpers.write_dataset(place / "data", train=2, val=2)
    trained(place / "run", root)
    trained(place / "other", root, seed=1)
    evaluate(["--checkpoint", str(place / "run"), "--output", str(place / "scores")])
    shutil.copytree(place / "scores", place / "again")
    return place


def commands(place: Path, run: str = "run") -> dict[str, Callable[[Path], None]]:
    checkpoint = ["--checkpoint", str(place / run)]
    pictures = str(place / "data" / "JPEGImages")
    return {
        "predict": lambda output: predict.main([*checkpoint, pictures, "--output", str(output)]),
        "pseudo-labels": lambda output: label([*checkpoint, "--output", str(output)]),
        "evaluate": lambda output: evaluate([*checkpoint, "--output", str(output)]),
        "compare": lambda output: compare([str(place / "scores")] * 2 + ["--output", str(output)]),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("verb", ["predict", "pseudo-labels", "evaluate", "compare"])
def test_a_folder_that_the_same_verb_has_not_written_is_refused_and_stays_as_it_is(place, tmp_path, verb):
    mine = tmp_path / "mydata"
    shutil.copytree(place / "data", mine)
    (mine / "masks").mkdir()
    (mine / "masks" / "picture_0.png").write_bytes(b"true mask")
    (mine / "classes.txt").write_text("mine")
    before = contents(mine)
    with pytest.raises(UserError, match=f"holds something that `fsr-fast {verb}` has not written"):
        commands(place)[verb](mine)
    assert contents(mine) == before
    with pytest.raises(UserError, match="is a file; give a folder"):
        commands(place)[verb](mine / "classes.txt")


@pytest.mark.parametrize("verb", ["predict", "pseudo-labels", "evaluate"])
def test_results_of_one_network_are_written_again_by_it_and_by_no_other(place, tmp_path, verb):
    commands(place)[verb](tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="holds the results of another run or network"):
        commands(place, "other")[verb](tmp_path / "out")
    assert contents(tmp_path / "out") == before
    commands(place)[verb](tmp_path / "out")
    again = contents(tmp_path / "out")
    assert again.keys() == before.keys()
    assert all(again[name] == before[name] for name in before if name.endswith(".png"))


def test_a_comparison_takes_the_place_of_none_but_itself(place, tmp_path):
    commands(place)["compare"](tmp_path / "out")
    commands(place)["compare"](tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="holds the results of another run"):
        compare([str(place / "scores"), str(place / "again"), "--output", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == before


def test_pictures_in_the_folder_of_the_results_are_no_input(place, tmp_path):
    pictures = tmp_path / "trip"
    shutil.copytree(place / "data" / "JPEGImages", pictures)
    for _ in range(2):
        predict.main(["--checkpoint", str(place / "run"), f"{pictures}/**/*", "--output", str(pictures / "out")])
        assert len(list((pictures / "out" / "masks").iterdir())) == 4


@pytest.mark.parametrize("output", ["trip", "trip/pictures"])
def test_a_folder_of_results_that_holds_the_pictures_is_refused(place, tmp_path, output):
    pictures = tmp_path / "trip" / "pictures"
    shutil.copytree(place / "data" / "JPEGImages", pictures)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"--output: .*pictures lies in .*, where results go"):
        predict.main(["--checkpoint", str(place / "run"), str(pictures), "--output", str(tmp_path / output)])
    assert contents(tmp_path) == before


def test_an_interrupted_prediction_leaves_whole_files_and_nothing_that_looks_finished(place, tmp_path, monkeypatch):
    commands(place)["predict"](tmp_path / "out")
    write, written = predict.write_views, []

    def stop(folder, name, *rest, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write(folder, name, *rest, **options)

    monkeypatch.setattr(predict, "write_views", stop)
    with pytest.raises(KeyboardInterrupt):
        commands(place)["predict"](tmp_path / "out")
    assert not (tmp_path / "out" / "scores.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_picture_that_is_damaged_keeps_no_other_from_its_mask(place, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(place / "data" / "JPEGImages", pictures)
    (pictures / "picture_1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 4 pictures have no mask; the first: .*picture_1\.jpg"):
        predict.main(["--checkpoint", str(place / "run"), str(pictures), "--output", str(tmp_path / "out")])
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())) == 3


def test_a_page_is_written_over_by_that_of_the_same_runs_alone(place, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("my notes")
    for run in ("run", "other"):
        if run == "other":
            page.unlink()
            report([str(place / "run"), "--output", str(page)])
            report([str(place / "run"), "--output", str(page)])
        before = page.read_bytes()
        with pytest.raises(UserError, match="exists and is not a report of these runs"):
            report([str(place / run), "--output", str(page)])
        assert page.read_bytes() == before


# --- locks


def test_a_second_evaluation_in_the_same_folder_is_refused_and_the_first_one_is_whole(place, tmp_path, monkeypatch):
    refusals = []
    count = evaluator._count

    def start_another(result, *arguments):
        if not refusals:
            with pytest.raises(UserError) as caught:
                commands(place)["evaluate"](tmp_path / "out")
            refusals.append(str(caught.value))
        return count(result, *arguments)

    monkeypatch.setattr(evaluator, "_count", start_another)
    commands(place)["evaluate"](tmp_path / "out")
    assert "another process writes to" in refusals[0]
    assert f'"process": {os.getpid()}' in refusals[0]
    assert len((tmp_path / "out" / "images.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_nothing_is_written_through_it(tmp_path, kind):
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    (tmp_path / "precious").write_text("precious")
    {
        "link": lambda: lock.symlink_to(tmp_path / "precious"),
        "dangling link": lambda: lock.symlink_to(tmp_path / "new"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    with pytest.raises(UserError, match="in place of a lock; delete it"), locked_run_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reason", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, caplog, reason):
    def fail(*arguments: object) -> None:
        number = getattr(locks.errno, reason)
        raise OSError(number, os.strerror(number))

    locks._note_unlocked.cache_clear()
    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass
    assert [message for message in caplog.messages if "has no locks" in message] == caplog.messages[:1]


def test_a_folder_that_was_made_for_results_that_never_came_is_gone(place, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "whole.png")
    with pytest.raises(UserError, match="cannot be decoded"):
        predict.main(["--checkpoint", str(place / "run"), str(tmp_path / "notes.png"), "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()
