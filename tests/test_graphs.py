"""CUDA graphs: one program per pass, whose launches are replayed. No GPU is needed: nothing is captured here."""

import pytest
import torch

from fsr_fast import engine
from fsr_fast.engine import build_step, uses_graphs
from fsr_fast.errors import UserError
from fsr_fast.method.schedules import schedule_at
from fsr_fast.method.step import FSRStep, StepOutput
from tests import helpers
from tests.helpers import DEPTH, OFFICIAL
from tests.rounding import skip_if_intercepted

LATE = 3
GRAPHS = {"run": {"graphs": True}}


def build(*changes: dict) -> FSRStep:
    return helpers.step(helpers.config(*changes)).train()


def run(step: FSRStep) -> StepOutput:
    draws = step.draw(2, helpers.generator(0))
    return step(helpers.views(2), helpers.labels(2), draws, schedule_at(step.config, LATE))


@pytest.fixture
def programs(monkeypatch) -> list[tuple[torch.fx.GraphModule, dict]]:
    """Record what would be compiled, and the compiler's options."""
    skip_if_intercepted()
    found: list[tuple[torch.fx.GraphModule, dict]] = []
    compile_with = torch.compile

    def compile_here(function, *, options, **others):
        def take(graph, _):
            found.append((graph, options))
            return graph.forward

        return compile_with(function, backend=take, **others)

    monkeypatch.setattr(torch, "compile", compile_here)
    torch.compiler.reset()
    return found


@pytest.mark.parametrize(("changes", "passes"), [({}, 2), (OFFICIAL, 3)], ids=["paper", "official"])
def test_all_blocks_of_a_pass_are_one_program_and_the_result_is_the_same(programs, changes, passes):
    plain, changed = build(changes), build(changes, GRAPHS)
    changed.student.encoder.compile_blocks(graphs=True)
    if changed.teacher.network is not None:
        changed.teacher.network.encoder.compile_blocks(graphs=True)
    outputs = [run(step) for step in (plain, changed)]
    torch.testing.assert_close(outputs[1].losses, outputs[0].losses, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for expected, found in zip(plain.student.parameters(), changed.student.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert len(programs) >= passes
    for graph, options in programs:
        assert options == {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
        blocks = sum("layer_norm" in str(node.target) for node in graph.graph.nodes) // 2
        assert blocks in (DEPTH, DEPTH + changed.config.model.aux_block + 1)


def test_weights_are_read_where_they_lie(programs):
    """Every other input is copied into the graph's memory before each replay."""
    step = build(GRAPHS)
    step.student.encoder.compile_blocks(graphs=True)
    run(step)
    for graph, _ in programs:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        copied = [node for node in inputs if "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {})]
        assert len(inputs) - len(copied) == sum(1 for _ in step.student.encoder.blocks.parameters())
        assert len(copied) <= 2, "tokens and the factors of stochastic depth"


def test_a_step_tells_the_graphs_that_it_begins(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(len(begun)))
    step = build()
    run(step)
    assert not begun
    step.student.encoder.graphs = True
    run(step)
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("options", "processes", "graphs"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"graphs": True}, 2, True),
        ({"graphs": False}, 1, False),
        ({"checkpointing": True}, 1, False),
    ],
    ids=str,
)
def test_graphs_are_the_default_where_one_process_trains_on_a_gpu(options, processes, graphs):
    run = helpers.config({"run": options}).run
    assert uses_graphs(run, torch.device("cuda"), processes) == graphs
    assert uses_graphs(run, torch.device("cpu"), processes) == (run.graphs is True)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_blocks_are_compiled_with_the_graphs_of_the_run(monkeypatch, graphs):
    monkeypatch.setattr(engine, "uses_graphs", lambda *_: graphs)
    config = helpers.config({"run": {"compile": True}})
    assert build_step(helpers.network(config), config, 3).student.encoder.graphs == graphs


def test_an_evaluation_uses_no_graph(programs):
    encoder = build(GRAPHS).student.encoder
    encoder.compile_blocks(graphs=True)
    encoder.eval()(helpers.views(1)[0])
    assert not programs


@pytest.mark.parametrize("other", [{"shard": True}, {"checkpointing": True}, {"compile": False}], ids=str)
def test_what_no_graph_can_hold_is_refused(other):
    with pytest.raises(UserError, match=r"graphs: a CUDA graph holds compiled blocks.* --run\.graphs false"):
        helpers.config({"run": {"graphs": True, **other}})


def test_without_a_gpu_graphs_are_refused():
    config = helpers.config(GRAPHS)
    with pytest.raises(UserError, match=r"run\.graphs: CUDA graphs need a GPU, and this run is on cpu"):
        build_step(helpers.network(config), config, 3)
