import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsr_fast.errors import UserError
from fsr_fast.models import build_network, pretrained
from fsr_fast.models.backbone import create_vit
from fsr_fast.models.positions import resize_position_embedding
from fsr_fast.models.pretrained import describe_start, load_pretrained
from tests import helpers
from tests.helpers import CLASSES


def model(**changes):
    return helpers.config({"model": changes}).model


def other_size(image_size: int) -> dict:
    return {**model().backbone_options, "img_size": image_size}


def weights(seed: int = 5, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return create_vit(model(**changes)).state_dict()


def save(path: Path, content) -> str:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    else:
        torch.save(content, path)
    return str(path)


def loaded(source: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    vit = create_vit(model())
    load_pretrained(vit, model(pretrained=source))
    return vit.state_dict()


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(source)
    return str(caught.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt"])
def test_a_local_file_fills_every_weight_of_the_encoder(tmp_path, name):
    expected = weights()
    actual = loaded(save(tmp_path / name, expected))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_the_network_starts_from_the_file(tmp_path):
    expected = weights()
    path = save(tmp_path / "weights.safetensors", expected)
    encoder = build_network(model(pretrained=path), CLASSES, 32).encoder
    assert torch.equal(encoder.blocks[3].mlp.fc2.weight, expected["blocks.3.mlp.fc2.weight"])
    assert torch.equal(encoder.cls_token, expected["cls_token"])
    assert torch.equal(encoder.norm.weight, expected["norm.weight"])
    assert torch.equal(encoder.pos_embed, expected["pos_embed"])


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_the_position_embedding_of_another_image_size_is_resized(tmp_path, name):
    expected = weights(backbone_options=other_size(48))
    assert expected["pos_embed"].shape == (1, 1 + 36, helpers.WIDTH)
    network = build_network(model(pretrained=save(tmp_path / name, expected)), CLASSES, 56)
    found = network.encoder.pos_embed
    assert torch.equal(found, resize_position_embedding(expected["pos_embed"], (6, 6), (7, 7))), "resized once"


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_inside_of_a_training_file_are_found(tmp_path, key):
    expected = weights()
    wrapped = {key: {f"module.{name}": value for name, value in expected.items()}, "epoch": 3}
    actual = loaded(save(tmp_path / "training.pth", wrapped))
    assert torch.equal(actual["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])


def test_weights_of_a_head_are_left_out(tmp_path):
    expected = weights()
    with_head = {**expected, "head.weight": torch.zeros(10, helpers.WIDTH), "head.bias": torch.zeros(10)}
    assert loaded(save(tmp_path / "weights.pth", with_head)).keys() == expected.keys()


def test_without_pretrained_weights_nothing_changes():
    torch.manual_seed(6)
    expected = create_vit(model()).state_dict()
    actual = loaded("none")
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_the_normalisation_is_that_of_the_weights_or_imagenet_s():
    own = build_network(model(), CLASSES, 32)
    imagenet = build_network(model(normalisation="imagenet"), CLASSES, 32)
    assert (own.mean, own.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- wrong files


def test_a_missing_file_is_named_with_what_is_expected(tmp_path):
    message = refusal(str(tmp_path / "lost.pth"))
    assert message.startswith(f"{tmp_path / 'lost.pth'}: no such weights file")
    assert ".safetensors or .pth" in message


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    whole = Path(save(tmp_path / f"whole{path.suffix}", weights()))
    path.write_bytes(whole.read_bytes()[:1000])
    assert refusal(str(path)).startswith(f"{path}: not a readable weights file")


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


def test_code_inside_of_a_file_is_not_run(tmp_path):
    torch.save({"weights": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    assert "not a readable weights file" in refusal(str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3)])
def test_a_file_of_something_else_is_named(tmp_path, content):
    message = refusal(save(tmp_path / "other.pth", content))
    assert f"{tmp_path / 'other.pth'}: expected a dictionary of tensors by parameter name" in message


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"depth": 3}, "'blocks.3.norm1.weight' is missing"),
        ({"depth": 5}, "'blocks.4.norm1.weight' has shape (32,), expected none"),
        ({"mlp_ratio": 2}, "'blocks.0.mlp.fc1.weight' has shape (64, 32), expected (128, 32)"),
        ({"embed_dim": 16}, "patches of 8 pixels and width 16"),
        ({"patch_size": 16}, "'patch_embed.proj.weight' has shape (32, 3, 16, 16), expected (32, 3, 8, 8)"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_first_that_differs(tmp_path, change, found):
    path = save(tmp_path / "other.pth", weights(backbone_options={**model().backbone_options, **change}))
    message = refusal(path)
    for part in ("model.pretrained", path, "vit_tiny_patch16_224", found, "name the backbone"):
        assert part in message


# --- hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A reachable hub that records its requests."""
    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append((address, timeout))

    def download(repository, name):
        asked.append((repository, name))
        return save(tmp_path / name, weights(seed=7))

    monkeypatch.setattr(pretrained, "get_session", Session)
    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *arguments: None)
    return asked


def test_the_hub_gives_the_file_of_the_tag(hub):
    expected = weights(seed=7)
    vit = create_vit(model(backbone="vit_tiny_patch16_224.augreg_in21k"))
    load_pretrained(vit, model(backbone="vit_tiny_patch16_224.augreg_in21k", pretrained="hub"))
    assert hub[-1] == ("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in expected.items())


def test_a_file_that_was_fetched_once_needs_no_hub(hub, monkeypatch, tmp_path):
    path = save(tmp_path / "model.safetensors", weights(seed=8))
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *arguments: path)
    assert torch.equal(loaded("hub")["cls_token"], weights(seed=8)["cls_token"])
    assert not hub


def test_a_hub_out_of_reach_is_asked_once_and_the_file_to_fetch_is_named(hub, monkeypatch):
    class Session:
        def head(self, address, timeout):
            hub.append((address, timeout))
            raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "get_session", Session)
    message = refusal("hub")
    ((address, patience),) = hub
    assert patience <= 5
    assert address.endswith("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors")
    for part in (address, "OSError", "--model.pretrained FILE.safetensors", "--model.pretrained none"):
        assert part in message


def test_a_backbone_without_weights_in_the_hub_says_where_they_are():
    config = model(backbone="vit_huge_patch14_gap_224.in1k_ijepa", pretrained="hub")
    with pytest.raises(UserError, match=r"hub has no weights of vit_huge.*IN1K-vit\.h\.14.*--model\.pretrained none"):
        describe_start(config)


# --- which weights they are


def test_start_weights_are_described_by_name_tag_file_digest_and_normalisation(tmp_path):
    path = Path(save(tmp_path / "weights.pth", weights()))
    start = describe_start(model(pretrained=str(path)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    half = (0.5, 0.5, 0.5)
    assert start == ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", str(path), digest, half, half)
    assert describe_start(model(pretrained="none")) is None
    assert describe_start(model(pretrained="hub", initial="run")) is None


def test_weights_of_the_hub_are_described_before_they_are_fetched(hub):
    start = describe_start(
        helpers.config(
            {
                "model": {"backbone": "vit_base_patch14_dinov2.lvd142m", "backbone_options": {}, "pretrained": "hub"},
                "data": {"image_size": 224},
            }
        ).model
    )
    assert start.file == "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors"
    assert start.sha256 is None
    assert start.mean == (0.485, 0.456, 0.406)
    assert not hub
