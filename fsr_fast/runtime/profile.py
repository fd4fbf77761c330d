"""A profile of a few iterations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.profiler import ProfilerActivity, profile, schedule

from fsr_fast.config import RunConfig
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.log import LOGGER

FOLDER = "profile"
WAIT, WARM_UP, ACTIVE = 3, 2, 5


class Steps(Protocol):
    """Something that counts iterations."""

    def step(self) -> None:
        """Count one iteration."""
        ...


class _Nothing:
    def step(self) -> None:
        pass


@contextmanager
def profiled(run: RunConfig, process: Process) -> Iterator[Steps]:
    """Record five iterations, if `run.profile` asks for it.

    Args:
        run: folder and switch. The trace is `profile/rank_<rank>.json.gz`, for chrome://tracing or Perfetto.
        process: this process.
    """
    if not run.profile:
        yield _Nothing()
        return
    path = run.output / FOLDER / f"rank_{process.rank}.json.gz"

    def write(recorded: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))
        LOGGER.warning("profile of %d iterations: %s", ACTIVE, path)

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (process.device.type == "cuda")
    plan = schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler
