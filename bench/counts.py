"""Count what a GPU would do, without one: ``python -m bench.counts``.

Every operation is called at batch 16 as a step under autocast calls it, on a GPU of compute capability 9.0 in name.
Triton compiles the kernels that are launched; the instructions of each, loops included, times the warps that execute
them give the instructions of the call. Inductor compiles a block of the transformer as far as its code; DALI builds the
operators of a batch.

To count another operation, add a `Case`. ``python -m tests.kernels.compile_table --loops`` shows the loops of a kernel.
``FSR_RECORD=1`` writes ``bench/results/sm_90/counts.json``.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from bench import fake_gpu  # before the kernels are defined

# isort: split
import timm
import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.fake_gpu import TARGET
from bench.fake_iteration import move
from bench.harness import record
from bench.host import count_iteration, summarise
from bench.launches import launches
from bench.machine_code import read_loops, read_resources
from fsr_fast import kernels
from fsr_fast.config import ModelConfig
from fsr_fast.dataloading import dali_graph
from fsr_fast.dataloading.dali_policy import POLICY_STEPS
from fsr_fast.kernels.distillation_kernels import PROTOTYPES
from fsr_fast.kernels.learned_policy import NUMBERS
from fsr_fast.method.losses import segmentation_loss
from fsr_fast.models.attention import Backends
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.gelu import gelu, gelu_backward

B, N, D = 16, 784, 768
"""Images, patches of one, width."""
Counts = dict[str, float]


class Launch(NamedTuple):
    """A launch of one of Triton's kernels."""

    kernel: str
    programs: int
    source: ASTSource
    """The kernel, with the types and constants that it is compiled for."""
    options: Any
    """Warps and stages."""


class Work(NamedTuple):
    """What a program does."""

    trips: tuple[float, ...]
    """Of each loop of the machine code, in its order; a loop that contains another has its own."""
    share: float = 1.0
    """Of the programs that do not return at once."""


Works = dict[str, Sequence[Work]]
"""By the names of the kernels; several works are those of a kernel's launches in turn."""


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    make: Callable[[], Sequence[Any]]
    """Makes the arguments; those that require a gradient get one."""
    call: Callable[..., Tensor]
    forward: Works = field(default_factory=dict)
    backward: Works = field(default_factory=dict)
    amp: bool = False
    """Call under autocast to bfloat16."""


def tiles(length: int, size: int) -> int:
    """Number of tiles of a length."""
    return math.ceil(length / size)


def of_pairs(size: int) -> float:
    """Share of square tiles of pairs of patches on and above the diagonal."""
    count = tiles(N, size)
    return (count + 1) / (2 * count)


def affinity_case(pairs: int, width: int, columns: int, amp: bool = False) -> Case:
    """All labels known: the most pairs there can be."""
    return Case(
        lambda: (torch.zeros(B, N, D, requires_grad=True), torch.zeros(B, N, dtype=torch.int64)),
        kernels.affinity_sums,
        {"prepare_kernel": [Work((tiles(N, 256),))], "sums_kernel": [Work((tiles(D, width),), of_pairs(pairs))]},
        {"backward_kernel": [Work((tiles(N, columns),) * 2)]},
        amp,
    )


def refinement_case(side: int = 224, slots: int = 2, dilations: int = 6) -> Case:
    """Two classes per image, each against two backgrounds."""
    return Case(
        lambda: (
            torch.zeros(B, 3, side, side),
            torch.zeros(B, slots, side, side),
            torch.zeros(B, slots, dtype=torch.int64),
            torch.ones(B, slots, dtype=torch.bool),
        ),
        lambda *arguments: kernels.refine_pseudo_labels(*arguments, size=(2 * side, 2 * side)),
        {
            "_affinity": [Work((dilations,) * 4)],
            "_refine": [Work((dilations,))],
            "_foreground_softmax": [Work((slots // 4, slots % 4, slots))],  # the first is unrolled four times
            "_label": [Work((slots,))],
        },
    )


def cross_attention_case(heads: int = 12) -> Case:
    """The aggregator's, which reads masked tokens too."""
    vectors = ("norm_weight", "norm_bias", "q_bias", "k_bias", "v_bias", "proj_bias")
    matrices = ("q_weight", "k_weight", "v_weight", "proj_weight")
    shapes = [(B, D), (B, N, D), *[(D,)] * len(vectors), *[(D, D)] * len(matrices)]
    projections = [Work((tiles(size, 128),)) for size in (D, D // heads, D, D)]  # the second is per head
    columns, steps = tiles(D, 64), tiles(tiles(N, 64), 16)
    weights = tiles(N, 256) / tiles(D, 256)  # one in so many programs does it for all
    return Case(
        lambda: [
            torch.zeros(B, N, dtype=torch.bool),
            *(torch.zeros(shape, requires_grad=True) for shape in shapes),
        ],
        lambda mask, token, tokens, *rest: kernels.masked_cross_attention(
            token, tokens, mask, **dict(zip((*vectors, *matrices), rest, strict=True)), heads=heads
        ),
        {
            "projection_kernel": projections,
            "attend_kernel": [Work((columns, columns))],
            "combine_kernel": [Work((steps // 4, steps, weights))],  # the first is unrolled four times
        },
        {"projection_kernel": projections, "gradient_kernel": [Work((columns, columns))]},
        amp=True,
    )


def segmentation_case(channels: int = 21, side: int = 28, patch: int = 16, layout: Any = torch.channels_last) -> Case:
    """Each cell between four logits has as many pixels as a patch, on average."""
    return Case(
        lambda: (
            torch.zeros(B, channels, side, side, dtype=torch.bfloat16).to(memory_format=layout).requires_grad_(),
            torch.zeros(B, side * patch, side * patch, dtype=torch.uint8),
        ),
        segmentation_loss,
        {"_count_kernel": [Work(())], "_cell_kernel": [Work((patch // 8, patch))], "_gather_kernel": [Work(())]},
    )


def distillation_case(rows: int = 16 * 313, prototypes: int = 4096, width: int = 256) -> Case:
    """The masked patches of a batch."""
    work = [Work((PROTOTYPES // 32,))]
    return Case(
        lambda: (
            torch.zeros(rows, width, requires_grad=True),
            torch.zeros(rows, width),
            torch.zeros(prototypes, width, requires_grad=True),
            torch.zeros(prototypes, width),
            torch.zeros(prototypes),
            torch.zeros(rows),
        ),
        lambda *arguments: kernels.distillation_loss(*arguments[:-1], weight=arguments[-1]),
        {"forward_kernel": work},
        {"logit_gradient_kernel": work},
        amp=True,
    )


CASES = {
    "affinity_sums, autocast": affinity_case(pairs=128, width=64, columns=64, amp=True),
    "affinity_sums, float32": affinity_case(pairs=64, width=32, columns=32),
    "refine_pseudo_labels": refinement_case(),
    "masked_cross_attention, autocast": cross_attention_case(),
    "segmentation_loss, bfloat16": segmentation_case(),
    "distillation_loss, autocast": distillation_case(),
}


def count_call(call: Callable[[], Any], works: Works) -> tuple[Any, Counts]:
    """Return the result of a call, its launches, and of Triton's kernels the instructions and the most registers.

    Raises:
        ValueError: the loops of a kernel are not those that `works` describes.
    """
    found: list[Launch] = []

    def note(
        kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> Any:
        source = ASTSource(kernel, signature, constants, attributes)

        def run(x: int, y: int, z: int, *_: Any) -> None:
            found.append(Launch(kernel.__name__, x * y * z, source, options))

        return SimpleNamespace(run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None)

    with launches() as names, mock.patch.object(JITFunction, "_do_compile", note):
        result = call()
    counts = {"launches": len(names)}
    if not found:
        return result, counts
    executed, registers = 0.0, 0
    turns = {kernel: itertools.cycle(each) for kernel, each in works.items()}
    for launch in found:
        work = next(turns[launch.kernel])
        instructions, needed = _read(launch, work.trips)
        executed += instructions * launch.programs * work.share * launch.options.num_warps
        registers = max(registers, needed)
    return result, counts | {"instructions of a warp": round(executed), "registers": registers}


def _read(launch: Launch, trips: Sequence[float]) -> tuple[float, int]:
    """Instructions of one warp, and registers."""
    cubin = triton.compile(launch.source, target=TARGET, options=launch.options.__dict__).asm["cubin"]
    places, loops = read_loops(cubin)
    if len(loops) != len(trips):
        sizes = [sum(start <= place <= end for place in places) for start, end in loops]
        raise ValueError(f"{launch.kernel}: loops of {sizes} instructions; {len(trips)} numbers of trips are given")
    ranges = list(zip(loops, trips, strict=True))
    executed = sum(math.prod(times for (start, end), times in ranges if start <= place <= end) for place in places)
    return executed, read_resources(cubin)[0]


def count_case(case: Case) -> dict[str, Counts]:
    """Return the counts of the forward and, where there is one, of the backward pass."""
    arguments = case.make()
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=case.amp):
        output, forward = count_call(lambda: case.call(*arguments), case.forward)
    if not leaves:
        return {"forward": forward}
    gradient = torch.ones_like(output)
    _, backward = count_call(lambda: torch.autograd.grad(output, leaves, gradient), case.backward)
    return {"forward": forward, "backward": backward}


def compile_block(blocks: int = 1, *, graphs: bool = False) -> fake_gpu.Program:
    """Compile blocks of ViT-B as the paper's step runs them on packed images, without gradient.

    Args:
        blocks: their number; without `graphs` only the first is compiled, since one program serves all.
        graphs: as one program.
    """
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, depth=blocks)
    encoder = Encoder(vit, ModelConfig(aux_block=-1), 448).train()
    encoder.attention = Backends("varlen", "varlen", "varlen")
    encoder.compile_blocks(graphs=graphs)
    sizes = ((3 * B, 448), (2 * B, 224), (2 * B, 672))
    with fake_gpu.pretend(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        bounds = torch.empty(7 * B + 1, dtype=torch.int32, device="cuda")
        move(encoder)
        images = [torch.empty(number, 3, side, side, device="cuda") for number, side in sizes]
        with mock.patch("fsr_fast.models.attention.boundaries", return_value=bounds):
            (program,) = fake_gpu.programs_of(lambda: encoder.forward_packed(images))
    return program


def count_blocks(number: int, *, graphs: bool = False) -> Counts:
    """Return the counts of those blocks."""
    program = compile_block(number, graphs=graphs)
    return {"launches": program.kernels + program.others, "bytes of element-wise kernels": program.traffic}


def count_elementwise(call: Callable[..., Tensor], *shape: int) -> Counts:
    """Return the counts of an operation on bfloat16 tensors of a shape, compiled to one kernel without a loop."""
    number = len(inspect.signature(call).parameters)
    with fake_gpu.pretend(), torch.no_grad():
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(number)]
        (program,) = fake_gpu.programs_of(lambda: torch.compile(call, dynamic=False)(*tensors))
    source, warps, block = fake_gpu.pointwise_kernel(program)
    cubin = triton.compile(source, target=TARGET, options={"num_warps": warps}).asm["cubin"]
    places, loops = read_loops(cubin)
    assert not loops
    executed = len(places) * warps * tiles(math.prod(shape), block)
    return {"instructions of a warp": executed, "registers": read_resources(cubin)[0]}


def count_dali() -> Counts:
    """Return the number of DALI's operators and inputs for a batch of two views."""
    graph = dali_graph.build_graph(lambda: (), views=2, size=448, batch_size=B, threads=2, device_id=0)
    graph._build_graph()
    return {"operators": len(graph._ops), "inputs": 1 + sum(len(dali_graph.parameter_names(view)) for view in range(2))}


def count_policy() -> Counts:
    """Return the launches that follow DALI for AutoAugment, whatever it drew."""
    pixels = torch.zeros(2, B, 448, 448, 3, dtype=torch.uint8)
    steps = torch.zeros(POLICY_STEPS, 2, B, NUMBERS, dtype=torch.float64)
    works = {"_count_kernel": [Work(())], "_apply_kernel": [Work(())]}
    _, counts = count_call(lambda: kernels.apply_policy(pixels, steps, (0, 0, 0)), works)
    return {"launches after it": counts["launches"]}


def main() -> None:
    """Count everything, print and record it."""
    fake_gpu.admit_cpu_tensors()
    found = {f"{name}, {part}": counts for name, case in CASES.items() for part, counts in count_case(case).items()}
    found["GELU of a block without gradient"] = count_elementwise(gelu, 8 * B * N, 4 * D)
    found["GELU, backward"] = count_elementwise(gelu_backward, 2 * B * N, 4 * D)
    found["transformer block without gradient"] = count_blocks(1)
    found["two blocks as one program, run.graphs"] = count_blocks(2, graphs=True)
    found["an iteration of two images, outside the blocks"] = summarise(*count_iteration())
    found["DALI, VOC recipe"] = count_dali()
    found["DALI, AutoAugment"] = count_dali() | count_policy()
    for name, counts in found.items():
        print(name, *(f"{figure} {value:.4g}" for figure, value in counts.items()), sep="\n  ")
        record(f"counts {name}", "sm_90", {"counts": counts})


if __name__ == "__main__":
    main()
