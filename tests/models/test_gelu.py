"""GELU of compiled blocks."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fsr_fast.config import ModelConfig
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.gelu import GELU, CompiledGELU, gelu, gelu_backward


def every_number():
    """All finite bfloat16 numbers."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    return numbers[numbers.isfinite()]


def assert_rounded_once(ours, exact, scale):
    """Half a unit in the last place, twice the polynomial's error, and 2e-9 where GELU is as good as 0."""
    nearest = (exact.bfloat16().double() - exact).abs()
    assert ((ours.double() - exact).abs() <= nearest + 1e-5 * scale + 2e-9).all()


def test_each_bfloat16_number_is_rounded_once():
    numbers = every_number()
    x = numbers.double()
    exact = x / 2 * torch.special.erfc(-x / 2**0.5)
    assert_rounded_once(gelu(numbers), exact, exact.abs())


def test_its_slope_too():
    numbers = every_number()
    x = numbers.double()
    share, moved = torch.special.erfc(-x / 2**0.5) / 2, x * (-x * x / 2).exp() / (2 * torch.pi) ** 0.5
    for factor in (1, -0.375):
        ours = gelu_backward(torch.full_like(numbers, factor), numbers)
        assert_rounded_once(ours, factor * (share + moved), share + moved.abs())


def run(function, numbers):
    """Output and gradient."""
    inputs = numbers.clone().requires_grad_()
    output = function(inputs)
    output.backward(torch.ones_like(output))
    return output.detach(), inputs.grad


def test_both_directions_belong_together():
    numbers = every_number()
    output, gradient = run(GELU.apply, numbers)
    assert torch.equal(output, gelu(numbers))
    assert torch.equal(gradient, gelu_backward(torch.ones_like(numbers), numbers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elsewhere_the_librarys_form_is_used(dtype):
    numbers = every_number().to(dtype)
    layer = CompiledGELU()
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        assert all(map(torch.equal, run(function, numbers), run(F.gelu, numbers)))


@pytest.mark.gpu
def test_compiled_for_a_gpu_each_number_is_rounded_once():
    numbers = every_number().cuda()
    output, gradient = run(torch.compile(CompiledGELU()), numbers)
    assert (output != gelu(numbers)).sum() < 100, "fused, products and sums are rounded once"
    assert (gradient != gelu_backward(torch.ones_like(numbers), numbers)).sum() < 100
    assert (output != F.gelu(numbers)).any(), "the forms can be told apart"


def test_compiling_blocks_replaces_the_exact_form_alone():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)
    vit.blocks[1].mlp.act = nn.GELU(approximate="tanh")
    encoder = Encoder(vit, ModelConfig(aux_block=-1), 224)
    keys = list(encoder.state_dict())
    encoder.compile_blocks()
    assert isinstance(encoder.blocks[0].mlp.act, CompiledGELU)
    assert isinstance(encoder.blocks[1].mlp.act, nn.GELU)
    assert list(encoder.state_dict()) == keys
