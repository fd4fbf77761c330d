"""Interrupted trainings end as if they had not been; the same seed gives the same run."""

import shutil

import pytest
import torch

from fsr_fast import trainer as trainer_module
from fsr_fast.config import load_config
from fsr_fast.errors import UserError
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.seeding import stream
from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests import helpers

ALONE = Process(0, 1, torch.device("cpu"))
PRESETS = {"paper": {}, "official": helpers.OFFICIAL}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return helpers.write_dataset(tmp_path_factory.mktemp("resume") / "data", train=7)  # epochs end within batches


@pytest.fixture(scope="module", params=PRESETS)
def whole(request, root, tmp_path_factory):
    """A run that nothing interrupted, and its preset."""
    run = tmp_path_factory.mktemp(request.param) / "whole"
    start(root, run, request.param)
    return run, request.param


def recipe(root, run, preset, *changes):
    settings = {
        "optim": {"iterations": 8, "warmup": 2},
        "run": {"checkpoint_every": 4, "log_every": 1},
        "loss": {"segmentation_start": 3},
    }
    return helpers.values(PRESETS[preset], settings, *changes, root=root, output=run)


def start(root, run, preset, *changes):
    path = run.parent / f"{run.name}.yaml"
    train(["--config", str(helpers.write_config(path, recipe(root, run, preset, *changes)))])


def die_at(monkeypatch, iteration):
    iterate = Trainer._iterate

    def mortal(self, forward, batch):
        if self.iteration == iteration:
            raise KeyboardInterrupt
        return iterate(self, forward, batch)

    monkeypatch.setattr(Trainer, "_iterate", mortal)


def flat(value, name=""):
    """Name every tensor and plain value of a nested state."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
        else:
            assert actual[name] == value, name


def final_state(run):
    state = read_checkpoint(run)
    state["config"]["run"].pop("output")
    return flat(state)


def losses(run):
    return [
        {key: value for key, value in line.items() if key.startswith(("iteration", "loss/", "learning_rate"))}
        for line in read_metrics(run)
    ]


@pytest.mark.parametrize("death", [4, 6])
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(root, tmp_path, monkeypatch, whole, death):
    run, preset = whole
    with monkeypatch.context() as patch:
        die_at(patch, death)
        with pytest.raises(KeyboardInterrupt):
            start(root, tmp_path / "parts", preset)
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert read_checkpoint(tmp_path / "parts")["iteration"] == 4
    start(root, tmp_path / "parts", preset)
    assert_same(final_state(tmp_path / "parts"), final_state(run))
    assert losses(tmp_path / "parts") == losses(run)
    assert [line["iteration"] for line in losses(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(root, tmp_path, monkeypatch, whole):
    run, preset = whole
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            start(root, tmp_path / "parts", preset)
    start(root, tmp_path / "parts", preset)
    assert_same(final_state(tmp_path / "parts"), final_state(run))


# --- determinism


def weights(root, folder, name, *changes):
    config = load_config(
        ["--config", str(helpers.write_config(folder / f"{name}.yaml", recipe(root, folder / name, "paper", *changes)))]
    )[0]
    trainer = Trainer(config, ALONE)
    first = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    for _ in range(3):
        trainer._iterate(trainer.step, next(trainer.loader))
    trainer.close()
    return first, trainer.network.state_dict()


def test_classes_in_another_order_are_not_taken_for_those_that_were_learned(root, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(root / "JPEGImages", own / "images")
    shutil.copy(root / "labels.csv", own / "train.csv")
    (own / "classes.txt").write_text("\n".join(helpers.CLASSES))
    change = {"data": {"dataset": "own", "classes": None, "labels": "auto", "val_list": None}}
    recipe = helpers.write_config(tmp_path / "own.yaml", helpers.values(change, root=own, output=tmp_path / "run"))
    train(["--config", str(recipe)])
    (own / "classes.txt").write_text("\n".join(reversed(helpers.CLASSES)))
    with pytest.raises(UserError, match=r"learned the classes \('red', 'green', 'blue'\)"):
        train(["--config", str(recipe)])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(root, tmp_path):
    first, again = weights(root, tmp_path, "first"), weights(root, tmp_path, "again")
    other = weights(root, tmp_path, "other", {"run": {"seed": 1}})
    assert_same(again[0], first[0])
    assert_same(again[1], first[1])
    for before, after in zip(first, other, strict=True):
        assert not torch.equal(before["top_classifier.weight"], after["top_classifier.weight"])


def test_the_number_of_workers_changes_nothing(root, tmp_path):
    assert_same(weights(root, tmp_path, "workers", {"data": {"workers": 2}})[1], weights(root, tmp_path, "none")[1])


def test_what_else_draws_at_random_changes_nothing(root, tmp_path):
    path = helpers.write_config(tmp_path / "a.yaml", recipe(root, tmp_path / "run", "paper"))
    config, _ = load_config(["--config", str(path)])
    states = []
    for disturbance in (0, 5):
        trainer = Trainer(config, ALONE)
        for _ in range(2):
            torch.rand(disturbance)
            trainer._iterate(trainer.step, next(trainer.loader))
        states.append(trainer.network.state_dict())
        trainer.close()
    assert_same(*states)


def test_streams_differ_by_seed_purpose_process_and_iteration():
    keys = [(0, "step", 0, 1), (1, "step", 0, 1), (0, "data", 0, 1), (0, "step", 1, 1), (0, "step", 0, 2)]
    draws = [torch.rand(4, generator=stream(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert torch.rand(4, generator=stream(*keys[0])).tolist() == draws[0]


@pytest.mark.parametrize(("per_rank", "same"), [(True, False), (False, True)])
def test_processes_draw_alike_only_where_the_recipe_says_so(root, tmp_path, monkeypatch, per_rank, same):
    drawn = []

    def remember(*key):
        drawn.append(key)
        return stream(*key)

    monkeypatch.setattr(trainer_module, "stream", remember)
    change = {"run": {"seed_per_rank": per_rank}}
    path = helpers.write_config(tmp_path / "a.yaml", recipe(root, tmp_path / "run", "paper", change))
    for rank in (0, 1):
        trainer = Trainer(load_config(["--config", str(path)])[0], Process(rank, 2, torch.device("cpu")))
        trainer._iterate(trainer.step, next(trainer.loader))
        trainer.close()
    assert (drawn[0] == drawn[1]) is same
