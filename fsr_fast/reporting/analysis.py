"""What the attention of a trained network looks at: numbers behind the paper's Figures 6 and 7."""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from fsr_fast.errors import UserError
from fsr_fast.models import Network
from fsr_fast.models.aggregator import AggregatorBlock


@torch.no_grad()
def attention_entropy(network: Network, images: Tensor) -> Tensor:
    """Entropy of the trunk's self-attention, by block and head.

    A head that looks at one patch has entropy 0, one that looks at all N alike has log N.

    Args:
        network: the network.
        images: (B, 3, H, W), normalised; H and W multiples of the patch size.

    Returns:
        (depth, heads), float32, in nats: mean over images and query patches. Source: paper, Fig. 6.
    """
    entropies: list[Tensor] = []
    hooks = [
        attention.qkv.register_forward_hook(_record_entropy(attention, entropies))
        for attention in network.encoder.blocks.modules()
        if isinstance(attention, Attention)
    ]
    try:
        for image in images.split(1):  # the weights of one image at a time, (heads, N, N)
            network.encoder(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(entropies).unflatten(0, (len(images), len(hooks))).mean(0)


@torch.no_grad()
def class_attention(network: Network, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the aggregator's class token to the patches.

    Args:
        network: with aggregator.
        images: (B, 3, H, W), normalised; H and W multiples of the patch size.
        mask: (B, N), bool, masked patches; none: no patch is masked.

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
    attention: Attention, entropies: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], projected: Tensor) -> None:
        query, key, _ = projected.float().unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
        logits = attention.q_norm(query) @ attention.k_norm(key).transpose(-2, -1) * attention.scale
        entropies.append(torch.special.entr(logits.softmax(-1)).sum(-1).mean(1))

    return record
