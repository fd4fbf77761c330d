import math

import pytest
import torch
from torch import Tensor

from fsr_fast.reference import masked_cross_attention

B, N, D = 2, 5, 6


def draw_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"norm_weight": (D,), "norm_bias": (D,)}
    for part in ("q", "k", "v", "proj"):
        shapes |= {f"{part}_weight": (D, D), f"{part}_bias": (D,)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def draw_tokens(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, D, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.randn(B, N, D, generator=generator, dtype=torch.float64).requires_grad_(),
    )


MASK = torch.tensor([[True, False, False, True, False], [False, False, True, True, True]])


@pytest.mark.parametrize("mask_mode", ["exclude", "multiply", "none"])
def test_each_mode_agrees_with_the_formula_computed_by_hand(mask_mode):
    # one head, width 2: LayerNorm makes every vector (±1, ∓1), so logits are ±√2 exactly
    identity, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    weights = {
        f"{part}_{kind}": t for part in ("q", "k", "v", "proj") for kind, t in (("weight", identity), ("bias", zero))
    }
    tokens = torch.tensor([[[1.0, -1.0], [-2.0, 2.0], [5.0, -5.0]]], dtype=torch.float64)
    output, attention = masked_cross_attention(
        tokens[:, 0] * 7,
        tokens,
        torch.tensor([[False, False, True]]),
        norm_weight=torch.ones(2, dtype=torch.float64),
        norm_bias=zero,
        heads=1,
        mask_mode=mask_mode,
        eps=0.0,
        return_attention=True,
        **weights,
    )
    up, down = math.exp(math.sqrt(2)), math.exp(-math.sqrt(2))
    third = {"exclude": 0.0, "multiply": 1.0, "none": up}[mask_mode]
    expected = [up / (up + down + third), down / (up + down + third), third / (up + down + third)]
    torch.testing.assert_close(attention[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    first = expected[0] - expected[1] + expected[2]
    torch.testing.assert_close(output, torch.tensor([[first, -first]], dtype=torch.float64), rtol=1e-12, atol=0)


def test_excluding_patches_is_leaving_them_out():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    output = masked_cross_attention(class_token, tokens, MASK, heads=2, **weights)
    for b in range(B):
        alone = masked_cross_attention(class_token[b : b + 1], tokens[b : b + 1, ~MASK[b]], None, heads=2, **weights)
        torch.testing.assert_close(output[b], alone[0], rtol=1e-12, atol=1e-12)


def test_an_image_without_unmasked_patch_gets_the_bias_and_gives_no_gradient():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    mask = MASK.clone()
    mask[1] = True
    output = masked_cross_attention(class_token, tokens, mask, heads=3, **weights)
    assert torch.equal(output[1], weights["proj_bias"])
    output[1].sum().backward()
    gradients = [class_token.grad, tokens.grad] + [w.grad for name, w in weights.items() if name != "proj_bias"]
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


def test_mode_none_reads_no_mask():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    ignored = masked_cross_attention(class_token, tokens, MASK, heads=2, mask_mode="none", **weights)
    for mode in ("exclude", "multiply"):
        assert torch.equal(
            ignored, masked_cross_attention(class_token, tokens, None, heads=2, mask_mode=mode, **weights)
        )
        assert not torch.equal(
            ignored, masked_cross_attention(class_token, tokens, MASK, heads=2, mask_mode=mode, **weights)
        )


def test_gradients_are_those_of_the_output_and_the_key_bias_has_none():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    names = list(weights)

    def attend(*values: Tensor) -> Tensor:
        return masked_cross_attention(values[0], values[1], MASK, heads=2, **dict(zip(names, values[2:], strict=True)))

    assert torch.autograd.gradcheck(attend, (class_token, tokens, *weights.values()))
    attend(class_token, tokens, *weights.values()).sum().backward()
    assert weights["k_bias"].grad.abs().max() < 1e-12


def test_biases_are_optional():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    zeros = {
        name: torch.zeros_like(w) if name[-4:] == "bias" and "norm" not in name else w for name, w in weights.items()
    }
    nones = {name: None if name[-4:] == "bias" and "norm" not in name else w for name, w in weights.items()}
    assert torch.equal(
        masked_cross_attention(class_token, tokens, MASK, heads=2, **zeros),
        masked_cross_attention(class_token, tokens, MASK, heads=2, **nones),
    )


def test_wrong_arguments_are_refused():
    class_token, tokens = draw_tokens()
    weights = draw_weights()
    with pytest.raises(TypeError, match=r"expected torch\.bool"):
        masked_cross_attention(class_token, tokens, MASK.float(), heads=2, **weights)
    with pytest.raises(ValueError, match="mask_mode is 'drop'"):
        masked_cross_attention(class_token, tokens, MASK, heads=2, mask_mode="drop", **weights)
    with pytest.raises(ValueError, match="expected a divisor of the width 6"):
        masked_cross_attention(class_token, tokens, MASK, heads=4, **weights)
    with pytest.raises(ValueError, match="class_token has shape"):
        masked_cross_attention(class_token[:1], tokens, MASK, heads=2, **weights)
