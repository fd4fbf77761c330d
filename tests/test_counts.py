"""What a GPU would do, counted without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.launches import launches
from bench.tabulate import tabulate_counts

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json
from dataclasses import replace
from bench import counts, fake_gpu
import torch
from bench.counts import Work

fake_gpu.admit_cpu_tensors()
case = counts.CASES["affinity_sums, autocast"]
usual = counts.count_case(case)
longer = {name: [Work((work.trips[0] + 1,), work.share)] for name, (work,) in case.forward.items()}
executed = counts.count_case(replace(case, forward=longer))["forward"]["instructions of a warp"]
in_turn = {name: works + longer[name] for name, works in case.forward.items()}
arguments = case.make()
with torch.autocast("cpu", torch.bfloat16):
    _, twice = counts.count_call(lambda: [case.call(*arguments) for _ in range(2)], in_turn)
try:
    counts.count_case(replace(case, backward={"backward_kernel": [Work((1,))]}))
    message = ""
except ValueError as error:
    message = str(error)
block = counts.compile_block()
pair = counts.compile_block(2, graphs=True)
forms = (counts.gelu, lambda x: torch.nn.functional.gelu(x)), (
    counts.gelu_backward, lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x)
)
gelu = [[counts.count_elementwise(form, 1024, 1024) for form in both] for both in forms]
layouts = torch.channels_last, torch.contiguous_format
cells = [counts.count_case(counts.segmentation_case(layout=layout))["forward"] for layout in layouts]
print(json.dumps([usual, executed, twice, message, block, pair, gelu, cells]))
"""


@pytest.fixture(scope="module")
def counted() -> list:
    """The affinity loss: counts, those with one more trip, two calls, an error.

    Then a block, two as a graph, GELU, the segmentation loss of two layouts.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_loop_counts_as_often_as_it_runs(counted):
    usual, executed, _, message, *_ = counted
    assert executed > usual["forward"]["instructions of a warp"] > 1e6
    assert "backward_kernel: loops of [" in message, "trips are given for another number of loops"


def test_launches_of_a_kernel_take_their_works_in_turn(counted):
    usual, executed, twice, *_ = counted
    assert twice["instructions of a warp"] == usual["forward"]["instructions of a warp"] + executed
    assert twice["launches"] == 2 * usual["forward"]["launches"]


def test_what_is_launched_is_what_the_step_computes(counted):
    """Under autocast the features are rounded first, and with them the gradient comes back."""
    assert counted[0]["forward"]["launches"] == 5  # cast, two kernels, two sums
    assert counted[0]["forward"]["registers"] < 255
    assert counted[0]["backward"]["launches"] == 2  # kernel, cast


def test_a_block_without_gradient_keeps_no_tensor_of_tokens_in_float32(counted):
    code, kernels, others, traffic, refusal = counted[4]
    tokens = 16 * (3 * 784 + 2 * 196 + 2 * 1764)
    assert f"({tokens}, 768), (768, 1), torch.bfloat16)" in code
    assert f"({tokens}, 768), (768, 1), torch.float32)" not in code
    assert f"({tokens}, 3072), (3072, 1), torch.float32)" not in code
    assert "libdevice.exp2" in code, "GELU of bfloat16"
    assert "libdevice.erf" not in code, "the form of float32"
    assert others == 5, "four matrix products and the attention"
    assert kernels > 4
    assert refusal is None, "it could be a CUDA graph"
    assert traffic > 2 * 2 * tokens * 768


def test_blocks_of_one_program_can_be_a_cuda_graph(counted):
    _, kernels, others, _, _ = counted[4]
    _, together, calls, _, refusal = counted[5]
    assert refusal is None, "all of it stays on the GPU"
    assert calls == 2 * others
    assert together == 2 * kernels - 1, "the sum after the first block and the norm of the second are one kernel"


def test_gelu_takes_less_than_half_of_the_instructions_of_the_librarys(counted):
    for ours, library in counted[6]:
        executed = ours["instructions of a warp"]
        assert 1024 * 1024 / 32 * 5 < executed < library["instructions of a warp"] / 2


def test_logits_in_any_layout_take_as_many_instructions(counted):
    """The decoder's channels lie side by side; lanes along them would exchange their sums pixel by pixel."""
    channels_last, contiguous = (counts["instructions of a warp"] for counts in counted[7])
    assert channels_last < 1.1 * contiguous


def test_views_and_allocations_launch_nothing():
    values = torch.ones(2, 3)
    with launches() as names:
        values.t().unsqueeze_(0).expand(5, 3, 2)
        torch.empty(2), torch.empty_like(values), values.new_empty(3)
        values.view(6).add_(1)
    assert names == ["add_"]


def test_a_composite_operator_launches_what_it_calls():
    values, weight = torch.ones(2, 3), torch.ones(4, 3)
    with torch.inference_mode(), launches() as names:
        values.reshape(6)
        values.t().reshape(6)
        F.linear(values[None], weight)
    assert names == ["clone", "mm"]


def test_counts_are_tabulated_beside_earlier_ones():
    now = [{"counts loss, forward": {"counts": {"launches": 3, "instructions of a warp": 32_210_000.0}}}]
    before = [{"counts loss, forward": {"counts": {"launches": 5}}}]
    assert tabulate_counts(now, before).splitlines()[2:] == [
        "| loss, forward | launches | 5 | 3 |",
        "|  | instructions of a warp | - | 32.2 M |",
    ]
