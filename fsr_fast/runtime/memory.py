"""Running out of memory: what was allocated, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fsr_fast.errors import UserError
from fsr_fast.runtime.distributed import Process

SNAPSHOT = "memory_rank_{}.pickle"


def is_shortage(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def explained_shortage(run: Path, process: Process) -> Iterator[None]:
    """Turn an out-of-memory error into advice; on a GPU, also write a snapshot of the allocations.

    Args:
        run: run folder, for the snapshot.
        process: this process.

    Raises:
        UserError: out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        snapshot = ""
        if process.device.type == "cuda":
            path = run / SNAPSHOT.format(process.rank)
            torch.cuda.memory._dump_snapshot(str(path))
            snapshot = f" The allocations are in {path}, for https://docs.pytorch.org/memory_viz."
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"rank {process.rank} is out of memory ({first_line}). Give a smaller optim.batch_size, more processes, "
            f"a smaller data.image_size, run.checkpointing true or run.amp bf16.{snapshot}"
        ) from error
