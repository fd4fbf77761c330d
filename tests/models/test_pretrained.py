from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fsr_fast.errors import UserError
from fsr_fast.models import build_network
from fsr_fast.models.encoder import create_vit, resize_position_embedding
from fsr_fast.models.pretrained import load_pretrained
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


def loaded(pretrained: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    vit = create_vit(model())
    load_pretrained(vit, model(pretrained=pretrained))
    return vit.state_dict()


def refusal(pretrained: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(pretrained)
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
    pretrained = save(tmp_path / "weights.safetensors", expected)
    encoder = build_network(model(pretrained=pretrained), CLASSES, 32).encoder
    assert torch.equal(encoder.blocks[3].mlp.fc2.weight, expected["blocks.3.mlp.fc2.weight"])
    assert torch.equal(encoder.cls_token, expected["cls_token"])
    assert torch.equal(encoder.norm.weight, expected["norm.weight"])
    assert torch.equal(encoder.pos_embed, expected["pos_embed"])


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_the_position_embedding_of_another_image_size_is_resized(tmp_path, name):
    expected = weights(backbone_options=other_size(48))
    actual = loaded(save(tmp_path / name, expected))
    assert expected["pos_embed"].shape == (1, 1 + 36, helpers.WIDTH)
    assert torch.equal(actual["pos_embed"], resize_position_embedding(expected["pos_embed"], (6, 6), (4, 4)))


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
        ({"embed_dim": 16}, "'cls_token' has shape (1, 1, 16), expected (1, 1, 32)"),
        ({"patch_size": 16}, "'patch_embed.proj.weight' has shape (32, 3, 16, 16), expected (32, 3, 8, 8)"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_first_that_differs(tmp_path, change, found):
    path = save(tmp_path / "other.pth", weights(backbone_options={**model().backbone_options, **change}))
    message = refusal(path)
    for part in ("model.pretrained", path, "vit_tiny_patch16_224", found, "name the backbone"):
        assert part in message


# --- hub


def test_the_hub_gives_weights_for_the_very_architecture(monkeypatch):
    torch.manual_seed(7)
    from_hub = create_vit(model())
    expected, asked = from_hub.state_dict(), []
    create = timm.create_model

    def fetch(name, pretrained=False, **options):
        asked.append((name, pretrained, options.get("depth")))
        return from_hub if pretrained else create(name, **options)

    monkeypatch.setattr(timm, "create_model", fetch)
    actual = loaded("hub")
    assert ("vit_tiny_patch16_224", True, helpers.DEPTH) in asked
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no weights"), ValueError("offline")])
def test_without_the_hub_the_error_names_both_ways_out(monkeypatch, error):
    create = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    message = refusal("hub")
    for part in ("vit_tiny_patch16_224", "hub", "--model.pretrained FILE.safetensors", "--model.pretrained none"):
        assert part in message
