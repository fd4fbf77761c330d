"""Weights, gradients, moments and averages sharded over the processes (FSDP2).

Every linear layer of the transformers' blocks is gathered when it is called and freed afterwards; all other weights,
which the step reads outside their modules, are whole from the step's start to the end of its backward pass.
Checkpoints hold whole tensors, so a run may be saved with sharding and resumed without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.precision import uses_half


def shard_step(step: nn.Module, process: Process, amp: str) -> None:
    """Shard a step's weights over the processes, which hold the same ones; call it before building the optimiser.

    Args:
        step: on the device of `process`; changed in place; unchanged with one process.
        process: this process.
        amp: `run.amp` of the configuration. In half precision the blocks' weights are rounded before they are gathered,
            as autocast would do afterwards: its rounded copies would stay whole until the backward pass.
    """
    if process.world_size == 1:
        return
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    half = torch.bfloat16 if uses_half(process.device, amp) else None
    policy = MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)
    for name, layer in step.named_modules():
        if isinstance(layer, nn.Linear) and ".encoder.blocks." in name:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(step, mesh=mesh)


@contextmanager
def whole_weights(step: nn.Module, network: nn.Module) -> Iterator[None]:
    """Gather all weights of a network: each process can then use it alone, outside the sharded step."""
    inner = [part for part in network.modules() if isinstance(part, FSDPModule)]
    parts = [part for part in (step, *inner) if isinstance(part, FSDPModule)]  # the step first: it prepares the others
    for part in parts:
        part.unshard()
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor; unsharded tensors stay as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def gather(value: Any) -> Any:
    """Gather the tensors of a state, one after another, on the CPU of the first process; all processes call it.

    Args:
        value: dictionaries, lists and tuples of anything; what is not sharded stays as it is.
    """
    if isinstance(value, DTensor):
        tensor = value.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {name: gather(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(part) for part in value)
    return value


def scatter(state: Any, owner: object) -> Any:
    """Shard the tensors of a state as those of its owner are.

    Args:
        state: of whole tensors, the same in all processes.
        owner: module or optimiser that will load it; for anything else the state is returned unchanged.
    """
    if isinstance(owner, nn.Module):
        own = owner.state_dict()
        return {name: _scatter_like(value, own.get(name)) for name, value in state.items()}
    if isinstance(owner, torch.optim.Optimizer):
        parameters = [parameter for group in owner.param_groups for parameter in group["params"]]
        moments = {
            index: {name: _scatter_like(value, parameters[index]) for name, value in found.items()}
            for index, found in state["state"].items()
        }
        return {**state, "state": moments}
    return state


def _scatter_like(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value  # a mismatch is refused when it is loaded
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
