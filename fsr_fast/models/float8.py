"""Linear layers in float8, for passes whose maps are thresholded anyway."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGEST = 448.0
"""Largest value of e4m3: 4 bits of exponent, 3 of mantissa."""


class Float8Linears(TorchFunctionMode):
    """Within this context every linear layer rounds its factors to float8, whichever module it belongs to."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `torch.nn.functional.linear` by `linear_float8`."""
        return (linear_float8 if function is F.linear else function)(*args, **(kwargs or {}))


def linear_float8(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer with both factors rounded to float8, one scale per token and one per output channel.

    Hopper's float8 units keep about 14 bits of a running sum (DeepSeek-V3 report, Section 3.3.2). With fast
    accumulation a whole sum stays in them. Without it, every few products are added up in float32 outside, which is
    slower. CPUs sum in float32 either way.

    Args:
        inputs: (T, in), floating point.
        weight: (out, in), both multiples of 16.
        bias: (out,).

    Returns:
        (T, out), bfloat16. No gradient.
    """
    tokens, token_scale = _round(inputs)
    rounded, channel_scale = _round(weight)
    return torch._scaled_mm(
        tokens,
        rounded.t(),
        scale_a=token_scale,
        scale_b=channel_scale.t(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def has_float8(device: torch.device) -> bool:
    """Return whether the device multiplies in float8: GPUs from compute capability 8.9; CPUs do, slowly."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _round(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (values / scale).to(torch.float8_e4m3fn), scale
