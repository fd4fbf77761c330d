"""The class token's attention to the unmasked patches: ViT-B/16 at 448², keys and values projected against absorbed."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import masked_cross_attention

VECTORS = ("norm_weight", "norm_bias", "q_bias", "k_bias", "v_bias", "proj_bias")
MATRICES = ("q_weight", "k_weight", "v_weight", "proj_weight")


def projected(class_token: Tensor, tokens: Tensor, mask: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """Eq. 5-6 as one writes it: norm, three projections, fused attention with a mask, output projection."""
    (B, _, D), w = tokens.shape, weights

    def split(values: Tensor) -> Tensor:
        return values.reshape(B, -1, heads, D // heads).transpose(1, 2)

    together = F.layer_norm(
        torch.cat([class_token[:, None], tokens], dim=1), (D,), w["norm_weight"], w["norm_bias"], 1e-6
    )
    query = split(F.linear(together[:, :1], w["q_weight"], w["q_bias"]))
    key = split(F.linear(together[:, 1:], w["k_weight"], w["k_bias"]))
    value = split(F.linear(together[:, 1:], w["v_weight"], w["v_bias"]))
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=~mask[:, None, None])
    return F.linear(read.transpose(1, 2).reshape(B, D), w["proj_weight"], w["proj_bias"])


def positional(function: Any, class_token: Tensor, tokens: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
    return function(class_token, tokens, mask, dict(zip((*VECTORS, *MATRICES), weights, strict=True)))


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
def test_masked_cross_attention(benchmark: Any, device: torch.device, amp: bool) -> None:
    if device.type == "cpu" and amp:
        pytest.skip("the CPU is measured in fp32")
    B, N, D, heads = size(device, gpu=(16, 784, 768, 12), cpu=(2, 196, 768, 12))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device).requires_grad_()

        mask = torch.rand(B, N, generator=generator) < 0.4
        vectors = [draw(D) for _ in VECTORS]
        return draw(B, D), draw(B, N, D), mask.to(device), *vectors, *(draw(D, D, scale=D**-0.5) for _ in MATRICES)

    def ours(class_token: Tensor, tokens: Tensor, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return masked_cross_attention(class_token, tokens, mask, **weights, heads=heads)

    token_bytes, weight_bytes = 4 * B * N * D, 4 * 4 * D * D  # float32, under autocast too
    floor = Floor(
        forward_bytes=token_bytes + weight_bytes,
        forward_flops=4 * B * N * D * heads + 8 * B * D * D,
        backward_bytes=2 * token_bytes + 2 * weight_bytes,
        backward_flops=8 * B * N * D * heads + 16 * B * D * D,
    )
    compare(
        benchmark,
        device,
        f"masked_cross_attention {'amp' if amp else 'fp32'} B={B} N={N} D={D}",
        ours=functools.partial(positional, ours),
        eager=functools.partial(positional, functools.partial(projected, heads=heads)),
        inputs=inputs,
        floor=floor,
        dtype=torch.bfloat16 if amp else torch.float32,
        amp=amp,
        graph=True,
    )
