"""Where a trained network attends: the numbers behind the paper's Figures 6 and 7."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fsr_fast.errors import UserError
from fsr_fast.models import Network
from fsr_fast.models.aggregator import AggregatorBlock
from fsr_fast.models.block import project


@torch.no_grad()
def attention_entropy(network: Network, images: Tensor) -> Tensor:
    """Return the entropy of the trunk's self-attention, by block and head.

    A head that attends to one patch has entropy 0, one that attends evenly to all N has log N.

    Args:
        network: the network.
        images: (B, 3, H, W), normalised; H and W multiples of the patch size.

    Returns:
        (depth, heads), float32, in nats: mean over images and query patches. Source: paper, Fig. 6.
    """
    encoder = network.encoder
    entropies: list[Tensor] = []
    grid = images.shape[-2] // encoder.patch_size, images.shape[-1] // encoder.patch_size
    record = partial(_record_entropy, entropies, encoder.turn_angles([(1, grid)]), encoder.prefix)
    hooks = [block.norm1.register_forward_hook(partial(record, block.attn)) for block in encoder.blocks]
    try:
        for image in images.split(1):  # the weights of one image at a time, (heads, N, N)
            encoder(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(entropies).unflatten(0, (len(images), len(hooks))).mean(0)


@torch.no_grad()
def class_attention(network: Network, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention of the aggregator's class token to the patches.

    Args:
        network: with aggregator.
        images: (B, 3, H, W), normalised; H and W multiples of the patch size.
        mask: (B, N), bool, masked patches; None: no patch is masked.

    Returns:
        (B, blocks, heads, h, w), float32; sums to 1 over the patches. Source: paper, Fig. 7.

    Raises:
        UserError: the network pools the patches instead.
    """
    encoder = network.encoder
    if encoder.aggregation != "mca":
        raise UserError(
            f"model.aggregation: {encoder.aggregation!r} pools the patches; expected a network with aggregator ('mca')"
        )
    tokens, _, grid, _ = encoder(images, mask)
    class_token = encoder.cls_token[:, 0].expand(len(tokens), -1)
    weights = []
    for block in encoder.cls_blocks:
        assert isinstance(block, AggregatorBlock)
        class_token, attention = block.attention(class_token, tokens, mask)
        weights.append(attention.unflatten(-1, grid))
    return torch.stack(weights, dim=1)


def _record_entropy(
    entropies: list[Tensor],
    rotary: Tensor | None,
    prefix: int,
    attention: Any,
    _norm: nn.Module,
    _inputs: tuple[Tensor, ...],
    normed: Tensor,
) -> None:
    query, key, _ = (one.float().transpose(0, 1) for one in project(attention, normed, rotary))  # (heads, N, d)
    logits = query[:, prefix:] @ key.transpose(-2, -1) * attention.scale
    entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1).mean(1))
