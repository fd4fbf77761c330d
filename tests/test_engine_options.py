"""Options that change how the step is computed, but not the result."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fsr_fast import engine
from fsr_fast.engine import build_step, keep_backends, training_groups
from fsr_fast.errors import UserError
from fsr_fast.method.schedules import reaches_all, schedule_at
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.models.attention import Backends
from fsr_fast.models.block import run_block
from fsr_fast.models.float8 import linear_float8
from fsr_fast.runtime.distributed import distribute
from tests import helpers
from tests.helpers import OFFICIAL
from tests.rounding import skip_if_intercepted

LATE = 3
OFF = {"run": {"compile": False}}


def build(*changes: dict) -> FSRStep:
    config = helpers.config(*changes)
    return build_step(helpers.network(config), config, 3)


def run(step: FSRStep) -> StepOutput:
    draws = step.draw(2, helpers.generator(0))
    return step(helpers.views(2), helpers.labels(2), draws, schedule_at(step.config, LATE))


def gradients(step: FSRStep) -> dict[str, torch.Tensor]:
    run(step).loss.backward()
    return {name: value.grad for name, value in step.student.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("option", ["checkpointing", "compile"])
def test_an_option_changes_no_gradient(option):
    plain, changed = build(OFF), build(OFF, {"run": {option: True}})
    assert (changed.student.encoder._run_block is run_block) == (option != "compile")
    assert plain.student.state_dict().keys() == changed.student.state_dict().keys()
    torch.testing.assert_close(gradients(changed), gradients(plain), rtol=1e-4, atol=1e-6)


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(step: FSRStep) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda x: x
        ):
            run(step)
        return sum(sizes)

    assert kept(build(OFF, {"run": {"checkpointing": True}})) < 0.5 * kept(build(OFF))


def test_a_teacher_of_its_own_is_compiled_too():
    step = build(OFFICIAL, {"run": {"compile": True}})
    assert step.teacher.network.encoder._run_block is step.student.encoder._run_block


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """Record what would be compiled."""
    skip_if_intercepted()
    found: list[torch.fx.GraphModule] = []
    compile_with = torch.compile

    def take(graph: torch.fx.GraphModule, _):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(function, backend=take, **options))
    torch.compiler.reset()
    return found


def test_an_evaluation_s_many_sizes_are_not_compiled(graphs):
    step = build({"run": {"compile": True}})
    run(step)
    assert len(graphs) == 2  # passes with and without gradient
    encoder = step.student.encoder.eval()
    for side in range(2, 6):
        encoder(torch.zeros(1, 3, side * helpers.PATCH, helpers.PATCH))
    assert len(graphs) == 2


def test_processes_that_share_gradients_compile_whole_blocks(graphs, monkeypatch):
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    step = build({"run": {"compile": True}})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = DistributedDataParallel(step, find_unused_parameters=True, bucket_cap_mb=0.01)
        draws = step.draw(2, helpers.generator(0))
        shared(helpers.views(2), helpers.labels(2), draws, schedule_at(step.config, LATE)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 2  # and not one for each of DDP's buckets


@pytest.mark.parametrize("changes", [({},), (OFFICIAL,), ({"model": {"aggregation": "gap"}},)], ids=str)
def test_processes_search_for_no_unused_parameter_where_the_losses_reach_all(changes):
    step = build({"loss": {"segmentation_start": 0}}, *changes)
    process = mock.Mock(world_size=2, device=torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = distribute(step, process, all_reached=reaches_all(step.config, LATE))
        assert not shared.find_unused_parameters
        for _ in range(2):  # the second iteration fails where a gradient of the first was missing
            draws = step.draw(2, helpers.generator(0))
            shared(helpers.views(2), helpers.labels(2), draws, schedule_at(step.config, LATE)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_block_is_given_the_boundaries_of_the_images(graphs, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_: query)
    step = build({"run": {"compile": True}})
    step.student.encoder.attention = Backends(*["varlen"] * 3)
    run(step)
    assert len(graphs) == 2
    assert not any(node.target is torch.tensor for graph in graphs for node in graph.graph.nodes)


# --- attention


@pytest.mark.parametrize(
    "changes",
    [({},), ({"model": {"stochastic_depth": 0.0}},), (OFFICIAL,), ({"model": {"prefix_tokens": "keep"}},)],
    ids=str,
)
def test_what_is_measured_is_what_a_training_passes(changes):
    step = build(OFF, {"optim": {"batch_size": 4}}, *changes)
    passes = run(step).work.passes  # of two images
    single, packed = training_groups(step, processes=2)
    assert single in [one.groups for one in passes if one.gradient]
    assert packed in [one.groups for one in passes if not one.gradient]


@pytest.fixture
def measured(monkeypatch) -> list[bool]:
    """Whether each measurement was one with gradient; xformers is the fastest there, varlen without."""
    asked: list[bool] = []

    def fastest(groups, heads, width, device, *, gradient):
        asked.append(gradient)
        return "xformers" if gradient else "varlen"

    monkeypatch.setattr(engine, "fastest_backend", fastest)
    return asked


GPU = torch.device("cuda")


def test_on_a_gpu_the_fastest_backend_of_each_pass_is_taken(measured):
    assert engine._measure_backends(build(OFF), "sdpa") == ("xformers", "varlen", "sdpa")
    assert measured == [True, False]


@pytest.mark.parametrize("run", [{"amp": "bf16"}, {"amp": "off"}, {"amp": "bf16", "engine": "reference"}], ids=str)
def test_on_a_cpu_nothing_is_measured(measured, run):
    amp = {"amp": "off"} if "engine" in run else {}
    assert build(OFF, {"run": run | amp}).student.encoder.attention == ("sdpa",) * 3
    assert not measured


def test_an_evaluation_takes_its_own_backend(measured):
    encoder = build(OFF).student.encoder
    encoder.attention = Backends("xformers", "varlen", "sdpa")
    assert [encoder._backend(groups) for groups in (((2, 16),), ((2, 16), (2, 4)))] == ["xformers", "varlen"]
    encoder.eval()
    assert encoder._backend(((2, 16), (2, 4))) == "sdpa"


@pytest.mark.parametrize(
    ("recorded", "kept"),
    [(["varlen", "sdpa", "sdpa"], True), (["sdpa"], False), (["varlen", "other", "sdpa"], False), ([], False)],
    ids=str,
)
def test_a_resumed_run_keeps_the_backends_that_it_measured(recorded, kept):
    step = build(OFF, OFFICIAL, {"run": {"amp": "bf16"}})
    keep_backends(step, step.config, recorded, GPU)
    for encoder in (step.student.encoder, step.teacher.network.encoder):
        assert list(encoder.attention) == (recorded if kept else ["sdpa"] * 3)


def test_without_a_gpu_what_was_measured_does_not_count():
    step = build(OFF, {"run": {"amp": "bf16"}})
    keep_backends(step, step.config, ["varlen"] * 3, torch.device("cpu"))
    assert list(step.student.encoder.attention) == ["sdpa"] * 3


# --- half precision


@pytest.mark.parametrize("changes", [({},), (OFFICIAL,)], ids=["paper", "official"])
def test_half_precision_leaves_nearly_all_pseudo_labels_as_they_are(changes):
    agreed = []
    for seed in range(3):
        outputs = []
        for amp in ("off", "bf16"):
            step = build(OFF, *changes, {"run": {"amp": amp}}).train()
            draws = step.draw(8, helpers.generator(0))
            outputs.append(step(helpers.views(8, seed), helpers.labels(8), draws, schedule_at(step.config, LATE)))
        agreed.append((outputs[0].pseudo_labels == outputs[1].pseudo_labels).float().mean().item())
    assert sum(agreed) / 3 > 0.99


def test_a_kept_branch_is_scaled_exactly_in_half_precision():
    step = build(OFF, {"model": {"stochastic_depth": 0.3}}).train()
    encoder, images = step.student.encoder, helpers.views(2)[0]
    factors = torch.full((encoder.depth, 2, 2), 1 / 0.9)
    with torch.no_grad():
        for block in encoder.blocks:  # an attention and an MLP that give 1
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, scaled = (encoder(images, drop_path=given).tokens for given in (torch.zeros_like(factors), factors))
    assert torch.allclose(scaled - plain, torch.tensor(2 * encoder.depth / 0.9), rtol=1e-5)


# --- float8


def in_float8(*changes: dict) -> tuple[FSRStep, FSRStep]:
    return build(OFF, *changes), build(OFF, *changes, {"cam": {"fp8": True}})


@pytest.mark.parametrize("changes", [({},), (OFFICIAL,)], ids=["paper", "official"])
def test_float8_leaves_nearly_all_pseudo_labels_as_they_are(changes):
    agreed = []
    for seed in range(3):
        outputs = []
        for step in in_float8(*changes):
            draws = step.draw(8, helpers.generator(0))
            views = helpers.views(8, seed)
            outputs.append(step(views, helpers.labels(8), draws, schedule_at(step.config, LATE)))
        plain, rounded = outputs
        assert not torch.equal(plain.cams.values, rounded.cams.values)
        agreed.append((plain.pseudo_labels == rounded.pseudo_labels).float().mean().item())
    assert sum(agreed) / 3 > 0.98  # random weights: every map is near a threshold somewhere


@pytest.mark.parametrize(("changes", "times"), [({}, 1), (OFFICIAL, 2)], ids=["paper", "official"])
def test_a_step_rounds_each_weight_once_for_each_view_whose_maps_it_reads(monkeypatch, changes: dict, times: int):
    step = build(OFF, changes, {"cam": {"fp8": True}})
    rounded, multiply = Counter(), torch._scaled_mm

    def count(inputs, weight, bias=None):
        rounded[id(weight)] += 1
        return linear_float8(inputs, weight, bias)

    def follow(*factors, use_fast_accum, **options):
        assert use_fast_accum
        return multiply(*factors, **options)

    monkeypatch.setattr("fsr_fast.models.float8.linear_float8", count)
    monkeypatch.setattr(torch, "_scaled_mm", follow)
    step(helpers.views(2), helpers.labels(2), step.draw(2, helpers.generator(0)), schedule_at(step.config, LATE))
    layers = [part for part in step.student.encoder.blocks.modules() if isinstance(part, torch.nn.Linear)]
    assert rounded.keys() == {id(layer.weight) for layer in layers}
    assert max(rounded.values()) == times


def test_float8_touches_no_loss_that_reads_no_cam():
    distils = {"loss": {"affinity": 0.0, "segmentation": 0.0}}
    plain, rounded = (run(step) for step in in_float8(distils))
    assert plain.losses == rounded.losses
    assert plain.work == rounded.work


def test_a_layer_in_float8_is_off_by_its_rounding_alone():
    layer = torch.nn.Linear(64, 32)
    inputs = torch.randn(10, 64, generator=helpers.generator()) * torch.logspace(-3, 3, 10)[:, None]  # a scale a token
    expected, found = layer(inputs), linear_float8(inputs, layer.weight, layer.bias).float()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0.001 < error.max() < 0.06


@pytest.mark.parametrize("options", [{"embed_dim": 24}, {"mlp_ratio": 2.625}], ids=str)
def test_a_backbone_whose_widths_do_not_fit_float8_is_refused(options):
    backbone = helpers.values()["model"]["backbone_options"]
    with pytest.raises(UserError, match=r"multiples of 16; --cam\.fp8 false"):
        build(OFF, {"model": {"backbone_options": backbone | options}, "cam": {"fp8": True}})


def test_a_scale_that_leaves_no_patch_is_refused_with_the_least_that_does():
    with pytest.raises(UserError, match=r"cam\.scales: 0\.1 leaves no patch of 8 pixels of an image of 32; .* 0\.25"):
        build(OFF, {"cam": {"scales": [1.0, 0.1]}})


def test_a_gpu_without_float8_is_refused(monkeypatch):
    monkeypatch.setattr("fsr_fast.engine.has_float8", lambda device: False)
    with pytest.raises(UserError, match=r"8\.9 or later"):
        build(OFF, {"cam": {"fp8": True}})


# --- the host never waits for the device


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result or shape the host must read back from the device.

    It does not look into the `fsr` operators, whose kernels are others on a GPU; the test on a GPU does.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "unique",
        "_unique2",
        "bincount",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::")
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name in ("index.Tensor", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in arguments[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), "an index by a mask waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "changes",
    [
        ({},),
        (OFFICIAL,),
        ({"mask": {"strategy": "cam_strict"}},),
        ({"loss": {"energy": 0.05}},),
        ({"model": {"aggregation": "gmp"}},),
    ],
    ids=["paper", "official", "cam_strict", "energy", "gmp"],
)
def test_the_step_reads_nothing_back_from_the_device(changes):
    step = build(OFF, *changes)
    with NoWaiting():
        run(step).loss.backward()


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x[x > 0], torch.nonzero], ids=["item", "mask", "nonzero"]
)
def test_waiting_for_the_device_would_be_noticed(wait):
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        wait(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [({},), (OFFICIAL,)], ids=["paper", "official"])
def test_on_a_gpu_the_step_does_not_synchronise(changes):
    config = helpers.config(*changes, {"run": {"compile": False, "device": "cuda"}})
    step = build_step(helpers.network(config).cuda(), config, 3).cuda()
    views, labels = tuple(view.cuda() for view in helpers.views(2)), helpers.labels(2).cuda()
    draws, schedule = step.draw(2, helpers.generator(0)), schedule_at(config, LATE)
    step(views, labels, draws, schedule).loss.backward()  # kernels are compiled, caches are filled
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(views, labels, draws, schedule).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
