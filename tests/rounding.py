"""Another processor's rounding: `FSR_ROUNDING=7 pytest …` computes as a machine might whose sums round otherwise.

Processors add in different orders, with or without fused multiply-add. Each returns the exact result for inputs that
are off by a unit or so in the last place (backward stability). So that is done here: the inputs of every operation that
adds or that approximates a function are moved by `FSR_ROUNDING_UNITS`, 1 by default, up or down. The direction depends
on the value, on its place in the tensor and on the seed: equal calls still give equal bits. Numbers of few bits (0, 1,
counts, halves) stay as they are, for sums of them are exact everywhere, as are single additions and multiplications.
"""

import os
import re

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROUNDED = re.compile(
    r"addmm|baddbmm|mm|bmm|mv|dot|convolution\w*|sum|mean|var|std|var_mean|std_mean|cumsum|prod|logsumexp|\w*norm\w*"
    r"|\w*softmax\w*|\w*_dot_product_\w*|_?upsample_\w*|\w*avg_pool2d|exp|expm1|log|log1p|pow|rsqrt|sin|cos|tanh|gelu\w*"
    r"|softplus|sigmoid|log_sigmoid\w*|nll_loss\w*|lerp|addcmul|addcdiv"
)
"""Operations whose results differ among processors."""

ADDED = {"addmm": 0, "baddbmm": 0, "convolution": 2}
"""Place of the bias, which is added to the rounded sum: exact where that is 0."""

FORMATS = {
    torch.float32: (torch.int32, (1 << 12) - 1, 0x7F800000),
    torch.float64: (torch.int64, (1 << 29) - 1, 0x7FF0000000000000),
}
"""Integers of the dtype's size, the low bits that are 0 in a number of few bits, the bits of infinity."""


def disturb(value: Tensor, seed: int, units: int) -> Tensor:
    """Move every number of many bits by units in its last place, up or down."""
    if value.dtype not in FORMATS or value.device.type != "cpu" or type(value) not in (Tensor, torch.nn.Parameter):
        return value
    integers, low, infinity = FORMATS[value.dtype]
    bits = value.detach().contiguous().view(integers)
    place = torch.arange(bits.numel(), dtype=integers).view(bits.shape)
    mixed = (bits * 0x9E3779B1 + place * 0x85EBCA77 + seed * 0xC2B2AE3D) * 0x27D4EB2F
    direction = (mixed >> (8 * bits.element_size() - 2)) | 1  # 1 or −1, by the highest bit
    long = (bits & low).ne(0) & (bits & infinity).ne(infinity)
    moved = torch.where(long, bits + units * direction, bits)
    return torch.empty_like(value).copy_(moved.view(value.dtype))


class OtherRounding(TorchDispatchMode):
    """Disturb the inputs of every operation that rounds differently on different processors."""

    def __init__(self, seed: int, units: int = 1) -> None:
        super().__init__()
        self.seed, self.units = seed, units

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func._schema.is_mutable and ROUNDED.fullmatch(name):
            args = tuple(
                arg if place == ADDED.get(name) else tree_map_only(Tensor, self._disturb, arg)
                for place, arg in enumerate(args)
            )
        return func(*args, **(kwargs or {}))

    def _disturb(self, value: Tensor) -> Tensor:
        return disturb(value, self.seed, self.units)


def activate() -> None:
    """Compute so from now on if the environment asks for it."""
    if seed := os.environ.get("FSR_ROUNDING"):
        OtherRounding(int(seed), int(os.environ.get("FSR_ROUNDING_UNITS", "1"))).__enter__()


def skip_if_intercepted() -> None:
    """Skip a test that compiles: nothing is compiled while operations are intercepted."""
    if "FSR_ROUNDING" in os.environ:
        pytest.skip("nothing is compiled while operations are intercepted")
