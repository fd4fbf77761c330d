import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fsr_fast.errors import UserError
from fsr_fast.models.backbone import create_vit
from fsr_fast.models.pretrained import load_pretrained, logger
from tests import helpers

from .families import model_values

State = dict[str, Tensor]


def build(family: str, seed: int, pretrained: str = "none"):
    """Return a small transformer of a family without constant weights, and its configuration."""
    torch.manual_seed(seed)
    config = helpers.config({"model": {**model_values(family), "pretrained": pretrained}}).model
    vit = create_vit(config)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit, config


def rename(state: State, *rules: tuple[str, str]) -> State:
    for pattern, new in rules:
        state = {re.sub(pattern, new, name): value for name, value in state.items()}
    return state


def split(state: State, names: tuple[str, str, str]) -> State:
    """Split every joint projection."""
    parts = {}
    for name, value in state.items():
        if ".qkv." in name:
            parts |= {name.replace("qkv", new): part for new, part in zip(names, value.chunk(3), strict=True)}
        else:
            parts[name] = value
    return parts


# --- how others write the same weights


def dino(state: State) -> object:
    teacher = {f"backbone.{name}": value for name, value in state.items()} | {"head.mlp.0.weight": torch.zeros(3, 32)}
    student = {f"module.{name}": torch.zeros_like(value) for name, value in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 100, "args": argparse.Namespace(arch="vit_small")}


def mae(state: State) -> object:
    return {"model": state | {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 16)}}


def official(state: State) -> object:
    return state | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}


def parallel(state: State) -> object:
    return {"state_dict": {f"module.backbone.{name}": value for name, value in state.items()}}


def dinov2(state: State) -> object:
    return state | {"mask_token": torch.zeros(1, 32)}


def with_registers(state: State) -> State:
    """Give the class token a position of its own, as the release has it, and the registers their name."""
    position = torch.full((1, 1, 32), 0.25)
    return rename(state, ("^reg_token$", "register_tokens")) | {
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], 1),
        "mask_token": torch.zeros(1, 32),
    }


def chunked(state: State) -> object:
    named = rename(with_registers(state), (r"^blocks\.(\d+)\.", r"blocks.0.\1."))
    return {"teacher": {f"backbone.{name}": value for name, value in named.items()}}


def deit3(state: State) -> object:
    return {"model": rename(state, (r"ls(\d)\.gamma", r"gamma_\1"))}


def dinov3(state: State) -> State:
    named = rename(state, (r"gamma_(\d)", r"ls\1.gamma"), ("^reg_token$", "storage_tokens"))
    empty = {name.replace("weight", "bias"): torch.zeros(96) for name in named if name.endswith("qkv.weight")}
    return named | empty | {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}


def eva02(state: State) -> object:
    named = rename(state, ("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"), ("mlp.norm", "mlp.ffn_ln"))
    named = rename(named, (r"q_proj\.bias", "q_bias"), (r"v_proj\.bias", "v_bias"))
    return {"module": named | {"mask_token": torch.zeros(1, 1, 32), "lm_head.weight": torch.zeros(4, 32)}}


def open_clip(state: State) -> object:
    named = rename(
        state,
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm", ".ln_"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"^blocks", "transformer.resblocks"),
    )
    named["class_embedding"] = named.pop("cls_token").flatten()
    named["positional_embedding"] = named.pop("pos_embed")[0]
    own = {f"visual.{name}": value for name, value in named.items()}
    text = {"transformer.resblocks.0.ln_1.weight": torch.zeros(8), "token_embedding.weight": torch.zeros(5, 8)}
    return own | text | {"visual.proj": torch.zeros(32, 16), "logit_scale": torch.tensor(1.0)}


TRANSFORMERS = (
    (r"^(cls_token|pos_embed|mask_token|register_tokens)", r"embeddings.\1"),
    (r"pos_embed", "position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^blocks", "encoder.layer"),
    (r"attn\.proj", "attention.output.dense"),
    (r"^norm\.", "layernorm."),
)
ATTENTION = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def transformers_vit(state: State) -> object:
    named = rename(
        split(state, ATTENTION),
        *TRANSFORMERS,
        (r"\.attn\.attention", ".attention"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )
    return {f"vit.{name}": value for name, value in named.items()} | {"classifier.weight": torch.zeros(2, 32)}


def transformers_dinov2(state: State) -> object:
    named = with_registers(state) if "reg_token" in state else state
    scale = (r"ls(\d)\.gamma", r"layer_scale\1.lambda1")
    gated = ((r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out"))
    doubled = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    rules = (*TRANSFORMERS, (r"\.attn\.attention", ".attention"), scale, *(gated if doubled else ()))
    return rename(split(named, ATTENTION), *rules)


def transformers_dinov2_since_5(state: State) -> object:
    """The names of transformers 5: projections as in DINOv3, separate gate and value."""
    named = split(state, ("q_proj", "k_proj", "v_proj"))
    for name in [name for name in named if ".mlp.fc1." in name]:
        gate, value = named.pop(name).chunk(2)
        named |= {name.replace("fc1", "gate_proj"): gate, name.replace("fc1", "up_proj"): value}
    rules = [rule for rule in TRANSFORMERS if "attn" not in rule[0]]
    rest = ((r"attn\.proj", "attention.o_proj"), (r"\.attn\.", ".attention."), (r"mlp\.fc2", "mlp.down_proj"))
    return rename(named, *rules, *rest, (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"))


def transformers_dinov3(state: State) -> object:
    named = split(dinov3(state), ("q_proj", "k_proj", "v_proj"))
    del named["rope_embed.periods"]
    named = {name: value for name, value in named.items() if "k_proj.bias" not in name}
    return rename(
        named,
        (r"^storage_tokens", "register_tokens"),
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^blocks", "layer"),
        (r"attn\.proj", "attention.o_proj"),
        (r"\.attn\.", ".attention."),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1_g", "mlp.gate_proj"),
        (r"mlp\.fc1(_x)?", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
    )


def transformers_clip(state: State) -> object:
    named = rename(
        split(state, ("q_proj", "k_proj", "v_proj")),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks", "encoder.layers"),
        (r"\.attn\.proj", ".self_attn.out_proj"),
        (r"\.attn\.", ".self_attn."),
        (r"\.norm(\d)", r".layer_norm\1"),
    )
    if "cls_token" in named:
        named["embeddings.class_embedding"] = named.pop("cls_token").flatten()
    named["embeddings.position_embedding.weight"] = named.pop("pos_embed")[0]
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(5, 8)}
    return {f"vision_model.{name}": value for name, value in named.items()} | text


FORMATS: list[tuple[Callable[[State], object], str]] = [
    (official, "plain"),
    (parallel, "plain"),
    (dino, "DINO"),
    (mae, "MAE"),
    (deit3, "DeiT-3"),
    (dinov2, "DINOv2"),
    (with_registers, "DINOv2, registers"),
    (chunked, "DINOv2, registers"),
    (dinov3, "DINOv3"),
    (eva02, "EVA-02, three projections"),
    (open_clip, "CLIP"),
    (transformers_vit, "plain"),
    (transformers_dinov2, "DINOv2"),
    (transformers_dinov2, "DINOv2, giant"),
    (transformers_dinov2, "DINOv2, registers"),
    (transformers_dinov2_since_5, "DINOv2, giant"),
    (transformers_dinov3, "DINOv3"),
    (transformers_dinov3, "DINOv3, gated"),
    (transformers_clip, "CLIP, QuickGELU"),
    (transformers_clip, "SigLIP"),
]


@pytest.mark.parametrize(("write", "family"), FORMATS)
def test_a_backbone_s_weights_are_read_in_every_format_by_their_keys(tmp_path, write, family):
    source, _ = build(family, 1)
    expected, path = source.state_dict(), tmp_path / "a file.bin"
    torch.save(write(dict(expected)), path)
    vit, config = build(family, 2, str(path))
    load_pretrained(vit, config)
    for name, value in vit.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_safetensors_file_of_transformers_is_read_alike(tmp_path):
    source, _ = build("DINOv2", 1)
    written = transformers_dinov2(dict(source.state_dict()))
    save_file({name: value.contiguous() for name, value in written.items()}, tmp_path / "model.safetensors")
    vit, config = build("DINOv2", 2, str(tmp_path / "model.safetensors"))
    load_pretrained(vit, config)
    torch.testing.assert_close(vit.state_dict(), source.state_dict())


def test_a_norm_behind_the_average_becomes_the_norm_of_the_patches(tmp_path):
    source, _ = build("EVA-02", 1)
    expected = dict(source.state_dict())
    torch.save(rename(expected, (r"^norm\.", "fc_norm.")), tmp_path / "tuned.pth")
    vit, config = build("EVA-02", 2, str(tmp_path / "tuned.pth"))
    load_pretrained(vit, config)
    assert torch.equal(vit.norm.weight, expected["norm.weight"])


# --- what does not fit


def refused(tmp_path: Path, content: object, family: str = "plain") -> str:
    torch.save(content, tmp_path / "other.pth")
    vit, config = build(family, 2, str(tmp_path / "other.pth"))
    with pytest.raises(UserError) as caught:
        load_pretrained(vit, config)
    return str(caught.value)


def test_tensors_of_no_known_format_are_refused_with_some_of_their_names(tmp_path):
    message = refused(tmp_path, {"conv.weight": torch.zeros(3), "fc.weight": torch.zeros(3)})
    assert "of no known format" in message
    assert "conv.weight, fc.weight" in message
    assert "patch_embed.proj.weight" in message


def test_a_missing_block_is_refused_with_a_table(tmp_path):
    state = dict(build("plain", 1)[0].state_dict())
    message = refused(tmp_path, {name: value for name, value in state.items() if not name.startswith("blocks.1.")})
    first, *table = message.splitlines()
    assert "'blocks.1.norm1.weight' is missing, expected (32,)" in first
    assert len(table) == 9
    assert "blocks.1.attn.qkv.weight" in table[2]
    assert table[-1] == "  and 4 more"


def test_biases_that_the_backbone_has_no_place_for_are_refused(tmp_path):
    state = dinov3(dict(build("DINOv3", 1)[0].state_dict()))
    state["blocks.1.attn.qkv.bias"][3] = 1.0
    assert "_qkvb" in refused(tmp_path, state, "DINOv3")


def test_a_whole_network_is_to_be_given_as_initial(tmp_path):
    network = helpers.network(helpers.config())
    assert "give it as model.initial" in refused(tmp_path, network.state_dict())


def test_parameters_that_are_left_out_are_named_as_a_warning_where_their_use_is_unknown(tmp_path, caplog):
    state = dict(build("plain", 1)[0].state_dict())
    torch.save(state | {"head.weight": torch.zeros(2, 32), "adapter.weight": torch.zeros(2)}, tmp_path / "more.pth")
    vit, config = build("plain", 2, str(tmp_path / "more.pth"))
    with caplog.at_level("INFO", logger=logger.name):
        load_pretrained(vit, config)
    (record,) = [one for one in caplog.records if one.name == logger.name]
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("unused, of no known purpose: adapter.weight")
