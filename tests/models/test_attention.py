import importlib.util
import re
from typing import get_args

import pytest
import torch
import triton.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fsr_fast.errors import UserError
from fsr_fast.models import attention
from fsr_fast.models.attention import attend, block_diagonal_mask, boundaries, choose_backend

GROUPS = ((2, 5), (1, 9), (3, 4))
T, HEADS, CHANNELS = 31, 2, 8
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def projections(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, HEADS, CHANNELS, generator=generator).to(device, dtype) for _ in range(3)]


def literally(query: Tensor, key: Tensor, value: Tensor, groups=GROUPS) -> Tensor:
    """Attention of one image after another."""
    lengths = [tokens for images, tokens in groups for _ in range(images)]
    mixed = []
    for q, k, v in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        weights = (torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        mixed.append(torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))
    return torch.cat(mixed)


def through_the_mask(query: Tensor, key: Tensor, value: Tensor, attn_bias=None) -> Tensor:
    """Xformers' operator on a CPU: (1, T, heads, d) with its mask written out, or images of one size without."""
    logits = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
    if attn_bias is not None:
        logits = logits + attn_bias.materialize((logits.shape[-2], logits.shape[-1]))
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value)


def by_boundaries(query: Tensor, key: Tensor, value: Tensor, rows, columns, longest, longest_key) -> Tensor:
    """Torch's varlen operator on a CPU."""
    lengths = rows.diff().tolist()
    assert torch.equal(rows, columns)
    assert longest == longest_key == max(lengths)
    return literally(query, key, value, tuple((1, length) for length in lengths)).unflatten(-1, query.shape[1:])


def test_every_image_attends_to_its_own_tokens_alone():
    torch.testing.assert_close(attend(*projections(), GROUPS, "sdpa"), literally(*projections()))


@pytest.mark.parametrize("groups", [GROUPS, ((1, 31),), ((31, 1),)], ids=str)
def test_xformers_is_given_a_mask_that_parts_the_images(monkeypatch, groups):
    operators = pytest.importorskip("xformers.ops")
    monkeypatch.setattr(operators, "memory_efficient_attention", through_the_mask)
    torch.testing.assert_close(
        attend(*projections(), groups, "xformers"), literally(*projections(), groups), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("groups", [GROUPS, ((1, 31),)], ids=str)
def test_varlen_is_given_the_boundaries_of_the_images(monkeypatch, groups):
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        pytest.skip("this torch has no varlen attention")
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", by_boundaries)
    torch.testing.assert_close(
        attend(*projections(), groups, "varlen"), literally(*projections(), groups), rtol=1e-5, atol=1e-6
    )


def test_masks_and_boundaries_are_made_once():
    assert block_diagonal_mask(GROUPS, CPU) is block_diagonal_mask(GROUPS, CPU)
    assert boundaries(GROUPS, CPU) is boundaries(GROUPS, CPU)
    assert boundaries(GROUPS, CPU).tolist() == [0, 5, 10, 19, 23, 27, 31]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_on_a_gpu_all_backends_agree_with_their_gradients(backend):
    choose_backend(backend, GPU, half=True)
    results = []
    for name in ("sdpa", backend):
        leaves = [tensor.requires_grad_() for tensor in projections(torch.bfloat16, "cuda")]
        mixed = attend(*leaves, GROUPS, name)
        results.append([mixed, *torch.autograd.grad(mixed.float().square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", [False, True])
def test_on_a_gpu_backends_are_measured(gradient, caplog):
    caplog.set_level("INFO")
    assert attention.fastest_backend(((4, 64), (2, 196)), 12, 64, GPU, gradient=gradient) in get_args(attention.Backend)
    assert re.search(r"sdpa \d+\.\d{3} ms", caplog.text)


@pytest.mark.parametrize(
    ("wanted", "device", "half", "expected"),
    [
        ("auto", CPU, False, "sdpa"),
        ("auto", CPU, True, "sdpa"),
        ("auto", GPU, False, "sdpa"),
        ("auto", GPU, True, "xformers"),
        ("sdpa", GPU, True, "sdpa"),
        ("xformers", GPU, False, "xformers"),
        ("varlen", GPU, True, "varlen"),
    ],
)
def test_the_backend_follows_wish_device_and_precision(wanted, device, half, expected):
    assert choose_backend(wanted, device, half) == expected


@pytest.mark.parametrize(
    ("wanted", "device", "half", "hidden", "message"),
    [
        ("xformers", CPU, True, None, r"'xformers' has no operator for cpu; expected 'sdpa' or 'auto'"),
        ("varlen", CPU, True, None, r"'varlen' has no operator for cpu"),
        ("varlen", GPU, False, None, r"needs half precision; --run\.amp bf16"),
        ("xformers", GPU, True, "xformers", r"not installed; pip install xformers"),
        ("varlen", GPU, True, "torch.nn.attention.varlen", r"has no 'varlen'; expected 'sdpa' or 'xformers'"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(monkeypatch, wanted, device, half, hidden, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find(name))
    with pytest.raises(UserError, match=message):
        choose_backend(wanted, device, half)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_fastest_backend_that_can_run_is_found(monkeypatch, gradient):
    called, times = [], {"sdpa": 3.0, "xformers": 2.0}

    def compute(query, key, value, groups, backend):
        called.append((backend, tuple(query.shape), torch.is_grad_enabled()))
        if backend == "varlen":
            raise RuntimeError("no kernel for this GPU")
        return query.flatten(1) * 2

    def bench(call, grad_to_none, **_):
        call()
        assert (grad_to_none[0].grad is not None) == gradient
        return times[called[-1][0]]

    monkeypatch.setattr(attention, "_half_precision_backends", lambda: ["sdpa", "xformers", "varlen"])
    monkeypatch.setattr(attention, "attend", compute)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    assert attention.fastest_backend(GROUPS, 2, 8, CPU, gradient=gradient) == "xformers"
    assert called == [(backend, (31, 2, 8), gradient) for backend in ("sdpa", "xformers", "varlen")]


def test_without_xformers_auto_takes_sdpa(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto", GPU, half=True) == "sdpa"


def test_operators_that_call_torch_s_own_run_without_the_library_of_xformers(monkeypatch):
    common = pytest.importorskip("xformers.ops.fmha.common")
    flash = pytest.importorskip("xformers.ops.fmha.flash")
    monkeypatch.setattr(common, "_built_with_cuda", False)  # as where it was built for another CUDA
    monkeypatch.setattr(flash, "_USE_PT_FLASH_ATTN", False)
    assert choose_backend("auto", GPU, half=True) == "sdpa"
    with pytest.raises(UserError, match="has no operator for this torch"):
        choose_backend("xformers", GPU, half=True)
    monkeypatch.setattr(flash, "_USE_PT_FLASH_ATTN", True)
    assert choose_backend("auto", GPU, half=True) == "xformers"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with FakeTensorMode():
        inputs = common.Inputs(*(torch.empty(1, 64, 12, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)))
    assert flash.FwOp.not_supported_reasons(inputs) == flash.BwOp.not_supported_reasons(inputs) == []
