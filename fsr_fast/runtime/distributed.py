"""Processes: one per GPU, or gloo processes on the CPU."""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fsr_fast.errors import UserError
from fsr_fast.runtime.allocator import keep_freed_memory


@dataclass(frozen=True)
class Process:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0


def start_process(device: str, timeout: float = 1800.0) -> Process:
    """Join the process group that torchrun describes, or become the only process.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout: seconds without a sign of life after which a process ends itself; 0: never. Collective operations
            wait twice as long, so that the process that hangs can report it first.

    Raises:
        UserError: CUDA is requested but missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: 'cuda', but torch sees no CUDA GPU; give --run.device cpu, or check the driver")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, size, local_rank = (int(os.environ.get(key, start)) for key, start in _VARIABLES)
    target = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
    else:
        keep_freed_memory()
    if size > 1:
        limit = timedelta(seconds=2 * timeout or _NEVER)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, **_meeting(limit))
    return Process(rank, size, target)


def stop_process() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process has arrived here."""
    if dist.is_initialized():
        dist.barrier()


def distribute(step: torch.nn.Module, process: Process, *, all_reached: bool) -> torch.nn.Module:
    """Wrap a step in DDP, unless there is one process or the step is sharded.

    Args:
        step: the step.
        process: this process.
        all_reached: every parameter gets a gradient in every iteration. DDP then need not search the graph for
            parameters without one, such as those of a stage that a weight of 0 switches off.
    """
    if process.world_size == 1 or isinstance(step, FSDPModule):
        return step
    devices = [process.device] if process.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newest torch has renamed broadcast_buffers
        return DistributedDataParallel(
            step,
            device_ids=devices,
            broadcast_buffers=False,
            find_unused_parameters=not all_reached,
            gradient_as_bucket_view=True,
        )


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(values: Any) -> Any:
    """Return the first process's values; those of the others are ignored."""
    held = [values]
    if dist.is_initialized():
        dist.broadcast_object_list(held)
    return held[0]


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average a tensor over all processes, without gradient."""
    return sum_over_ranks(value) / world_size() if dist.is_initialized() else value


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, without gradient."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def _meeting(limit: timedelta) -> dict[str, Any]:
    """Return the arguments by which the processes find each other.

    torchrun keeps its store when it restarts the processes, and in it the addresses of dead ones. On one machine all
    processes know the number of the attempt, and each attempt uses separate keys.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": size}


_NEVER = 1e6
_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
