"""Running out of GPU memory: what was allocated, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fsr_fast.errors import UserError
from fsr_fast.runtime.distributed import Process

SNAPSHOT = "memory_rank_{}.pickle"


@contextmanager
def explained_shortage(run: Path, process: Process) -> Iterator[None]:
    """Turn an out-of-memory error of the GPU into advice, beside a snapshot of what is allocated.

    Args:
        run: run folder, which takes the snapshot.
        process: this process.

    Raises:
        UserError: the GPU's memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        snapshot = ""
        if process.device.type == "cuda":
            path = run / SNAPSHOT.format(process.rank)
            torch.cuda.memory._dump_snapshot(str(path))
            snapshot = f" What was allocated is in {path}, for https://docs.pytorch.org/memory_viz."
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"rank {process.rank} is out of memory ({first_line}). Give a smaller optim.batch_size, more processes, "
            f"a smaller data.image_size, run.checkpointing true or run.amp bf16.{snapshot}"
        ) from error
