"""Linear layers in float8, for passes whose maps are thresholded anyway."""

import torch
from torch import Tensor, nn

LARGEST = 448.0
"""Of the format e4m3: 4 bits of exponent, 3 of mantissa."""


def linear_float8(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Apply a linear layer with both factors rounded to float8, one scale a token and one an output channel.

    Args:
        layer: (out, in), both multiples of 16.
        inputs: (T, in), floating point.

    Returns:
        (T, out), bfloat16. No gradient.
    """
    tokens, token_scale = _round(inputs)
    weight, channel_scale = _round(layer.weight)
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return torch._scaled_mm(
        tokens, weight.t(), scale_a=token_scale, scale_b=channel_scale.t(), bias=bias, out_dtype=torch.bfloat16
    )


def has_float8(device: torch.device) -> bool:
    """Return whether the device multiplies in float8: GPUs from compute capability 8.9; CPUs do, slowly."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _round(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (values / scale).to(torch.float8_e4m3fn), scale
