"""Faults that are injected into runs: killed, hanging and dying processes, full disks, folders in use."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fsr_fast import trainer
from fsr_fast.config import build_config, load_config
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation.samples import read_samples
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import list_checkpoints, read_checkpoint, read_newest
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.loading import LIMIT, RestartingLoader
from fsr_fast.runtime.memory import explained_shortage
from fsr_fast.runtime.run_folder import claim_run_folder, locked_run_folder
from fsr_fast.train import main as train
from fsr_fast.trainer import Trainer
from tests import helpers
from tests.runtime import children
from tests.runtime.conftest import outcome
from tests.test_resume import assert_same

pytestmark = pytest.mark.faults


# --- SIGKILL


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_folder_in_which_a_writer_is_killed_at_random_moments_is_always_readable(tmp_path, record, kills):
    draws, saved = random.Random(0), 0
    for kill in range(kills):
        ours, theirs = children.CONTEXT.Pipe(duplex=False)
        process = children.start(children.save_forever, tmp_path, theirs)
        theirs.close()
        found = ours.recv()
        assert found >= saved, "a checkpoint that was on disk is gone"
        if kill % 2:
            found = ours.recv()  # lives that save something, and lives that may end before
        time.sleep(draws.uniform(0, 0.05))
        process.kill()
        process.join()
        saved = found
        try:
            while True:
                saved = ours.recv()
        except EOFError:
            pass
        if saved:
            state, _ = read_newest(tmp_path)
            assert state["iteration"] in (saved, saved + 1)
            assert state["values"].eq(state["iteration"]).all()
    assert saved >= kills // 2
    assert len(list_checkpoints(tmp_path)) <= 3
    record(
        "SIGKILL at a random moment of a process that writes checkpoints without a pause",
        injected=kills,
        lost="the checkpoint that was being written",
        outcome="every folder readable, its newest checkpoint whole, its lock free",
    )


def test_a_run_that_is_killed_at_random_moments_ends_like_one_that_was_not(recipe, tmp_path, whole, record):
    path = recipe("run", {"run": {"checkpoint_every": 1}})
    draws = random.Random(1)
    for kill in range(3):
        (process,) = children.start_ranks(path, 1)
        for _ in range(10_000):  # until there is something new to lose
            if process.exitcode is not None or len(list_checkpoints(tmp_path / "run")) > min(kill, 1):
                break
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.3))
        process.kill()
        process.join()
    assert children.exit_codes(children.start_ranks(path, 1)) == [0]
    assert_same(outcome(tmp_path / "run"), whole)
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    record(
        "SIGKILL at a random moment of a run",
        injected=3,
        lost="work since the newest checkpoint",
        outcome="the same command goes on; ends bit for bit like an undisturbed run",
    )


# --- the disk


def test_a_run_whose_disk_is_full_for_a_while_goes_on_and_is_saved_later(recipe, tmp_path, monkeypatch, record, capsys):
    soft, hard = children.resource.getrlimit(children.resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    iterate = Trainer._iterate

    def changed(self, forward, batch):
        full = self.iteration in (1, 2)  # the save after iteration 2 falls into it
        self.supervisor._saver._join()
        children.resource.setrlimit(children.resource.RLIMIT_FSIZE, (20_000 if full else soft, hard))
        return iterate(self, forward, batch)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_iterate", changed)
            train(["--config", str(recipe("run"))])
    finally:
        children.resource.setrlimit(children.resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert "no checkpoint at this iteration (File too large); the training goes on" in capsys.readouterr().err
    assert [path.stem for path in list_checkpoints(tmp_path / "run")] == ["0000004", "0000006"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    assert (tmp_path / "run" / "summary.json").is_file()
    record(
        "full disk during a save",
        injected=1,
        lost="nothing; this checkpoint is missing",
        outcome="a warning, no half-written file; the training goes on and saves the next time",
    )


def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_fails(recipe, tmp_path, record):
    path = recipe("run", {"optim": {"iterations": 3}, "run": {"checkpoint_every": 100}})
    (process,) = children.start_ranks(path, 1, children.limit_files, 20_000)
    assert children.exit_codes([process]) == [1]
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "the last checkpoint could not be written (File too large); free space" in log
    assert not (tmp_path / "run" / "summary.json").exists()
    assert children.exit_codes(children.start_ranks(path, 1)) == [0]
    record(
        "disk still full at the end",
        injected=1,
        lost="work since the newest checkpoint",
        outcome="the run fails and says why; the same command goes on",
    )


# --- the folder


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_one_goes_on(recipe, tmp_path, monkeypatch, record):
    path = recipe("run")
    refusals = []

    def start_another():
        with pytest.raises(UserError) as caught:
            train(["--config", str(path)])
        refusals.append(str(caught.value))

    iterate = Trainer._iterate
    inner = []

    def changed(self, forward, batch):
        if self.iteration == 1 and not inner:
            inner.append(1)
            start_another()
        return iterate(self, forward, batch)

    monkeypatch.setattr(Trainer, "_iterate", changed)
    train(["--config", str(path)])
    assert len(refusals) == 1
    assert f"another process trains in {tmp_path / 'run'} (host " in refusals[0]
    assert f"process {os.getpid()}" in refusals[0]
    assert read_checkpoint(tmp_path / "run")["iteration"] == 6
    record(
        "second run in the same folder",
        injected=1,
        lost="nothing",
        outcome="refused with the host and process of the first, which goes on",
    )


def test_a_run_that_waited_while_another_one_trained_in_its_folder_does_not_begin_anew(recipe, tmp_path, record):
    path = recipe("run")
    late = Trainer(load_config(["--config", str(path)])[0], Process(0, 1, torch.device("cpu")))
    train(["--config", str(path)])
    before = {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"another process has trained in .* while this one started; repeat"):
        late.run()
    late.close()
    assert {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()} == before
    record(
        "a start that checked the folder before another run trained there to its end",
        injected=1,
        lost="nothing",
        outcome="checked again under the lock, and refused",
    )


def hold_and_fork(folder: Path, pipe) -> None:
    with locked_run_folder(folder):
        if os.fork() == 0:
            time.sleep(20)  # as a loader process that outlives its parent does for a while
            os._exit(0)
        pipe.send("locked")
        children.sleep_for_ever()


def test_the_lock_of_a_killed_process_is_free_at_once_even_if_its_loader_processes_live_on(tmp_path, record):
    config = helpers.config({"run": {"output": str(tmp_path)}})
    ours, theirs = children.CONTEXT.Pipe(duplex=False)
    process = children.start(hold_and_fork, tmp_path, theirs)
    assert ours.recv() == "locked"
    with pytest.raises(UserError, match="another process trains"), locked_run_folder(tmp_path):
        pass
    process.kill()
    process.join()
    with locked_run_folder(tmp_path):
        pass
    assert claim_run_folder(config) is None
    record(
        "stale lock of a killed process whose loader processes live on",
        injected=1,
        lost="nothing",
        outcome="the kernel has released it; the folder is free",
    )


@pytest.mark.parametrize("place", ["run", "parent"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch, place, record):
    folder = tmp_path / "run" if place == "parent" else tmp_path
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(UserError, match="cannot be written to; fix its permissions") as caught:
        claim_run_folder(helpers.config({"run": {"output": str(folder)}}))
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    if place == "run":
        record("read-only run folder", injected=2, lost="nothing", outcome="refused before any work, nothing written")


# --- processes of the loader


def kill_a_worker(process: int) -> None:
    """Kill one child of this process."""
    (tasks,) = Path(f"/proc/{process}/task").glob(str(process))
    victim = int((tasks / "children").read_text().split()[-1])
    os.kill(victim, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_a_run_outlives_the_death_of_a_loader_process_and_ends_as_if_nothing_had_happened(
    recipe, tmp_path, monkeypatch, whole, record, capsys
):
    iterate = Trainer._iterate

    def changed(self, forward, batch):
        if self.iteration == 2:
            kill_a_worker(os.getpid())
            time.sleep(0.2)  # the signal of the death comes in the middle of a step
        return iterate(self, forward, batch)

    monkeypatch.setattr(Trainer, "_iterate", changed)
    train(["--config", str(recipe("run", {"data": {"workers": 1}}))])
    assert "the loader starts again at the same place" in capsys.readouterr().err
    assert_same(outcome(tmp_path / "run"), whole)
    record(
        "SIGKILL to a loader process",
        injected=1,
        lost="nothing",
        outcome="a warning, the loader starts again at the same place; ends bit for bit like an undisturbed run",
    )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_an_evaluation_outlives_the_death_of_a_loader_process(root, record, capsys):
    _, images = build_datasets(build_config(helpers.values(root=root), "the test").data)
    whole = [sample.name for sample in read_samples(images, range(len(images)), 0)]
    names = []
    for sample in read_samples(images, range(len(images)), 1):
        names.append(sample.name)
        if len(names) == 1:
            kill_a_worker(os.getpid())
    assert names == whole
    assert capsys.readouterr().err.count("the loader starts again at the same place") == 1
    record(
        "SIGKILL to a loader process of an evaluation",
        injected=1,
        lost="nothing",
        outcome="a warning, the loader starts again at the same image; every image once",
    )


def test_a_signal_ends_the_wait_for_data_behind_a_checkpoint(recipe, tmp_path, monkeypatch, whole, record):
    path = recipe("run", {"run": {"checkpoint_every": 100}})
    draw = RestartingLoader.__next__

    def wait(loader):
        batch = draw(loader)  # that comes just now, and is not trained on
        if list_checkpoints(tmp_path / "run") == [] and loader.state_dict()["position"] == 16:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        return batch

    monkeypatch.setattr(RestartingLoader, "__next__", wait)
    with pytest.raises(SystemExit) as caught:
        train(["--config", str(path)])
    assert caught.value.code == 143
    assert read_checkpoint(tmp_path / "run")["iteration"] == 3
    monkeypatch.undo()
    train(["--config", str(path)])
    assert_same(outcome(tmp_path / "run"), whole)
    record(
        "SIGTERM while a run waits for data that never arrive",
        injected=1,
        lost="nothing",
        outcome="a process that trains alone saves and ends at once; the same command goes on from there",
    )


@pytest.mark.ddp
@pytest.mark.parametrize("waiting", [(0, 1), (0,)], ids=["both", "the first"])
def test_a_signal_ends_the_wait_of_several_processes_behind_a_checkpoint(recipe, tmp_path, record, waiting):
    whole = recipe("whole")
    path = recipe("run", {"run": {"checkpoint_every": 100, "timeout": 20.0}})
    assert children.exit_codes(children.start_ranks(whole, 2)) == [0, 0]
    codes = children.exit_codes(children.start_ranks(path, 2, children.starve, 12, 0.1, waiting))
    assert [code for rank, code in enumerate(codes) if rank in waiting] == [143] * len(waiting)
    assert 0 not in codes
    assert read_checkpoint(tmp_path / "run")["iteration"] == 3
    assert children.exit_codes(children.start_ranks(path, 2)) == [0, 0]
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    record(
        "SIGTERM while both of two processes, or the first, wait for data that never arrive",
        injected=2,
        lost="nothing",
        outcome="after a grace period of 10 s the first one saves and all end; the same command goes on from there",
    )


@pytest.mark.ddp
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
@pytest.mark.parametrize("chosen", [0, 1])
def test_an_evaluation_in_mid_training_of_two_processes_outlives_the_death_of_a_loader_process(
    recipe, tmp_path, record, chosen
):
    every = {"run": {"evaluate_every": 2, "timeout": 60.0}, "data": {"workers": 1}, "optim": {"iterations": 4}}
    ranks = children.start_ranks(recipe("run", every), 2, children.kill_while_evaluating, chosen, tmp_path / "killed")
    assert children.exit_codes(ranks) == [0, 0]
    log = (tmp_path / "run" / "logs" / f"rank_{chosen}.log").read_text()
    assert log.count("the loader starts again at the same place") == 1
    assert [line["iteration"] for line in read_metrics(tmp_path / "run") if "seg_miou" in line] == [2]
    if chosen:
        record(
            "SIGKILL to a loader process of an evaluation in mid-training, of either of two processes",
            injected=2,
            lost="nothing",
            outcome="a warning, the loader starts again at the same image; the training goes on",
        )


def test_an_evaluation_that_a_kill_cut_short_is_made_up_for(recipe, tmp_path, monkeypatch, record):
    def results(run: Path) -> tuple[list[dict[str, float]], str]:
        lines = [line for line in read_metrics(run) if "seg_miou" in line]
        kept = [{name: line[name] for name in ("iteration", "pseudo_miou", "seg_miou")} for line in lines]
        return kept, (run / "checkpoints" / "best.json").read_text()

    every = {"run": {"evaluate_every": 2}}
    train(["--config", str(recipe("whole", every))])
    evaluate, calls = trainer.evaluate_network, []

    def die(network, dataset, config, process, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(network, dataset, config, process, **options)

    path = recipe("run", every)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_network", die)
        with pytest.raises(KeyboardInterrupt):
            train(["--config", str(path)])
    train(["--config", str(path)])
    found, expected = results(tmp_path / "run"), results(tmp_path / "whole")
    assert [line["iteration"] for line in found[0]] == [2, 4]
    assert found == expected
    record(
        "a kill during an evaluation in mid-training",
        injected=1,
        lost="nothing",
        outcome="the resumed run makes up for it: metrics and best checkpoint as if nothing had happened",
    )


class Dying:
    def __init__(self, deaths: int, message: str = "DataLoader worker (pid 7) exited unexpectedly") -> None:
        self.deaths, self.message, self.position = deaths, message, 5

    def __next__(self):
        self.deaths -= 1
        if self.deaths >= 0:
            raise RuntimeError(self.message)
        return self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def close(self):
        self.position = None


def test_a_loader_that_dies_again_and_again_is_given_up_with_advice():
    assert next(RestartingLoader(Dying(LIMIT))) == 5
    with pytest.raises(UserError, match=r"pid 7.*lower data\.workers"):
        next(RestartingLoader(Dying(LIMIT + 1)))


def test_other_errors_of_a_loader_are_not_taken_for_a_death():
    with pytest.raises(RuntimeError, match="shapes differ"):
        next(RestartingLoader(Dying(1, "shapes differ")))


# --- a rank that hangs


@pytest.mark.ddp
def test_a_rank_that_hangs_is_named_with_its_stack_and_all_ranks_end(recipe, tmp_path, record):
    path = recipe("run", {"run": {"timeout": 10.0}})
    ranks = children.start_ranks(path, 2, children.hang, 3, 1)
    codes = children.exit_codes(ranks)
    assert codes[1] == 124
    assert codes[0] != 0
    log = (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    assert "rank 1 of 2 (host " in log
    assert f"process {ranks[1].pid}) has not moved for 10 s at the computation of iteration 4" in log
    assert "sleep_for_ever" in log
    assert read_checkpoint(tmp_path / "run")["iteration"] == 2
    record(
        "a process that hangs",
        injected=1,
        lost="work since the newest checkpoint",
        outcome="after run.timeout its rank, host, place and stack are reported, and all processes end",
    )


# --- running out of memory


def test_a_gpu_that_is_out_of_memory_gives_advice(recipe, tmp_path, monkeypatch, record):
    def fail(self, forward, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore lines")

    monkeypatch.setattr(Trainer, "_iterate", fail)
    with pytest.raises(UserError) as caught:
        train(["--config", str(recipe("run"))])
    for part in ("rank 0", "Tried to allocate 3 GiB", "optim.batch_size", "data.image_size"):
        assert part in str(caught.value)
    assert "more lines" not in str(caught.value)
    assert "OutOfMemoryError" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    record(
        "out of GPU memory",
        injected=1,
        lost="work since the newest checkpoint",
        outcome="exit code 2 with advice (simulated here; with a snapshot of the memory on a GPU)",
    )


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()], ids=repr)
def test_a_host_that_is_out_of_memory_gives_advice(tmp_path, error):
    with (
        pytest.raises(UserError, match=r"rank 0 is out of memory .*optim\.batch_size"),
        explained_shortage(tmp_path, Process(0, 1, torch.device("cpu"))),
    ):
        raise error


# --- restarts without a human


@pytest.mark.ddp
def test_torchrun_restarts_all_processes_from_the_newest_checkpoint_when_one_is_killed(recipe, tmp_path, record):
    whole, path = recipe("whole"), recipe("run")
    assert children.exit_codes(children.start_ranks(whole, 2)) == [0, 0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    life = tmp_path / "second life"
    done = subprocess.run(
        [*launch, "--max-restarts", "1", "-m", "tests.runtime.elastic", str(life), "--config", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert life.exists()
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    assert (tmp_path / "run" / "logs" / "rank_1.log").read_text().count("rank 1 of 2 starts") == 2
    record(
        "SIGKILL to one of two processes under torchrun --max-restarts 1",
        injected=1,
        lost="work since the newest checkpoint",
        outcome="all processes start again without a human; end bit for bit like an undisturbed run",
    )
