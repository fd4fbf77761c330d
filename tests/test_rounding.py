"""The disturbance with which the numerical tests are tried."""

import pytest
import torch

from .rounding import OtherRounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_rounded_otherwise_by_some_units_and_the_same_each_time(dtype):
    one, other = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    plain = one @ other
    with OtherRounding(3):
        rounded, again = one @ other, one @ other
    assert torch.equal(rounded, again)
    error = (rounded - plain).abs() / (one.abs() @ other.abs())
    assert 0 < error.max() < 4 * torch.finfo(dtype).eps


def test_the_seed_chooses_the_directions():
    values = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for seed in (1, 2):
        with OtherRounding(seed):
            found.append(values.exp())
    assert not torch.equal(*found)


def test_sums_of_numbers_of_few_bits_stay_exact():
    with OtherRounding(3):
        assert torch.full((1000,), 0.25).sum() == 250
        assert (torch.ones(7, 300) @ torch.full((300, 2), 3.0)).unique().tolist() == [900]


def test_gradients_are_rounded_otherwise_too():
    weight = torch.rand(30, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (plain,) = torch.autograd.grad((weight @ weight).exp().sum(), weight)
    with OtherRounding(3):
        (rounded,) = torch.autograd.grad((weight @ weight).exp().sum(), weight)
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=1e-4, atol=0)
