import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsr_fast.reference import forward_network, merge_cams, multi_scale_cams, project, prototype_logits
from fsr_fast.reference.network import decode

D, HEADS, DEPTH, PATCH, C, K = 12, 3, 4, 4, 3, 10


def draw_state(seed: int = 0) -> dict[str, Tensor]:
    shapes = {
        "encoder.cls_token": (1, 1, D),
        "encoder.pos_embed": (1, 1 + 9, D),
        "encoder.mask_token": (1, D),
        "encoder.patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "encoder.patch_embed.proj.bias": (D,),
        "encoder.norm.weight": (D,),
        "encoder.norm.bias": (D,),
        "decoder.conv6.weight": (8, D, 3, 3),
        "decoder.conv7.weight": (8, 8, 3, 3),
        "decoder.conv8.weight": (C + 1, 8, 1, 1),
        "projector.last_layer.weight_v": (K, 5),
        "top_classifier.weight": (C, D, 1, 1),
        "aux_classifier.weight": (C, D, 1, 1),
    }
    layers = {f"projector.mlp.{i}": sizes for i, sizes in ((0, (7, D)), (2, (7, 7)), (4, (5, 7)))}
    for name, parts in [(f"encoder.blocks.{i}", {"qkv": 3 * D}) for i in range(DEPTH)] + [
        (f"encoder.cls_blocks.{j}", {"q": D, "k": D, "v": D}) for j in range(2)
    ]:
        shapes |= {f"{name}.{norm}.{kind}": (D,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        layers |= {f"{name}.attn.{part}": (rows, D) for part, rows in parts.items()}
        layers |= {f"{name}.attn.proj": (D, D), f"{name}.mlp.fc1": (4 * D, D), f"{name}.mlp.fc2": (D, 4 * D)}
    for name, sizes in layers.items():
        shapes |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5).requires_grad_()
        for key, shape in shapes.items()
    }


def draw_images(B: int = 2, H: int = 3 * PATCH, W: int = 3 * PATCH, seed: int = 1) -> Tensor:
    return torch.randn(B, 3, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STATE = draw_state()
MASK = torch.tensor([[True, False, False, True, False, True, False, False, False], [False] * 9])


def test_outputs_have_the_shapes_of_a_grid_that_is_not_square():
    output = forward_network(STATE, draw_images(2, 5 * PATCH, 7 * PATCH), heads=HEADS, patch_size=PATCH)
    shapes = {name: tuple(value.shape) for name, value in output._asdict().items()}
    assert shapes == {
        "trunk_tokens": (2, 35, D),
        "patch_tokens": (2, 35, D),
        "class_token": (2, D),
        "patch_features": (2, D, 5, 7),
        "aux_features": (2, D, 5, 7),
        "class_logits": (2, C),
        "aux_class_logits": (2, C),
        "seg_logits": (2, C + 1, 5, 7),
        "cam": (2, C, 5, 7),
        "aux_cam": (2, C, 5, 7),
    }
    assert torch.equal(output.patch_features[:, :, 2, 3], output.patch_tokens[:, 2 * 7 + 3])


def test_a_block_is_a_pre_norm_transformer_layer():
    layer = nn.TransformerEncoderLayer(
        D, HEADS, 4 * D, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    tokens = embed(STATE, draw_images())
    for i in range(DEPTH):
        block = {key: STATE[f"encoder.blocks.{i}.{key}"] for key in BLOCK_KEYS}
        layer.load_state_dict({BLOCK_KEYS[key]: value.detach() for key, value in block.items()})
        tokens = layer(tokens)
    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH)
    torch.testing.assert_close(output.trunk_tokens, tokens, rtol=1e-10, atol=1e-10)


BLOCK_KEYS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.qkv.weight": "self_attn.in_proj_weight",
    "attn.qkv.bias": "self_attn.in_proj_bias",
    "attn.proj.weight": "self_attn.out_proj.weight",
    "attn.proj.bias": "self_attn.out_proj.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "linear1.weight",
    "mlp.fc1.bias": "linear1.bias",
    "mlp.fc2.weight": "linear2.weight",
    "mlp.fc2.bias": "linear2.bias",
}


def embed(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Patch by patch, on the stored grid."""
    kernel, bias = state["encoder.patch_embed.proj.weight"].flatten(1), state["encoder.patch_embed.proj.bias"]
    tokens = []
    for y in range(0, images.shape[2], PATCH):
        for x in range(0, images.shape[3], PATCH):
            tokens.append(images[:, :, y : y + PATCH, x : x + PATCH].flatten(1) @ kernel.T + bias)
    return torch.stack(tokens, dim=1) + state["encoder.pos_embed"][:, 1:]


def test_dropped_branches_leave_the_embedded_tokens():
    keep = torch.zeros(DEPTH, 2, 2, dtype=torch.float64)
    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH, drop_path=keep)
    torch.testing.assert_close(output.trunk_tokens, embed(STATE, draw_images()), rtol=1e-12, atol=1e-12)


def test_keep_factors_scale_one_branch_of_one_image():
    def run(factor: float) -> Tensor:
        keep = torch.zeros(DEPTH, 2, 2, dtype=torch.float64)
        keep[1, 1, 0] = factor
        return forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH, drop_path=keep).trunk_tokens

    nothing, once, twice = run(0.0), run(1.0), run(2.0)
    torch.testing.assert_close(twice - nothing, 2 * (once - nothing), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(once[0], nothing[0])
    assert torch.equal(once[1], nothing[1])


def test_aux_features_leave_the_trunk_two_blocks_before_its_end():
    keep = torch.ones(DEPTH, 2, 2, dtype=torch.float64)
    keep[-2:] = 0
    shortened = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH, drop_path=keep)
    whole = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH)
    assert torch.equal(shortened.aux_features, whole.aux_features)
    torch.testing.assert_close(shortened.aux_features.flatten(2).transpose(1, 2), shortened.trunk_tokens)
    assert not torch.allclose(whole.aux_features.flatten(2).transpose(1, 2), whole.trunk_tokens)


def test_nothing_is_seen_of_masked_patches():
    images = draw_images()
    other = images.clone()
    other[0, :, :PATCH, :PATCH] += 5.0  # patch 0 of image 0 is masked
    masked = [forward_network(STATE, x, heads=HEADS, patch_size=PATCH, mask=MASK).patch_tokens for x in (images, other)]
    assert torch.equal(*masked)
    seen = [forward_network(STATE, x, heads=HEADS, patch_size=PATCH).patch_tokens for x in (images, other)]
    assert not torch.allclose(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_the_mask_token_takes_the_place_of_the_embedding_before_the_position():
    keep = torch.zeros(DEPTH, 2, 2, dtype=torch.float64)
    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH, mask=MASK, drop_path=keep)
    expected = (STATE["encoder.mask_token"] + STATE["encoder.pos_embed"][0, 1:])[MASK[0]]
    torch.testing.assert_close(output.trunk_tokens[0, MASK[0]], expected, rtol=1e-12, atol=1e-12)


def test_the_aggregator_reads_by_its_mask_mode():
    def read(mask: Tensor | None, mode: str) -> Tensor:
        return forward_network(
            STATE, draw_images(), heads=HEADS, patch_size=PATCH, mask=mask, mask_mode=mode
        ).class_token

    exclude, multiply, none = (read(MASK, mode) for mode in ("exclude", "multiply", "none"))
    assert not torch.allclose(exclude[0], multiply[0])
    assert not torch.allclose(exclude[0], none[0])
    torch.testing.assert_close(exclude[1], none[1], rtol=1e-10, atol=1e-10)  # image 1 has no masked patch


def test_the_class_token_goes_through_pre_norm_cross_attention_blocks_and_the_final_norm():
    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, (D,), STATE[f"{name}.weight"], STATE[f"{name}.bias"], 1e-6)

    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH, mask=MASK)
    attention = nn.MultiheadAttention(D, HEADS, batch_first=True, dtype=torch.float64)
    token = STATE["encoder.cls_token"].expand(2, 1, D)
    for j in range(2):
        name = f"encoder.cls_blocks.{j}"
        block = {kind: [STATE[f"{name}.attn.{part}.{kind}"] for part in "qkv"] for kind in ("weight", "bias")}
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat(block["weight"]).detach(),
                "in_proj_bias": torch.cat(block["bias"]).detach(),
                "out_proj.weight": STATE[f"{name}.attn.proj.weight"].detach(),
                "out_proj.bias": STATE[f"{name}.attn.proj.bias"].detach(),
            }
        )
        tokens = norm(f"{name}.norm1", output.trunk_tokens)
        token = token + attention(norm(f"{name}.norm1", token), tokens, tokens, key_padding_mask=MASK)[0]
        hidden = F.gelu(
            norm(f"{name}.norm2", token) @ STATE[f"{name}.mlp.fc1.weight"].T + STATE[f"{name}.mlp.fc1.bias"]
        )
        token = token + hidden @ STATE[f"{name}.mlp.fc2.weight"].T + STATE[f"{name}.mlp.fc2.bias"]
    torch.testing.assert_close(output.class_token, norm("encoder.norm", token)[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.patch_tokens, norm("encoder.norm", output.trunk_tokens), rtol=1e-10, atol=1e-10)


def test_the_decoder_reads_every_fifth_pixel_twice_over():
    ones = {f"decoder.{name}.weight": torch.ones(1, 1, size, size) for name, size in DECODER}
    features = torch.zeros(1, 1, 25, 25)
    features[0, 0, 12, 12] = 1.0
    reach = torch.zeros(25)
    reach[2:23:5] = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])  # [1 1 1] convolved with itself, 5 pixels apart
    torch.testing.assert_close(decode(ones, features)[0, 0], reach[:, None] * reach[None, :])
    assert torch.count_nonzero(decode(ones, -features)) == 0  # rectified once
    assert torch.count_nonzero(decode(ones | {"decoder.conv7.weight": -torch.ones(1, 1, 3, 3)}, features)) == 0  # twice


DECODER = (("conv6", 3), ("conv7", 3), ("conv8", 1))


def test_classifier_projects_the_maximum_of_every_feature():
    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH)
    for features, logits, name in (
        (output.patch_features, output.class_logits, "top_classifier.weight"),
        (output.aux_features, output.aux_class_logits, "aux_classifier.weight"),
    ):
        maxima = torch.stack([torch.stack([features[b, d].max() for d in range(D)]) for b in range(2)])
        torch.testing.assert_close(logits, maxima @ STATE[name].flatten(1).T, rtol=1e-12, atol=1e-12)


def test_projector_gives_unit_vectors_and_prototypes_have_unit_length():
    bottleneck = project(STATE, torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(bottleneck.norm(dim=2), torch.ones(2, 4, dtype=torch.float64))
    direction = STATE["projector.last_layer.weight_v"]
    cosine = F.cosine_similarity(bottleneck[:, :, None], direction[None, None], dim=3)
    torch.testing.assert_close(prototype_logits(STATE, bottleneck), cosine)


def test_every_weight_gets_a_gradient():
    state = draw_state()
    output = forward_network(
        state, draw_images(H=2 * PATCH, W=4 * PATCH), heads=HEADS, patch_size=PATCH, mask=MASK[:, 1:]
    )
    total = output.class_logits.sum() + output.aux_class_logits.sum() + output.seg_logits.square().sum()
    total = total + prototype_logits(state, project(state, output.class_token)).square().sum()
    total.backward()
    without = [key for key, weight in state.items() if weight.grad is None or torch.count_nonzero(weight.grad) == 0]
    assert without == []


def test_single_precision_stays_near_double():
    output = forward_network(STATE, draw_images(), heads=HEADS, patch_size=PATCH)
    state = {key: value.float() for key, value in STATE.items()}
    single = forward_network(state, draw_images().float(), heads=HEADS, patch_size=PATCH)
    for name, value in single._asdict().items():
        assert value.dtype == torch.float32
        assert (value - getattr(output, name)).abs().max() < 1e-4 * getattr(output, name).abs().max(), name


def test_positions_are_resized_to_the_grid():
    state = dict(STATE) | {"encoder.pos_embed": torch.full((1, 10, D), 0.5, dtype=torch.float64)}
    keep = torch.zeros(DEPTH, 2, 2, dtype=torch.float64)
    mask = torch.ones(2, 35, dtype=torch.bool)
    output = forward_network(
        state, draw_images(H=5 * PATCH, W=7 * PATCH), heads=HEADS, patch_size=PATCH, mask=mask, drop_path=keep
    )
    expected = (state["encoder.mask_token"] + 0.5).expand(2, 35, -1)
    torch.testing.assert_close(output.trunk_tokens, expected, rtol=1e-12, atol=1e-12)


def test_multi_scale_maps_are_those_of_the_resized_image_and_of_its_mirror():
    images = draw_images(H=4 * PATCH, W=6 * PATCH)
    result = multi_scale_cams(STATE, images, heads=HEADS, patch_size=PATCH, scales=(1.0, 0.5))
    assert [tuple(cam.shape[2:]) for cam in result.cams] == [(4, 6), (2, 3)]
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False)
    for maps, aux_maps, view in (
        (result.cams[1], result.aux_cams[1], small),
        (result.flipped[1], result.aux_flipped[1], small.flip(3)),
    ):
        output = forward_network(STATE, view, heads=HEADS, patch_size=PATCH)
        torch.testing.assert_close(maps, output.cam, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(aux_maps, output.aux_cam, rtol=1e-10, atol=1e-10)
    merged = merge_cams(result.cams, result.flipped, torch.ones(2, C), max_classes=C, size=(16, 24))
    assert merged.values.shape == (2, C, 16, 24)


def test_multi_scale_maps_of_a_mirrored_image_change_places():
    images = draw_images()
    arguments = {"heads": HEADS, "patch_size": PATCH, "scales": (1.0,)}
    plain, mirrored = (multi_scale_cams(STATE, x, **arguments) for x in (images, images.flip(3)))
    torch.testing.assert_close(plain.cams[0], mirrored.flipped[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain.flipped[0], mirrored.cams[0], rtol=1e-10, atol=1e-10)


def test_a_shallow_trunk_and_an_odd_position_embedding_are_refused():
    shallow = {key: value for key, value in STATE.items() if "blocks.2." not in key and "blocks.3." not in key}
    with pytest.raises(ValueError, match="expected enough of them for aux_block -3"):
        forward_network(shallow, draw_images(), heads=HEADS, patch_size=PATCH)
    odd = dict(STATE) | {"encoder.pos_embed": torch.zeros(1, 9, D, dtype=torch.float64)}
    with pytest.raises(ValueError, match="expected a square grid"):
        forward_network(odd, draw_images(), heads=HEADS, patch_size=PATCH)
