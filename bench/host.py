"""Count the operators that the host launches in a training iteration, outside the transformer's blocks.

``python -m bench.host`` prints them by part of the step; ``python -m bench.counts`` records them. It is an iteration of
the paper's recipe as the trainer runs it, with two images, in bfloat16, on a GPU in name: nothing is computed. The
blocks of a pass, which a CUDA graph replays, are left out. Views and allocations count as nothing.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bench.fake_iteration import differentiate, named_gpu, pin
from bench.launches import launches
from bench.step import CLASSES, PRESENT, Setting, Technique, build_settings
from fsr_fast.engine import build_step
from fsr_fast.method.optim import build_optimiser
from fsr_fast.models.build import build_network
from fsr_fast.reporting.averages import Averages
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.guard import NonFiniteGuard
from fsr_fast.trainer import Trainer

PARTS = {
    "projector": r"models/projector",
    "decoder": r"models/decoder",
    "aggregator": r"models/aggregator|kernels/(cross_attention|projection)|:aggregate$",
    "classifiers": r":(classify|classification_loss)$",
    "maps": r"kernels/(cam_merging|class_slots)|:(merge_passes|activations|activate)$",
    "mask": r"method/masking|kernels/patch_selection",
    "pseudo labels": r"kernels/refinement|method/pseudo_labels|:(grey_levels|denormalise)$",
    "affinity": r"kernels/affinity|:(merged_labels|affinity_loss)$",
    "segmentation": r"kernels/segmentation|:segmentation_loss$",
    "distillation": r"kernels/distillation|method/distillation|:_distil$",
    "draws": r"method/draws|:draw_drop_path$",
    "embedding": r"models/(encoder|positions|attention)|method/cam\.py|:_pass_student$",
    "guard": r"runtime/guard",
    "optimiser, average": r"method/(optim|teacher)\.py|torch/optim",
    "sum of the losses, log": r"reporting/averages|method/step\.py",
    "rest": r"fsr_fast/trainer",
}
"""Parts of a step by what is in the file and name of the function that computes; the innermost that fits counts."""
Launches = Counter[tuple[str, str]]
"""By part of the step and name of the operator or kernel."""


class _Blocks(torch.autograd.Function):
    """The blocks of a pass: results and gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens, *parameters)
        return torch.empty_like(tokens), torch.empty_like(tokens)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in wanted)


def _leave_out(run: Any, blocks: Sequence[nn.Module], aux_block: int, tokens: Tensor, *_: Any) -> Any:
    """Stand for the compiled `run_blocks`."""
    return _Blocks.apply(tokens, *(parameter for block in blocks for parameter in block.parameters()))


class _Dispatched(TorchDispatchMode):
    """Counts every operator that is not made of others, but for those that stand for the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in (_Blocks.forward.__code__, _Blocks.backward.__code__):
            frame = frame.f_back
        self.number += frame is None and function.namespace == "aten"
        return function(*arguments, **(options or {}))


@contextmanager
def _iteration(setting: Setting) -> Iterator[Callable[[], None]]:
    """Set an iteration up in which every loss counts, and give a function that runs it."""
    device = torch.device("cuda")
    config = build_settings(setting, Technique(amp="bf16", compile=True, graphs=True))
    network = build_network(config.model, CLASSES, setting.size)
    with ExitStack() as stack:
        stack.enter_context(named_gpu())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch("torch.compile", return_value=_leave_out))
        stack.enter_context(mock.patch("torch.compiler.cudagraph_mark_step_begin"))
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "run"))
        step = build_step(network.to(device), config, PRESENT).to(device).train()
        trainer: Any = SimpleNamespace(config=config, process=Process(0, 1, device), network=network, step=step)
        trainer.optimiser, trainer.iteration = build_optimiser(network, config.optim), config.optim.iterations - 2
        trainer.guard = NonFiniteGuard(trainer.optimiser, step.distillation.buffers())
        shape = setting.batch, 3, setting.size, setting.size
        batch: Any = SimpleNamespace(views=(pin(torch.empty(shape)), pin(torch.empty(shape))))
        batch.labels = pin(torch.empty(setting.batch, len(CLASSES)))
        averages = Averages()

        def iterate() -> None:
            output, skipped = Trainer._iterate(trainer, step, batch)
            averages.add({**output.losses, "total": output.loss}, skipped)

        yield iterate


def count_iteration(setting: Setting = Setting()) -> tuple[Launches, int]:  # noqa: B008, it is frozen
    """Count what an iteration launches, and all operators of torch that it calls, views and allocations among them."""
    found: Launches = Counter()
    entered: list[Node] = []

    def note(name: str) -> str:
        found[_part(sys._getframe(1), entered), name] += 1
        return name

    def backward(loss: Tensor) -> None:
        differentiate(loss, lambda node: entered.__setitem__(slice(None), [node]))
        entered.clear()

    with _iteration(setting) as iterate, mock.patch("torch.Tensor.backward", backward):
        for _ in range(2):  # the first one makes what later ones keep
            found.clear()
            with _Dispatched() as dispatched, torch.autograd.set_detect_anomaly(True, check_nan=False), launches(note):
                iterate()
    return found, dispatched.number


def _part(frame: FrameType | None, entered: Sequence[Node]) -> str:
    """Part of the step in which an operator is called: by the call stack, or by that of a gradient's forward call."""
    places = []
    while frame is not None and not (entered and frame.f_code is differentiate.__code__):
        places.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        frame = frame.f_back
    for node in entered:
        lines = "".join(reversed(node.metadata.get("traceback_", [])))
        places += [f"{file}:{name}" for file, name in re.findall(r'File "(.+)", line \d+, in (\S+)', lines)]
    fitting = (part for place in places for part, pattern in PARTS.items() if re.search(pattern, place))
    return next(fitting, "other")


def summarise(found: Launches, dispatched: int) -> dict[str, int]:
    """Return the number of launches, by kind and by part of the step, and of views and allocations."""
    parts, kinds = Counter[str](), Counter[str]()
    for (part, name), number in found.items():
        parts[part] += number
        ours = not hasattr(torch.ops.aten, name)
        kinds["casts and copies" if name == "_to_copy" else "our kernels" if ours else "other operators"] += number
    views = dispatched - found.total() + kinds["our kernels"]
    return {"launches": found.total(), **kinds, **{part: parts[part] for part in PARTS}, "views, allocations": views}


def main() -> None:
    """Print the parts, and the operators of each."""
    found, dispatched = count_iteration()
    for title, number in summarise(found, dispatched).items():
        own = Counter({name: times for (part, name), times in found.items() if part == title})
        print(f"{number:5d} {title:24}", ", ".join(f"{name} {times}" for name, times in own.most_common()))


if __name__ == "__main__":
    main()
