from functools import partial

import pytest
import timm
import torch
from torch import Tensor

from fsr_fast import reference
from fsr_fast.errors import UserError
from fsr_fast.evaluation.portable import PortableNetwork, export_program
from fsr_fast.method.reference_step import reference_settings
from fsr_fast.models import build_network
from fsr_fast.models.backbone import create_vit, position_entries
from fsr_fast.models.block import run_block
from fsr_fast.models.encoder import Encoder
from fsr_fast.models.positions import resize_position_embedding
from fsr_fast.models.work import TrunkPass
from tests import helpers
from tests.helpers import CLASSES
from tests.rounding import skip_if_intercepted

from .families import FAMILIES, SMALL, WITH_REGISTERS, WITHOUT_PREFIX, model_values

SIZES = [(32, 32), (24, 56)]
every_family = pytest.mark.parametrize("family", FAMILIES)


def config(family: str, **changes):
    return helpers.config({"model": {"aux_block": 0, **model_values(family), **changes}})


def keep(family: str) -> str:
    return "drop" if family in WITHOUT_PREFIX else "keep"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=helpers.generator(seed), dtype=torch.float64)


def random_vit(family: str):
    """Return the transformer without constant weights, float64."""
    torch.manual_seed(0)
    vit = create_vit(config(family).model).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def timm_features(vit, family: str, images: Tensor) -> Tensor:
    """What timm makes of images with the same weights; positions resized as the encoder resizes them."""
    pooling = "token" if "distilled" in FAMILIES[family] else ""
    oracle = timm.create_model(FAMILIES[family], num_classes=0, global_pool=pooling, dynamic_img_size=True, **SMALL)
    oracle = oracle.double().eval()
    oracle.load_state_dict(vit.state_dict())
    grid, own = (images.shape[2] // 8, images.shape[3] // 8), (4, 4)
    if oracle.pos_embed is not None:
        count, positions = position_entries(oracle), oracle.pos_embed.data
        patches = resize_position_embedding(torch.cat([positions[:, :1], positions[:, count:]], 1), own, grid)[:, 1:]
        oracle.pos_embed.data = torch.cat([positions[:, :count], patches], 1)
        oracle.patch_embed.grid_size = grid
    if getattr(oracle, "rope", None) is not None:  # timm rounds sines and cosines to float32
        oracle.rope.get_embed = partial(oracle.rope.get_embed, dtype=torch.float64)
    return oracle.forward_features(images)[:, oracle.num_prefix_tokens :]


# --- the trunk is timm's


@torch.no_grad()
@every_family
@pytest.mark.parametrize("size", SIZES)
def test_with_its_own_tokens_kept_a_backbone_gives_the_features_that_timm_gives(family, size):
    vit, images = random_vit(family), draw(1, 2, 3, *size)
    expected = timm_features(vit, family, images)
    encoder = Encoder(vit, config(family, prefix_tokens=keep(family)).model, 32).double()
    alone = encoder(images)
    packed = encoder.forward_packed([draw(2, 1, 3, 16, 40), images, draw(3, 3, 3, 32, 16)])[1]
    for features in (alone, packed):
        assert features.grid == (size[0] // 8, size[1] // 8)
        torch.testing.assert_close(encoder.norm(features.tokens), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("prefix", ["drop", "keep"])
def test_a_backbone_s_network_is_that_of_the_reference(family, prefix):
    prefix = "drop" if family in WITHOUT_PREFIX else prefix
    recipe = config(family, prefix_tokens=prefix)
    network = helpers.network(recipe).double()
    settings = reference_settings(recipe, network)
    mask = torch.rand(2, 4 * 6, generator=helpers.generator()) < 0.4
    depth = network.encoder.draw_drop_path(2, helpers.generator()).double()
    images = draw(4, 2, 3, 32, 48)
    features = network.encoder(images, mask, depth)
    expected = reference.forward_network(network.state_dict(), images, mask=mask, drop_path=depth, **settings.network)
    found = network.encoder.aggregate(features.tokens, mask)
    torch.testing.assert_close(features.tokens, expected.trunk_tokens, rtol=0, atol=1e-9)
    torch.testing.assert_close(features.aux.transpose(1, 2).unflatten(2, (4, 6)), expected.aux_features)
    torch.testing.assert_close(found, expected.class_token, rtol=0, atol=1e-9)


@every_family
def test_a_compiled_backbone_is_that_of_the_reference_too(family):
    recipe = config(family)
    network = helpers.network(recipe)
    before = reference_settings(recipe, network)
    network.encoder.compile_blocks()
    assert reference_settings(recipe, network) == before


@every_family
def test_checkpointed_blocks_of_a_backbone_give_the_same_gradients(family):
    encoder = helpers.network(config(family)).encoder.double()
    gradients = []
    for encoder.checkpointing in (False, True):
        encoder.zero_grad()
        encoder(draw(5, 2, 3, 32, 32)).tokens.square().sum().backward()
        gradients.append({name: value.grad for name, value in encoder.blocks.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@torch.no_grad()
@every_family
def test_float8_rounds_every_linear_layer_of_a_backbone(family, monkeypatch):
    encoder, rounded = helpers.network(config(family)).encoder, []

    def exact(inputs, weight, bias=None):
        rounded.append(weight.shape)
        return inputs @ weight.T if bias is None else inputs @ weight.T + bias

    images = helpers.views()[0]
    expected = encoder.forward_packed([images])[0].tokens
    monkeypatch.setattr("fsr_fast.models.float8.linear_float8", exact)
    found = encoder.forward_packed([images], float8=True)[0].tokens
    torch.testing.assert_close(found, expected)
    layers = [layer.weight.shape for layer in encoder.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert sorted(rounded) == sorted(layers)


@pytest.mark.parametrize("family", ["plain", "DINOv2, registers", "EVA-02", "DINOv3, gated"])
def test_the_work_of_a_pass_counts_every_matrix_of_a_backbone_and_its_own_tokens(family):
    encoder = helpers.network(config(family, prefix_tokens="keep")).encoder
    layers = [layer.weight.numel() for layer in encoder.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    patches, tokens = 16, 16 + encoder.prefix
    expected = 2 * tokens * sum(layers) + 2 * (4 * tokens**2 * 32) + 2 * patches * 3 * 8**2 * 32
    assert encoder.shape.flops([TrunkPass(((1, tokens),), 2, gradient=False)]) == expected
    assert encoder.shape.work([TrunkPass(((3, tokens),), 2, gradient=True)], images=3).units == 3


# --- class and register tokens


@every_family
def test_class_and_register_tokens_are_kept_by_default_where_a_backbone_has_registers(family):
    encoder = helpers.network(config(family)).encoder
    assert (encoder.prefix > 0) == (family in WITH_REGISTERS)
    assert ("prefix_tokens" in encoder.state_dict()) == (family in WITH_REGISTERS)


@torch.no_grad()
def test_dropped_tokens_of_a_backbone_have_no_part_in_its_features():
    vit = random_vit("DINOv2, registers")
    images = draw(6, 1, 3, 32, 32)
    dropped, kept = (
        Encoder(vit, config("DINOv2, registers", prefix_tokens=prefix).model, 32).double()
        for prefix in ("drop", "keep")
    )
    plain = dropped.patch_embed["proj"](images).flatten(2).transpose(1, 2) + dropped.pos_embed[:, 1:]
    for block in vit.blocks:
        plain = block(plain)
    torch.testing.assert_close(dropped(images).tokens, plain, rtol=0, atol=1e-9)
    assert not torch.allclose(kept(images).tokens, plain, atol=1e-3)


def test_a_backbone_without_tokens_of_its_own_cannot_keep_them():
    with pytest.raises(UserError, match=r"model\.prefix_tokens: vit_base_patch16_siglip.* no class or register token"):
        build_network(config("SigLIP", prefix_tokens="keep").model, CLASSES, 32)


# --- other programs


@torch.no_grad()
@pytest.mark.parametrize("family", ["DINOv3", "EVA-02"])
def test_a_backbone_with_rotary_positions_is_exported_for_pictures_of_any_size(family):
    network = helpers.network(config(family)).eval()
    program = export_program(network).module()
    for batch, height, width in ((1, 32, 32), (3, 45, 61)):
        images = torch.rand(batch, 3, height, width, generator=helpers.generator(height))
        expected, found = PortableNetwork(network)(images)[0], program(images)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_compiled_block_of_a_backbone_is_one_program():
    skip_if_intercepted()
    encoder = helpers.network(config("DINOv3")).encoder
    expected = encoder(helpers.views()[0]).tokens
    encoder._run_block = torch.compile(run_block, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(encoder(helpers.views()[0]).tokens, expected)


# --- what is refused


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("deit_bas_patch16_224", ("not a vision transformer of timm", "'deit_base_patch16_224'")),
        ("resnet50", ("'resnet50' is not a vision transformer of timm", "vit_base_patch16_224")),
        ("beit_base_patch16_224", ("'beit_base_patch16_224'", "vit_base_patch16_224")),
        ("vit_base_patch16_224.orig", ("no weights 'orig'", "orig_in21k_ft_in1k", "augreg2_in21k_ft_in1k", "mae")),
        ("vit_small_patch16_36x1_224.nothing", ("no weights 'nothing'", "known are: none")),
        ("vit_large_patch14_xp_224", ("blocks are not pre-norm attention", "vit_large_patch16_224")),
        ("vit_base_patch16_rope_mixed_224", ("rotary positions are learned", "vit_base_patch16_224")),
        ("vit_pe_core_tiny_patch16_384", ("rotary positions are shifted", "vit_tiny_patch16_224")),
    ],
)
def test_a_backbone_that_cannot_be_the_encoder_is_refused_with_the_reason_and_the_nearest(backbone, parts):
    with pytest.raises(UserError) as caught:
        create_vit(
            helpers.config(
                {"model": {"backbone": backbone, "backbone_options": {"depth": 1}}, "data": {"image_size": 224}}
            ).model
        )
    for part in ("model.backbone", *parts):
        assert part in str(caught.value)
