"""Whole iterations on tensors that are on a GPU only in name: nothing is computed, and no GPU is needed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fsr_fast.kernels.refinement_kernels import neighbours_on
from fsr_fast.models.attention import block_diagonal_mask, boundaries
from fsr_fast.models.positions import bicubic_matrix

PROPERTIES = SimpleNamespace(shared_memory_per_block_optin=232448)


@contextmanager
def named_gpu() -> Iterator[None]:
    """A GPU of compute capability 9.0 for the tensors of `FakeTensorMode`; `differentiate` takes gradients there."""
    make = torch.tensor

    def make_pinned(*values: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return pin(make(*values, **options)) if pin_memory else make(*values, **options)

    replaced = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.device_of": lambda _: nullcontext(),
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.nn.Module.to": move,
        "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,  # it knows no fake tensors
        "torch.tensor": make_pinned,
        "torch.Tensor.pin_memory": pin,
    }
    cached: tuple[Any, ...] = (block_diagonal_mask, boundaries, bicubic_matrix, neighbours_on)
    with ExitStack() as stack:
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        yield


def pin(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory that is pinned in name."""
    pinned = tensor.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


def move(module: nn.Module, *_: Any, memory_format: torch.memory_format = torch.preserve_format) -> nn.Module:
    """Put a module's parameters and buffers on the GPU."""
    for part in module.modules():
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for named in kinds:
            for name, value in named.items():
                if value is not None:
                    other = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                    other = other.to(memory_format=memory_format) if value.ndim == 4 else other
                    named[name] = nn.Parameter(other, value.requires_grad) if isinstance(value, nn.Parameter) else other
    return module


def differentiate(loss: Tensor, enter: Callable[[Node], None] = lambda node: None) -> None:
    """Do what `loss.backward()` does, which asks the driver for a GPU.

    Args:
        loss: scalar.
        enter: is told each node before it computes.
    """
    assert loss.grad_fn is not None
    pending: dict[Node, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in _in_order(loss.grad_fn):
        gradients = pending.pop(node, None)
        if gradients is None:
            continue
        enter(node)
        if hasattr(node, "variable"):  # a leaf takes its gradient over as it is
            node.variable.grad, *_ = gradients
            continue
        found = _call(node, gradients)
        for (following, index), gradient in zip(node.next_functions, found, strict=False):
            if following is None or gradient is None:
                continue
            meta = following._input_metadata[index]  # type: ignore[attr-defined]
            assert gradient.device == meta.device, f"{node.name()}: gradient on {gradient.device}"
            if gradient.shape != tuple(meta.shape):
                gradient = gradient.sum_to_size(tuple(meta.shape))
            gradient = gradient.to(meta.dtype)
            slots = pending.setdefault(following, [None] * len(following._input_metadata))  # type: ignore[attr-defined]
            before = slots[index]
            slots[index] = gradient if before is None else before + gradient


def _call(node: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    call = node
    if hasattr(node, "apply"):  # of a function in Python, whose gradients are never missing, but for our operators'
        call = node.apply
        if "_fsr_" not in node.name():
            gradients = [
                torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if given is None else given
                for given, meta in zip(gradients, node._input_metadata, strict=True)
            ]
    with torch.no_grad():
        found = call(*gradients)
    return found if isinstance(found, tuple) else (found,)


def _in_order(root: Node) -> list[Node]:
    """Every node of a graph before those that it passes its gradient to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]
