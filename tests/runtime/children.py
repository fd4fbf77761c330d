"""Processes that the tests of faults start: forked from a server that has imported everything once."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fsr_fast.config import RunConfig, load_config
from fsr_fast.evaluation import predictions
from fsr_fast.runtime import supervision
from fsr_fast.runtime.checkpoint import list_checkpoints, read_newest
from fsr_fast.runtime.distributed import Process, stop_process
from fsr_fast.runtime.loading import RestartingLoader
from fsr_fast.runtime.run_folder import locked_run_folder
from fsr_fast.runtime.saving import Saver
from fsr_fast.trainer import Trainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.runtime.children"])
WIDTH = 20_000
"""Numbers in the state that `save_forever` writes: some pages, so that a kill can fall into a write."""

Hook = Callable[..., None]
LONGEST = 300.0
"""Seconds. gloo can hang for good while it destroys a buffer (seen once, in thousands of runs of two processes)."""


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def exit_codes(processes: list[Any]) -> list[int]:
    """Wait for processes; if some have not ended after LONGEST seconds, none of them is left."""
    end = time.monotonic() + LONGEST
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    alive = [number for number, process in enumerate(processes) if process.is_alive()]
    for number in alive:
        processes[number].kill()
    assert not alive, f"processes {alive} have not ended after {LONGEST} s"
    return [process.exitcode for process in processes]


def start_ranks(recipe: Path, size: int, hook: Hook | None = None, *arguments: Any) -> list[Any]:
    """Start the processes of one run; `hook(rank, *arguments)` is called in each before it trains."""
    meeting = recipe.with_name(f"meeting_{time.monotonic_ns()}")
    return [start(train, recipe, rank, size, meeting, hook, arguments) for rank in range(size)]


def train(recipe: Path, rank: int, size: int, meeting: Path, hook: Hook | None, arguments: tuple[Any, ...]) -> None:
    """Train as one of several processes."""
    torch.set_num_threads(1)
    config = load_config(["--config", str(recipe)])[0]
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    if hook is not None:
        hook(rank, *arguments)
    try:
        trainer = Trainer(config, Process(rank, size, torch.device("cpu")))
        try:
            trainer.run()
        finally:
            trainer.close()
    finally:
        stop_process()


def before_iteration(iteration: int, action: Callable[[], None]) -> None:
    """Have something happen when this many iterations are done."""
    iterate = Trainer._iterate

    def changed(self, forward, batch):
        if self.iteration == iteration:
            action()
        return iterate(self, forward, batch)

    Trainer._iterate = changed


# --- hooks


def signal_one(rank: int, iteration: int, number: int, chosen: int) -> None:
    """Send a signal to one process."""
    if rank == chosen:
        before_iteration(iteration, lambda: os.kill(os.getpid(), number))


def hang(rank: int, iteration: int, chosen: int) -> None:
    """Let one process hang."""
    if rank == chosen:
        before_iteration(iteration, sleep_for_ever)


def starve(rank: int, position: int, grace: float, chosen: tuple[int, ...]) -> None:
    """Withhold the data of some processes at a position of the stream, and ask these to end then."""
    supervision.GRACE = grace
    draw = RestartingLoader.__next__

    def changed(self):
        if rank in chosen and self.state_dict()["position"] == position:
            os.kill(os.getpid(), signal.SIGTERM)
            sleep_for_ever()
        return draw(self)

    RestartingLoader.__next__ = changed


def kill_while_evaluating(rank: int, chosen: int, marks: Path) -> None:
    """Kill the loader process of one process's evaluation after its first image, once."""
    read = predictions.read_samples

    def changed(*arguments):
        for sample in read(*arguments):
            yield sample
            if rank == chosen and not marks.exists():
                marks.touch()
                (tasks,) = Path(f"/proc/{os.getpid()}/task").glob(str(os.getpid()))
                os.kill(int((tasks / "children").read_text().split()[-1]), signal.SIGKILL)

    predictions.read_samples = changed


def sleep_for_ever() -> None:
    """Hang."""
    while True:
        time.sleep(1)


def limit_files(rank: int, size: int) -> None:
    """Let no file of this process grow beyond a size, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# --- processes to be killed


def save_forever(folder: Path, pipe: Any) -> None:
    """Write checkpoints as fast as possible, going on from the newest one; send each number that is on disk."""
    torch.set_num_threads(1)
    with locked_run_folder(folder):
        number = 0
        if list_checkpoints(folder):
            state, _ = read_newest(folder)
            number = state["iteration"]
            assert state["values"].eq(number).all()
        pipe.send(number)
        with Saver(RunConfig(output=folder, keep_checkpoints=2), number or None) as saver:
            while True:
                number += 1
                saver.save({"iteration": number, "values": torch.full((WIDTH,), float(number))})
                saver.finish()
                pipe.send(number)
