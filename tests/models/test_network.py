import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fsr_fast import reference
from fsr_fast.errors import UserError
from fsr_fast.models import build_network
from fsr_fast.models.aggregator import pool_unmasked
from fsr_fast.models.backbone import create_vit
from fsr_fast.models.network import activate, classify, to_map
from fsr_fast.models.positions import resize_position_embedding
from fsr_fast.models.projector import Projector, unit_rows
from tests import helpers
from tests.helpers import CLASSES, DEPTH, WIDTH, N

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE)
ENCODER = NETWORK.encoder
IMAGES = torch.cat(helpers.views())
MASK = torch.zeros(4, N, dtype=torch.bool)
MASK[0, :5], MASK[1, 3:9], MASK[2] = True, True, True  # the third image is masked whole


def close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= relative * expected.abs().max())


def embed(images: torch.Tensor) -> torch.Tensor:
    return ENCODER.patch_embed["proj"](images).flatten(2).transpose(1, 2)


def all_outputs(output) -> dict[str, torch.Tensor]:
    names = ("class_logits", "aux_class_logits", "seg_logits", "patch_features", "aux_features", "class_token")
    return {name: getattr(output, name) for name in (*names, "cam", "aux_cam")}


# --- encoder


@torch.no_grad()
def test_the_trunk_is_timm_s_over_patch_tokens_alone():
    tokens = embed(IMAGES) + ENCODER.pos_embed[:, 1:]
    outputs = []
    for block in ENCODER.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    features = ENCODER(IMAGES)
    assert close(features.tokens, outputs[-1])
    assert close(features.aux, outputs[DEPTH - 3])
    assert features.grid == (4, 4)


def test_the_auxiliary_block_of_12_is_the_10th():
    options = {"embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
    network = helpers.network(helpers.config({"model": {"backbone_options": options}}))
    assert (network.encoder.depth, network.encoder.aux_block) == (12, 9)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (40, 24)])
def test_the_whole_network_is_that_of_the_reference(shape):
    images = F.interpolate(IMAGES, size=shape, mode="bilinear")
    actual, state = NETWORK(images), NETWORK.state_dict()
    expected = reference.forward_network(state, images, heads=2, patch_size=8)
    for name, value in all_outputs(actual).items():
        assert close(value, getattr(expected, name), 2e-5), name


@torch.no_grad()
@pytest.mark.parametrize("mode", ["exclude", "multiply", "none"])
def test_masked_passes_and_every_mask_mode_are_those_of_the_reference(mode):
    network = helpers.network(helpers.config({"model": {"mask_mode": mode}}))
    keep = network.encoder.draw_drop_path(4, helpers.generator())
    expected = reference.forward_network(
        network.state_dict(), IMAGES, heads=2, patch_size=8, mask=MASK, drop_path=keep, mask_mode=mode
    )
    features = network.encoder(IMAGES, MASK, keep)
    assert close(features.tokens, expected.trunk_tokens, 2e-5)
    assert close(network.encoder.aggregate(features.tokens, MASK), expected.class_token, 2e-5)


@torch.no_grad()
def test_masked_patches_are_replaced_before_their_position_is_added():
    changed = IMAGES.clone()
    changed[0, :, :8] = 7.0  # the first row of patches: 4 of the 5 masked ones
    actual, other = ENCODER(IMAGES[:1], MASK[:1]), ENCODER(changed[:1], MASK[:1])
    assert torch.equal(actual.tokens, other.tokens)
    tokens = torch.where(MASK[:1, :, None], ENCODER.mask_token, embed(IMAGES[:1])) + ENCODER.pos_embed[:, 1:]
    for block in ENCODER.blocks:
        tokens = block(tokens)
    assert close(actual.tokens, tokens)


# --- stochastic depth


def test_stochastic_depth_keeps_the_first_block_and_drops_the_last_at_the_given_rate():
    assert ENCODER.drop_rates == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1])
    keep = ENCODER.draw_drop_path(20_000, helpers.generator())
    assert keep.shape == (DEPTH, 2, 20_000)
    for block, rate in enumerate(ENCODER.drop_rates):
        values = set(keep[block].unique().tolist())
        assert values == {1.0} if rate == 0 else sorted(values) == pytest.approx([0.0, 1 / (1 - rate)])
        assert (keep[block] == 0).float().mean(1).tolist() == pytest.approx([rate, rate], abs=0.01)


def test_the_same_generator_draws_the_same_depths():
    first, second, third = (ENCODER.draw_drop_path(40, helpers.generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@torch.no_grad()
def test_a_dropped_block_is_skipped_and_a_kept_branch_is_scaled():
    keep = torch.ones(DEPTH, 2, 4)
    keep[2] = 0
    keep[3, 0], keep[3, 1] = 1.25, 0
    tokens = embed(IMAGES) + ENCODER.pos_embed[:, 1:]
    for block in (ENCODER.blocks[0], ENCODER.blocks[1]):
        tokens = block(tokens)
    last = ENCODER.blocks[3]
    expected = tokens + 1.25 * last.attn(last.norm1(tokens))
    assert close(ENCODER(IMAGES, drop_path=keep).tokens, expected)


@torch.no_grad()
def test_each_image_has_its_own_depth():
    keep = ENCODER.draw_drop_path(4, helpers.generator(1))
    keep[1:, :, 1] = 0
    together = ENCODER(IMAGES, drop_path=keep).tokens
    alone = torch.cat([ENCODER(IMAGES[i : i + 1], drop_path=keep[..., i : i + 1]).tokens for i in range(4)])
    assert close(together, alone)


# --- position embedding


def test_a_position_embedding_of_the_right_size_is_the_very_same():
    embedding = torch.randn(1, 1 + 16, 3)
    assert resize_position_embedding(embedding, (4, 4), (4, 4)) is embedding


def test_a_position_embedding_is_resized_bicubically_and_its_class_part_kept():
    embedding = torch.randn(1, 1 + 16, 3, generator=helpers.generator())
    resized = resize_position_embedding(embedding, (4, 4), (6, 3))
    assert resized.shape == (1, 1 + 18, 3)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    for channel in range(3):
        picture = embedding[0, 1:, channel].view(1, 1, 4, 4)
        expected = F.interpolate(picture, size=(6, 3), mode="bicubic", align_corners=False).flatten()
        assert torch.allclose(resized[0, 1:, channel], expected, atol=1e-6)


def test_a_size_that_an_inference_has_met_can_still_be_learned():
    embedding = torch.randn(1, 17, WIDTH).requires_grad_()
    with torch.inference_mode():
        resize_position_embedding(embedding, (4, 4), (5, 9))
    resize_position_embedding(embedding, (4, 4), (5, 9)).sum().backward()
    assert embedding.grad.isfinite().all()


@torch.no_grad()
def test_an_image_of_another_size_gets_positions_of_its_grid():
    images = F.interpolate(IMAGES, size=(16, 48), mode="bilinear")
    tokens = embed(images) + resize_position_embedding(ENCODER.pos_embed, (4, 4), (2, 6))[:, 1:]
    for block in ENCODER.blocks:
        tokens = block(tokens)
    features = ENCODER(images)
    assert features.grid == (2, 6)
    assert close(features.tokens, tokens)


def test_the_position_embedding_is_stored_for_the_training_views():
    network = build_network(RECIPE.model, CLASSES, 48)
    assert network.encoder.pos_embed.shape == (1, 1 + 36, WIDTH)
    assert network.encoder.grid == (6, 6)


# --- aggregator


@torch.no_grad()
@pytest.mark.parametrize(("mode", "reads"), [("exclude", False), ("none", True), ("multiply", True)])
def test_only_unmasked_patches_are_read_unless_the_mode_says_otherwise(mode, reads):
    encoder = helpers.network(helpers.config({"model": {"mask_mode": mode}})).encoder
    tokens = torch.randn(4, N, WIDTH, generator=helpers.generator())
    changed = torch.where(MASK[..., None], tokens + torch.randn(4, N, WIDTH, generator=helpers.generator(1)), tokens)
    same = torch.equal(encoder.aggregate(tokens, MASK), encoder.aggregate(changed, MASK))
    assert same is not reads
    assert not torch.equal(encoder.aggregate(tokens), encoder.aggregate(changed))


@pytest.mark.parametrize("mode", ["exclude", "multiply", "none"])
@pytest.mark.parametrize("aggregation", ["mca", "gap", "gmp"])
def test_an_image_masked_whole_gives_no_nan(aggregation, mode):
    encoder = helpers.network(helpers.config({"model": {"mask_mode": mode, "aggregation": aggregation}})).encoder
    tokens = torch.randn(4, N, WIDTH, generator=helpers.generator()).requires_grad_()
    class_token = encoder.aggregate(tokens, MASK)
    class_token.square().sum().backward()
    assert class_token.isfinite().all()
    assert tokens.grad.isfinite().all()


def test_pooling_reads_the_unmasked_patches():
    tokens = torch.randn(2, 5, 3, generator=helpers.generator())
    mask = torch.tensor([[True, False, False, True, False], [False, False, False, False, True]])
    kept = [tokens[image][~mask[image]] for image in range(2)]
    assert torch.allclose(pool_unmasked(tokens, mask, "gap"), torch.stack([part.mean(0) for part in kept]), atol=1e-6)
    assert torch.equal(pool_unmasked(tokens, mask, "gmp"), torch.stack([part.amax(0) for part in kept]))
    assert torch.allclose(pool_unmasked(tokens, None, "gap"), tokens.mean(1))
    assert torch.equal(pool_unmasked(tokens, None, "gmp"), tokens.amax(1))
    for pooling in ("gap", "gmp"):
        assert not pool_unmasked(tokens, torch.ones_like(mask), pooling).any()


@torch.no_grad()
@pytest.mark.parametrize("aggregation", ["gap", "gmp"])
def test_in_place_of_the_aggregator_the_normalised_patches_are_pooled(aggregation):
    encoder = helpers.network(helpers.config({"model": {"aggregation": aggregation}})).encoder
    tokens = torch.randn(4, N, WIDTH, generator=helpers.generator())
    expected = pool_unmasked(encoder.norm(tokens), MASK, aggregation)
    assert torch.equal(encoder.aggregate(tokens, MASK)[:2], expected[:2])
    assert not any(name.startswith(("cls_token", "cls_blocks")) for name, _ in encoder.named_parameters())


@torch.no_grad()
def test_the_attention_of_a_block_sums_to_1_over_the_unmasked_patches():
    block = ENCODER.cls_blocks[0]
    class_token, tokens = torch.randn(2, 4, WIDTH, generator=helpers.generator())[0], ENCODER(IMAGES).tokens
    updated, weights = block.attention(class_token, tokens, MASK)
    assert torch.allclose(updated, block(class_token, tokens, MASK), atol=1e-5)
    assert weights.shape == (4, 2, N)
    assert weights[[0, 1, 3]].sum(2).flatten().tolist() == pytest.approx([1.0] * 6)
    assert weights[0, :, :5].abs().max() == 0


# --- heads


def test_class_logits_are_those_of_the_maximum_of_each_feature():
    classifier = nn.Conv2d(5, 3, 1, bias=False)
    tokens = torch.randn(2, 6, 5, generator=helpers.generator())
    maximum = torch.tensor([[max(tokens[b, :, d].tolist()) for d in range(5)] for b in range(2)])
    assert torch.allclose(classify(tokens, classifier), maximum @ classifier.weight[:, :, 0, 0].T, atol=1e-6)


def test_activations_are_the_classifier_applied_to_the_feature_map():
    classifier = nn.Conv2d(5, 3, 1, bias=False)
    tokens = torch.randn(2, 6, 5, generator=helpers.generator())
    assert torch.allclose(activate(tokens, classifier, (2, 3)), classifier(to_map(tokens, (2, 3))), atol=1e-6)
    assert to_map(tokens, (2, 3))[1, 4, 1, 2] == tokens[1, 5, 4]


def test_the_decoder_is_two_dilated_convolutions_and_a_projection_without_biases():
    decoder = NETWORK.decoder
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.kernel_size, layer.dilation) for layer in layers] == [((3, 3), (5, 5))] * 2 + [((1, 1), (1, 1))]
    assert all(layer.bias is None for layer in layers)
    assert decoder.conv8.out_channels == len(CLASSES) + 1


def test_the_decoder_starts_from_kaiming_s_fan_out():
    torch.manual_seed(0)
    wide = build_network(helpers.config({"model": {"decoder_width": 256}}).model, CLASSES, 32).decoder
    assert wide.conv7.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    assert wide.conv6.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)


def test_bottleneck_vectors_have_length_1_and_are_those_of_the_reference():
    tokens = torch.randn(2, 5, WIDTH, generator=helpers.generator())
    actual = NETWORK.projector(tokens)
    assert actual.norm(dim=-1).flatten().tolist() == pytest.approx([1.0] * 10, abs=1e-5)
    assert close(actual, reference.project(NETWORK.state_dict(), tokens))


def test_vectors_projected_together_are_those_projected_alone():
    patches, token = torch.randn(2, 3, WIDTH, generator=helpers.generator(1)), torch.randn(2, WIDTH)
    for several in ((patches, token), (None, patches), (token, None), (None, None)):
        together = NETWORK.projector.project_together(*several)
        assert len(together) == 2
        for found, one in zip(together, several, strict=True):
            assert found is None if one is None else close(found, NETWORK.projector(one))


def test_rows_are_divided_by_their_length_and_gradients_follow():
    rows = torch.randn(2, 5, 7, dtype=torch.float64, generator=helpers.generator(2))
    rows[1, 3] = 0
    weight = torch.randn(2, 5, 7, dtype=torch.float64, generator=helpers.generator(3))
    outputs, gradients = [], []
    for function in (unit_rows, lambda given: F.normalize(given, dim=-1)):
        given = rows.clone().requires_grad_()
        outputs.append(function(given))
        (outputs[-1] * weight).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_half_precision_leaves_what_has_one_row_per_image_alone():
    class_token = torch.randn(4, WIDTH, generator=helpers.generator(4))
    block = ENCODER.cls_blocks[0]
    expected = block._add_mlp(class_token)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block._add_mlp(class_token), expected)


def test_the_projector_s_hidden_layers_start_from_a_small_normal():
    torch.manual_seed(0)
    projector = Projector(64, 256, 32, 128)
    for layer in (projector.mlp[0], projector.mlp[2], projector.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    assert torch.equal(projector.last_layer.weight_g, torch.ones(128, 1))


# --- construction


def test_parameters_carry_the_names_of_the_official_checkpoints():
    norm = {"weight", "bias"}
    block = {f"{part}.{kind}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for kind in norm}
    expected = {f"encoder.{name}" for name in ("cls_token", "pos_embed", "mask_token", "norm.weight", "norm.bias")}
    expected |= {f"encoder.patch_embed.proj.{kind}" for kind in norm}
    expected |= {f"encoder.blocks.{i}.{name}" for i in range(DEPTH) for name in block}
    expected |= {f"encoder.blocks.{i}.attn.qkv.{kind}" for i in range(DEPTH) for kind in norm}
    expected |= {f"encoder.cls_blocks.{j}.{name}" for j in range(2) for name in block}
    expected |= {f"encoder.cls_blocks.{j}.attn.{part}.{kind}" for j in range(2) for part in "qkv" for kind in norm}
    expected |= {f"decoder.conv{number}.weight" for number in (6, 7, 8)}
    expected |= {f"projector.mlp.{number}.{kind}" for number in (0, 2, 4) for kind in norm}
    expected |= {"projector.last_layer.weight_g", "projector.last_layer.weight_v"}
    expected |= {"top_classifier.weight", "aux_classifier.weight"}
    state = NETWORK.state_dict()
    assert set(state) == expected
    assert state["encoder.cls_token"].shape == (1, 1, WIDTH)
    assert state["encoder.mask_token"].shape == (1, WIDTH)
    assert state["top_classifier.weight"].shape == (len(CLASSES), WIDTH, 1, 1)


def test_every_parameter_is_initialised(monkeypatch):
    empty = torch.empty

    def poisoned(*arguments, **options):
        return empty(*arguments, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    network = build_network(RECIPE.model, CLASSES, 32)
    for name, value in network.state_dict().items():
        assert value.isfinite().all(), name


def test_the_class_token_and_the_norms_are_those_of_the_pretrained_transformer():
    torch.manual_seed(4)
    vit = create_vit(RECIPE.model)
    torch.manual_seed(4)
    encoder = build_network(RECIPE.model, CLASSES, 32).encoder
    assert torch.equal(encoder.cls_token, vit.cls_token)
    assert encoder.norm.eps == encoder.cls_blocks[0].norm1.eps == vit.norm.eps == 1e-6


@pytest.mark.parametrize("options", [{"init_values": 0.1}, {"qk_norm": True}])
@torch.no_grad()
def test_layer_scale_and_normalised_queries_are_computed_like_timm_does(options):
    recipe = helpers.config()
    options = recipe.model.backbone_options | options
    network = helpers.network(helpers.config({"model": {"backbone_options": options}}))
    tokens = network.encoder.patch_embed["proj"](IMAGES).flatten(2).transpose(1, 2) + network.encoder.pos_embed[:, 1:]
    for block in network.encoder.blocks:
        tokens = block(tokens)
    assert close(network.encoder(IMAGES).tokens, tokens)


@pytest.mark.parametrize(
    ("model", "size", "parts"),
    [
        ({"backbone": "vit_tinny_patch16_224"}, 32, ("model.backbone", "vit_tinny", "'vit_tiny_patch16_224'")),
        ({"backbone": "resnet50"}, 32, ("model.backbone", "'resnet50' is not a vision transformer of timm")),
        ({"backbone_options": {"depht": 3}}, 32, ("model.backbone_options", "depht")),
        ({"backbone_options": {"num_heads": 5}}, 32, ("model.backbone_options", "num_heads")),
        ({"backbone_options": {"patch_size": 0}}, 32, ("model.backbone_options", "patch_size")),
        ({"backbone_options": {"embed_dim": -64}}, 32, ("model.backbone_options", "embed_dim")),
        ({"backbone_options": {"depth": 0}}, 32, ("model.backbone_options", "depth of 0 is out of range")),
        ({"aux_block": 4}, 32, ("model.aux_block: 4", "has 4 blocks")),
        ({}, 36, ("data.image_size: 36", "multiple of the patch size 8")),
    ],
)
def test_a_network_that_cannot_be_is_refused_by_the_name_of_its_key(model, size, parts):
    if "backbone" in model:
        model = {**model, "backbone_options": {}}
    with pytest.raises(UserError) as caught:
        build_network(helpers.config({"model": model}).model, CLASSES, size)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"final_norm": False},
        {"attn_drop_rate": 0.1},
        {"proj_drop_rate": 0.1},
        {"drop_path_rate": 0.1},
    ],
)
def test_a_transformer_that_drops_at_random_or_has_no_final_norm_is_refused(options, monkeypatch):
    create = timm.create_model

    def build(name, **given):
        return create(name, **{**given, **options})

    monkeypatch.setattr(timm, "create_model", build)
    with pytest.raises(UserError, match=r"model\.backbone: .* cannot be the encoder: .*; the closest that can is"):
        create_vit(RECIPE.model)
