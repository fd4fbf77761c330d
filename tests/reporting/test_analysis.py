"""Attention of a network, compared with a step-by-step computation on its state dict."""

import math

import pytest
import torch
import torch.nn.functional as F

from fsr_fast.errors import UserError
from fsr_fast.reporting.analysis import attention_entropy, class_attention
from tests import helpers

HEADS, WIDTH = 2, helpers.WIDTH


def norm(state, name, tokens):
    return F.layer_norm(tokens, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(state, name, tokens):
    return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def head(matrix, index):
    size = WIDTH // HEADS
    return matrix[:, index * size : (index + 1) * size]


def trunk(state, image):
    """Return tokens (N, D) and weights (depth, heads, N, N) of one image of the training's size."""
    proj = "encoder.patch_embed.proj"
    tokens = F.conv2d(image[None], state[f"{proj}.weight"], state[f"{proj}.bias"], stride=8)[0].flatten(1).T
    tokens = tokens + state["encoder.pos_embed"][0, 1:]
    weights = []
    for index in range(helpers.DEPTH):
        name = f"encoder.blocks.{index}"
        query, key, value = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", tokens)).split(WIDTH, dim=1)
        heads = []
        for number in range(HEADS):
            logits = head(query, number) @ head(key, number).T / math.sqrt(WIDTH / HEADS)
            heads.append(logits.softmax(-1))
        mixed = torch.cat([heads[number] @ head(value, number) for number in range(HEADS)], dim=1)
        tokens = tokens + linear(state, f"{name}.attn.proj", mixed)
        hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", tokens)))
        tokens = tokens + linear(state, f"{name}.mlp.fc2", hidden)
        weights.append(torch.stack(heads))
    return tokens, torch.stack(weights)


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=helpers.generator())


@torch.no_grad()
def test_entropy_is_that_of_the_weights_of_every_block_and_head():
    network = helpers.network(helpers.config()).eval()
    batch, expected = images(), torch.zeros(helpers.DEPTH, HEADS)
    for image in batch:
        weights = trunk(network.state_dict(), image)[1]
        for layer in range(helpers.DEPTH):
            for number in range(HEADS):
                rows = [-sum(p * math.log(p) for p in row.tolist()) for row in weights[layer, number]]
                expected[layer, number] += sum(rows) / len(rows) / len(batch)
    actual = attention_entropy(network, batch)
    assert actual.shape == (4, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert len(expected.flatten().unique()) == 8


def test_attention_to_all_patches_alike_has_the_largest_entropy_and_to_one_has_none():
    network = helpers.network(helpers.config()).eval()
    spread, sharp = network.encoder.blocks[0].attn.qkv, network.encoder.blocks[1].attn.qkv
    with torch.no_grad():
        spread.weight[: 2 * WIDTH] = 0
        sharp.weight[: 2 * WIDTH] *= 300
    entropy = attention_entropy(network, images(height=40, width=24))
    assert entropy[0].tolist() == pytest.approx([math.log(15)] * 2, rel=1e-5)
    assert entropy[1].max() < 0.3


def test_entropies_differ_by_image_and_are_averaged():
    network = helpers.network(helpers.config()).eval()
    batch = images(3)
    alone = torch.stack([attention_entropy(network, batch[index : index + 1]) for index in range(3)])
    assert not torch.allclose(alone[0], alone[1], rtol=1e-4)
    torch.testing.assert_close(attention_entropy(network, batch), alone.mean(0))


def test_the_network_is_left_as_it_was():
    network = helpers.network(helpers.config()).eval()
    with pytest.raises(RuntimeError):
        attention_entropy(network, torch.zeros(1, 5, 32, 32))
    attention_entropy(network, images())
    assert not any(module._forward_hooks for module in network.modules())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["exclude", "multiply", "none"])
def test_class_attention_is_that_of_every_block_and_head(mode):
    network = helpers.network(helpers.config({"model": {"mask_mode": mode}})).eval()
    state, batch = network.state_dict(), images()
    mask = torch.rand(2, 16, generator=helpers.generator(5)) < 0.4
    tokens = network.encoder(batch, mask).tokens
    actual = class_attention(network, batch, mask)
    assert actual.shape == (2, 2, HEADS, 4, 4)
    for image in range(2):
        class_token = state["encoder.cls_token"][0]
        for index in range(2):
            name = f"encoder.cls_blocks.{index}"
            normed = norm(state, f"{name}.norm1", tokens[image])
            query = linear(state, f"{name}.attn.q", norm(state, f"{name}.norm1", class_token))
            key, value = linear(state, f"{name}.attn.k", normed), linear(state, f"{name}.attn.v", normed)
            parts = []
            for number in range(HEADS):
                logits = (head(query, number) @ head(key, number).T)[0] / math.sqrt(WIDTH / HEADS)
                hidden = {"exclude": -math.inf, "multiply": 0.0, "none": logits}[mode]
                weights = torch.where(mask[image], hidden, logits).softmax(-1)
                torch.testing.assert_close(actual[image, index, number], weights.view(4, 4), rtol=1e-4, atol=1e-6)
                parts.append(weights @ head(value, number))
            class_token = class_token + linear(state, f"{name}.attn.proj", torch.cat(parts)[None])
            hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", class_token)))
            class_token = class_token + linear(state, f"{name}.mlp.fc2", hidden)


def test_class_attention_lies_on_the_grid_of_the_image_and_sums_to_1():
    network = helpers.network(helpers.config()).eval()
    attention = class_attention(network, images(3, height=40, width=24))
    assert attention.shape == (3, 2, HEADS, 5, 3)
    torch.testing.assert_close(attention.sum((-2, -1)), torch.ones(3, 2, HEADS))
    bright = images(1, 40, 24)
    bright[..., 24:32, 8:16] += 5
    change = (class_attention(network, bright) - class_attention(network, images(1, 40, 24))).abs().mean((0, 1, 2))
    assert divmod(int(change.argmax()), 3) == (3, 1)


def test_a_network_that_pools_has_no_class_attention():
    network = helpers.network(helpers.config({"model": {"aggregation": "gap"}}))
    with pytest.raises(UserError, match="'gap' pools the patches"):
        class_attention(network, images())
