"""Two processes compute what one computes on the whole batch."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fsr_fast import trainer as trainer_module
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.config import build_config
from fsr_fast.dataloading.batch import Batch
from fsr_fast.method.draws import Draws
from fsr_fast.method.optim import build_optimiser, fill_missing_gradients
from fsr_fast.method.schedules import reaches_all, schedule_at
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import Process, distribute, sum_over_ranks, world_size
from fsr_fast.runtime.guard import NonFiniteGuard
from fsr_fast.trainer import Trainer
from tests import helpers
from tests.runtime import children

ROOT = Path(__file__).parent.parent
BATCH, LATE = 4, 3
RECIPES = {
    "paper": ({}, LATE),
    "official": (helpers.OFFICIAL | {"loss": {"energy": 0.03}}, LATE),
    "without labels": ({"loss": {"segmentation_start": 100, "uncertain": 0.0}}, 0),  # the decoder gets no gradient
}
BY_PROCESS = {"by process": (helpers.OFFICIAL, LATE)}
"""Normalised by process: two of them do not equal one with the whole batch, but the mean of two."""


# --- one step


def share_of(draws: Draws, rows: slice) -> Draws:
    """Draws of some images of the batch."""

    def both_halves(keep):
        return torch.cat([half[..., rows] for half in keep.chunk(2, -1)], -1)

    return Draws(
        draws.uniform[rows],
        both_halves(draws.student),
        None if draws.teacher is None else both_halves(draws.teacher),
        None if draws.mask_cam is None else [both_halves(keep) for keep in draws.mask_cam],
        None if draws.cam is None else [both_halves(keep) for keep in draws.cam],
    )


def take_step(name: str, rank: int, size: int) -> dict[str, torch.Tensor]:
    """One iteration on this process's share of the batch: losses, gradients, centres and weights after it."""
    changes, iteration = (RECIPES | BY_PROCESS)[name]
    config = helpers.config(changes)
    step = helpers.step(config)
    rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    draws = share_of(step.draw(BATCH, helpers.generator()), rows)
    first, second = helpers.views(BATCH)
    process = Process(rank, size if dist.is_initialized() else 1, torch.device("cpu"))
    forward = distribute(step, process, all_reached=reaches_all(config, iteration))
    labels = helpers.labels(BATCH)[[0, 2, 1, 3]]  # one class an image in the first half, two in the second
    output = forward((first[rows], second[rows]), labels[rows], draws, schedule_at(config, iteration))
    output.loss.backward()
    optimiser = build_optimiser(step.student, config.optim)
    fill_missing_gradients(optimiser)
    found = {f"gradient {key}": value.grad.clone() for key, value in step.student.named_parameters()}
    optimiser.step()
    step.teacher.update_ema(step.student, 0.9, 0.9)
    found |= {f"loss {key}": sum_over_ranks(value) / world_size() for key, value in output.losses.items()}
    found |= {f"centre {key}": value for key, value in step.distillation.state_dict().items()}
    found |= {f"teacher {key}": value for key, value in step.teacher.state_dict().items()}
    return found | {f"weight {key}": value for key, value in step.student.state_dict().items()}


CONTENTS = {
    "different classes": [0, 2, 1, 3],  # one class an image in the first half, two others in the second
    "no foreground": [0, 1, 4, 4],  # the second process sees no class at all
}


def take_three_steps(name: str, content: str, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Three iterations of the trainer's own loop on this process's share of the batches: the state after them."""
    changes, iteration = RECIPES[name]
    config = helpers.config(changes, {"optim": {"iterations": 10, "learning_rate": 3e-4}})
    step = helpers.step(config)
    rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    draw = step.draw
    step.draw = lambda _, generator: share_of(draw(BATCH, helpers.generator()), rows)
    optimiser = build_optimiser(step.student, config.optim)
    process = Process(rank, size, torch.device("cpu"))
    guard = NonFiniteGuard(optimiser, step.distillation.buffers())
    trainer = SimpleNamespace(
        config=config,
        process=process,
        network=step.student,
        step=step,
        optimiser=optimiser,
        guard=guard,
        iteration=iteration,
    )
    forward = distribute(step, process, all_reached=reaches_all(config, iteration))
    labels = torch.cat([helpers.labels(BATCH), torch.zeros(1, len(helpers.CLASSES))])[CONTENTS[content]]
    for number in range(3):
        first, second = helpers.views(BATCH, seed=number)
        batch = Batch((first[rows], second[rows]), labels[rows], torch.arange(BATCH)[rows])
        Trainer._iterate(trainer, forward, batch)
    found = {f"centre {key}": value for key, value in step.distillation.state_dict().items()}
    found |= {f"teacher {key}": value for key, value in step.teacher.state_dict().items()}
    found |= {f"gradient {key}": value.grad for key, value in step.student.named_parameters()}
    return found | {f"weight {key}": value for key, value in step.student.state_dict().items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with helpers.float64():
        found = {name: take_step(name, rank, 2) for name in RECIPES | BY_PROCESS}
        found |= {f"{name}, {key}": take_three_steps(name, key, rank, 2) for name in RECIPES for key in CONTENTS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("shares")
    assert children.exit_codes([children.start(work, rank, str(folder)) for rank in (0, 1)]) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.ddp
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_with_half_the_batch_each_step_like_one_with_all(shares, name):
    with helpers.float64():
        whole = take_step(name, 0, 1)
    part = shares[0][name]
    assert any(key.startswith("loss uncertain") for key in whole) == (name != "without labels")
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-9)


@pytest.mark.ddp
def test_normalised_by_process_a_step_is_the_mean_of_what_each_half_gives_alone(shares):
    with helpers.float64():
        whole, *halves = (take_step("by process", *place) for place in ((0, 1), (0, 2), (1, 2)))
    part, differs = shares[0]["by process"], 0.0
    for key in (key for key in whole if key.startswith(("loss", "gradient"))):
        expected = (halves[0][key] + halves[1][key]) / 2
        scale = expected.abs().max().item()
        assert torch.allclose(part[key], expected, rtol=0, atol=1e-9), key
        differs = max(differs, (whole[key] - expected).abs().max().item() / (scale + 1e-8))
    assert differs > 1e-2, "the halves hold the same classes"


@pytest.mark.ddp
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("content", CONTENTS)
def test_after_three_steps_weights_centres_and_averages_are_those_of_one_process(shares, name, content):
    with helpers.float64():
        whole = take_three_steps(name, content, 0, 1)
        first = helpers.step(helpers.config(RECIPES[name][0])).student.state_dict()
    torch.testing.assert_close(shares[0][f"{name}, {content}"], whole, rtol=0, atol=1e-9)
    moved = [(whole[f"weight {key}"] - value).abs().max().item() for key, value in first.items()]
    assert statistics.median(moved) > 3e-4, "steps too short to tell the weights apart"


@pytest.mark.ddp
@pytest.mark.parametrize("name", RECIPES)
def test_all_processes_end_a_step_with_the_same_state(shares, name):
    for key, value in shares[0][name].items():
        assert torch.equal(value, shares[1][name][key]), key


def test_alone_nothing_is_added_up():
    value = torch.tensor([3.0])
    assert world_size() == 1
    assert sum_over_ranks(value) is value


# --- whole runs


@pytest.mark.ddp
def test_two_processes_train_and_evaluate_to_one_record(tmp_path):
    root, run = helpers.write_dataset(tmp_path / "data", train=12, val=5), tmp_path / "run"
    recipe = helpers.values({"data": {"workers": 1}, "loss": {"segmentation_start": 2}}, root=root, output=run)
    path = helpers.write_config(tmp_path / "recipe.yaml", recipe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "fsr_fast.train", "--config", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), "also when the decoder joins in"
    assert done.stdout.count("summary: ") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 4
    assert [line["iteration"] for line in read_metrics(run)] == [2, 4]
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert read_checkpoint(run)["loader"]["position"] == 4 * 4
    assert len(list((run / "tensorboard").iterdir())) == 1
    evaluate(["--checkpoint", str(run), "--output", str(tmp_path / "alone")])
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert summary["results"] == alone["results"]


def trainer_of(root: Path, run: Path, rank: int, size: int, **optim) -> Trainer:
    config = build_config(helpers.values({"optim": optim}, root=root, output=run), "the test")
    return Trainer(config, Process(rank, size, torch.device("cpu")))


def test_processes_share_every_batch_of_the_stream(tmp_path):
    root = helpers.write_dataset(tmp_path / "data")
    trainers = [trainer_of(root, tmp_path / "run", rank, size) for rank, size in ((0, 2), (1, 2), (0, 1))]
    for _ in range(3):
        first, second, whole = (next(trainer.loader).indices.tolist() for trainer in trainers)
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(whole)


def test_the_folder_is_filled_only_after_every_process_has_looked_at_it(tmp_path, monkeypatch):
    trainer = trainer_of(helpers.write_dataset(tmp_path / "data"), tmp_path / "run", 0, 1)
    seen = []

    def stop():
        seen.append((tmp_path / "run").exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "wait_for_all", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert seen == [False]
