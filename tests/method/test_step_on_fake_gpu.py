"""Whole iterations on tensors that are on a GPU only in name: devices, shapes and dtypes of everything computed.

Nothing is computed, so no GPU is needed. The `fsr` operators are stood for by what they are registered with.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.fake_iteration import differentiate, named_gpu, pin
from fsr_fast.engine import build_step
from fsr_fast.evaluation import inference
from fsr_fast.kernels import (
    affinity,
    affinity_kernels,
    cam_merging_kernels,
    cross_attention_kernels,
    distillation_kernels,
    patch_selection_kernels,
    segmentation_kernels,
)
from fsr_fast.method import masking
from fsr_fast.method.optim import build_optimiser, fill_missing_gradients
from fsr_fast.method.schedules import schedule_at
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.models.encoder import run_block
from fsr_fast.runtime.guard import NonFiniteGuard, gradient_norm
from tests import helpers
from tests.helpers import OFFICIAL

LATE = 3
"""An iteration at which every loss counts and the official recipe no longer masks at random."""
ON_GPU = {"run": {"device": "cuda", "amp": "auto", "compile": False, "attention": "xformers"}}


class NoWaitingCopy(TorchDispatchMode):
    """Refuses copies for which the host waits: from the GPU, and to it from memory that is not pinned."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        sources = [value for value in arguments if isinstance(value, Tensor) and value.ndim]
        if isinstance(output, Tensor) and sources:
            source = sources[-1] if function.name().startswith("aten::copy_") else sources[0]
            assert not (source.is_cuda and not output.is_cuda), f"{function} waits for the device"
            stays = source.is_cuda or not output.is_cuda
            assert stays or getattr(source, "pinned", False), f"{function} copies from memory that is not pinned"
        return output


@pytest.fixture
def fake_gpu(monkeypatch) -> Iterator[None]:
    """A GPU that holds no numbers."""
    monkeypatch.delenv("FSR_KERNELS", raising=False)
    # Canny's edges grow until the numbers say that they have grown enough
    monkeypatch.setattr(masking, "find_edges", lambda images, config: images[:, 0] > 0)
    with named_gpu():
        yield


def iterate(step: FSRStep, optimiser: torch.optim.Optimizer, guard: NonFiniteGuard) -> StepOutput:
    """One iteration, as the trainer does it."""
    student, schedule = step.student, schedule_at(step.config, LATE)
    views = tuple(pin(view).to("cuda") for view in helpers.views(2))
    labels = pin(helpers.labels(2)).to("cuda")
    draws = step.draw(2, helpers.generator(0))
    guard.hold()
    output = step(views, labels, draws, schedule)
    optimiser.zero_grad()
    differentiate(output.loss)
    fill_missing_gradients(optimiser)
    skipped = guard.judge(output.loss, gradient_norm(student.parameters(), 1.0))
    optimiser.step()
    step.teacher.update_ema(student, schedule.encoder_momentum, schedule.projector_momentum, skipped)
    return output


@pytest.mark.parametrize(
    "changes",
    [
        ({},),
        (OFFICIAL,),
        (OFFICIAL, {"run": {"attention": "varlen"}}),
        ({"run": {"attention": "sdpa"}, "mask": {"strategy": "random"}},),
        ({"mask": {"strategy": "cam_strict"}, "model": {"aggregation": "gap"}},),
        ({"mask": {"strategy": "edge_strict"}, "model": {"aggregation": "gmp"}},),
        ({"cam": {"fp8": True}, "model": {"mask_mode": "multiply"}},),
    ],
    ids=["paper", "official", "varlen", "sdpa", "cam_strict", "edge_strict", "float8"],
)
def test_an_iteration_stays_on_the_gpu(fake_gpu, changes):
    config = helpers.config(*changes, ON_GPU)
    network = helpers.network(config)
    with FakeTensorMode():
        step = build_step(network.to("cuda"), config, 3).to("cuda")
        optimiser = build_optimiser(network, config.optim)
        guard = NonFiniteGuard(optimiser, step.distillation.buffers())
        with NoWaitingCopy():
            output = iterate(step, optimiser, guard)
    assert output.loss.dtype == torch.float32
    state = [*output.losses.values(), output.mask, output.pseudo_labels, *step.buffers(), *network.parameters()]
    assert all(value.device.type == "cuda" for value in state)
    assert all(parameter.grad.device.type == "cuda" for parameter in network.parameters())


@pytest.mark.parametrize("changes", [({},), (OFFICIAL,)], ids=["paper", "official"])
def test_half_precision_reaches_what_no_gradient_or_kernel_needs_wider(fake_gpu, monkeypatch, changes):
    config = helpers.config(*changes, ON_GPU)
    network = helpers.network(config)
    streams, contrasted = set(), []
    sums = affinity.affinity_sums_op

    def follow(block, tokens, *arguments):
        streams.add((torch.is_grad_enabled(), tokens.dtype))
        output = run_block(block, tokens, *arguments)
        streams.add((torch.is_grad_enabled(), output.dtype))
        return output

    monkeypatch.setattr(affinity, "affinity_sums_op", lambda *given: contrasted.append(given[0].dtype) or sums(*given))
    with FakeTensorMode():
        step = build_step(network.to("cuda"), config, 3).to("cuda").train()
        for part in (step.student, step.teacher.network):
            if part is not None:
                monkeypatch.setattr(part.encoder, "_run_block", follow)
        guard = NonFiniteGuard(build_optimiser(network, config.optim), step.distillation.buffers())
        iterate(step, build_optimiser(network, config.optim), guard)
    assert streams == {(True, torch.float32), (False, torch.bfloat16)}
    assert contrasted == [torch.bfloat16]


class Received(TorchDispatchMode):
    """Notes the dtypes of the first tensors that each `fsr` operator is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[str, tuple[torch.dtype, ...]]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "fsr":
            given = [value[0] if isinstance(value, list) and value else value for value in arguments]
            dtypes = tuple(value.dtype for value in given if isinstance(value, Tensor))
            self.dtypes.add((function.name().removeprefix("fsr::"), dtypes[:2]))
        return function(*arguments, **(options or {}))


COMPILED = {
    "masked_cross_attention": (cross_attention_kernels, ("queries", "tokens")),
    "affinity_sums": (affinity_kernels, ("features", "labels")),
    "distillation_rows": (distillation_kernels, ("student", "directions")),
    "merge_cams": (cam_merging_kernels, ("cams", "mirrors")),
    "segmentation_loss": (segmentation_kernels, ("logits", "labels")),
    "uncertain_mask": (patch_selection_kernels, ("features", "weight")),
}
"""Operators whose kernels exist for several dtypes, and the kernels' names of the first two tensors."""
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8"}


def test_what_half_precision_passes_to_the_kernels_is_compiled_for_every_target(fake_gpu):
    config = helpers.config(ON_GPU)
    network = helpers.network(config)
    with FakeTensorMode():
        step = build_step(network.to("cuda"), config, 3).to("cuda").train()
        optimiser = build_optimiser(network, config.optim)
        guard = NonFiniteGuard(optimiser, step.distillation.buffers())
        with Received() as received:
            iterate(step, optimiser, guard)
    assert {name for name, _ in received.dtypes} >= COMPILED.keys()
    for name, dtypes in received.dtypes:
        if name in COMPILED:
            kernels, parameters = COMPILED[name]
            wanted = dict(zip(parameters, (NAMES[dtype] for dtype in dtypes), strict=True))
            mains = [case.signature for case in kernels.compile_cases() if case.main]
            assert any(wanted.items() <= signature.items() for signature in mains), (name, dtypes)


def test_an_evaluation_stays_on_the_gpu(fake_gpu, monkeypatch):
    config = helpers.config(ON_GPU)
    network = helpers.network(config)
    monkeypatch.setattr(inference, "int", lambda _: 2, raising=False)  # classes of an image
    with FakeTensorMode():
        build_step(network.to("cuda"), config, 3)
        network.eval()
        images = [torch.empty(3, height, 50, device="cuda") for height in (40, 41)]
        labels = [torch.empty(3, device="cuda"), None]
        scales = {"cam_scales": (1.0, 0.5, 1.5), "scales": (1.0, 1.25)}
        results = list(inference.infer_like(network, images, labels, **scales, flip=True, amp="auto"))
    for image, result in zip(images, results, strict=True):
        assert result.seg_logits.shape[2:] == result.cams.values.shape[2:] == image.shape[1:]
        assert all(value.is_cuda for value in (result.seg_logits, result.class_logits, *result.cams))


@pytest.mark.parametrize(
    "copy",
    [lambda tensor: tensor.cpu(), lambda tensor: torch.ones(3).to("cuda"), lambda tensor: tensor.copy_(torch.ones(3))],
    ids=["to host", "to device", "into"],
)
def test_a_copy_that_waits_would_be_noticed(fake_gpu, copy):
    with FakeTensorMode(), NoWaitingCopy(), pytest.raises(AssertionError, match=r"waits|not pinned"):
        copy(torch.ones(3, device="cuda"))


def test_a_tensor_left_on_the_cpu_would_be_noticed(fake_gpu):
    with FakeTensorMode(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device="cuda") + torch.ones(3)
