"""Count what a GPU is asked to compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


class _Operators(TorchDispatchMode):
    def __init__(self, names: list[str], note: Callable[[str], str]) -> None:
        super().__init__()
        self.names = names
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace in ("prim", "profiler"):  # a question, such as a fake tensor's device, or a mark
            return function(*arguments, **(options or {}))
        ours = function.namespace == "fsr"
        with self:  # what ours and a composite operator call
            body = OPDEFS[function.name()]._init_fn if ours else function.decompose
            output = body(*arguments, **(options or {}))
        if output is not NotImplemented:
            return output
        name = function.overloadpacket.__name__
        view = function.is_view or torch.Tag.inplace_view in function.tags or name == "_unsafe_view"
        if not view and name not in ALLOCATIONS:
            self.names.append(self.note(name))
        return function(*arguments, **(options or {}))


@contextmanager
def launches(note: Callable[[str], str] = str) -> Iterator[list[str]]:
    """Names of what is launched in this context, in order: Triton's kernels, and operators of torch.

    Composite operators and ours count as what they call, views and allocations as nothing. Every other operator of
    torch counts once, though it may launch several kernels.

    Args:
        note: is told each name when it is launched, and returns what is to be listed.
    """
    names: list[str] = []

    def noted(run: Any) -> Any:
        def launch(kernel: Any, *arguments: Any, **options: Any) -> Any:
            names.append(note(kernel.__name__))
            before = len(names)
            result = run(kernel, *arguments, **options)
            del names[before:]  # what the interpreter does
            return result

        return launch

    with (
        mock.patch.object(InterpretedFunction, "run", noted(InterpretedFunction.run)),
        mock.patch.object(JITFunction, "run", noted(JITFunction.run)),
        _Operators(names, note),
    ):
        yield names
