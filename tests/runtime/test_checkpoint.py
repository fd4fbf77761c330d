from pathlib import Path

import pytest
import torch

from fsr_fast import load_network
from fsr_fast.errors import UserError
from fsr_fast.models.build import restore_network
from fsr_fast.runtime.checkpoint import FORMAT, list_checkpoints, read_checkpoint, write_checkpoint
from tests import helpers

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE)


def state(iteration: int = 4, **changes) -> dict:
    return {
        "iteration": iteration,
        "config": RECIPE.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": NETWORK.state_dict(),
        **changes,
    }


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(tmp_path):
    path = write_checkpoint(tmp_path, state(12))
    assert path == tmp_path / "checkpoints" / "0000012.pt"
    found = read_checkpoint(path)
    assert (found["iteration"], found["classes"], found["format"]) == (12, list(helpers.CLASSES), FORMAT)
    assert found["config"] == state()["config"]
    assert all(torch.equal(found["student"][name], value) for name, value in state()["student"].items())


def test_the_newest_of_a_folder_is_read(tmp_path):
    for iteration in (9, 100, 10):
        write_checkpoint(tmp_path, state(iteration))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000009.pt", "0000010.pt", "0000100.pt"]
    assert read_checkpoint(tmp_path)["iteration"] == 100


def test_checkpoints_beyond_seven_digits_are_the_newest(tmp_path):
    for iteration in (9_999_999, 10_000_000):
        write_checkpoint(tmp_path, {"iteration": iteration})
    assert read_checkpoint(tmp_path)["iteration"] == 10_000_000


def test_a_write_that_fails_leaves_the_earlier_checkpoint_alone(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, state(4))

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, state(8))
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000004.pt"]
    assert read_checkpoint(tmp_path)["iteration"] == 4


def test_a_network_is_loaded_in_eval_mode_with_its_classes_and_gives_the_same_results(tmp_path):
    write_checkpoint(tmp_path, state())
    for path in (tmp_path, str(tmp_path / "checkpoints" / "0000004.pt")):
        network = load_network(path)
        assert not network.training
        assert network.classes == helpers.CLASSES
        images, _ = helpers.views()
        with torch.no_grad():
            assert torch.equal(network(images).seg_logits, NETWORK(images).seg_logits)


def test_a_network_is_loaded_without_the_weights_that_it_started_from(tmp_path):
    config = state()["config"]
    config["model"]["pretrained"] = str(tmp_path / "deleted.pth")
    write_checkpoint(tmp_path, state(config=config))
    assert load_network(tmp_path).classes == helpers.CLASSES


# --- wrong files


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "no such checkpoint; give a run folder or a .pt file" in refusal(tmp_path / "lost.pt")


def test_a_folder_without_checkpoints_is_named(tmp_path):
    message = refusal(tmp_path)
    assert "no checkpoint in this folder" in message
    assert "checkpoints/<iteration>.pt" in message


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_damaged_checkpoint_is_named(tmp_path, kept):
    path = write_checkpoint(tmp_path, state())
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a readable checkpoint" in refusal(path)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_code_inside_of_a_checkpoint_is_not_run(tmp_path):
    torch.save({"format": FORMAT, "iteration": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    assert "not a readable checkpoint" in refusal(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"format": "fsr_fast checkpoint 0"}, torch.zeros(2)])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    message = refusal(tmp_path / "other.pt")
    assert "not a checkpoint of a run" in message
    assert FORMAT in message


@pytest.mark.parametrize(
    ("model", "name"), [({"prototypes": 8}, "projector.last_layer"), ({"aggregator_blocks": 3}, "cls_blocks.2")]
)
def test_weights_of_another_shape_than_the_checkpoint_says_are_refused(model, name):
    config = helpers.config({"model": model}).model_dump(mode="json")
    with pytest.raises(UserError, match=r"somewhere\.pt: the weights do not fit the network") as caught:
        restore_network(state(config=config), "somewhere.pt")
    assert name in str(caught.value)


def test_a_checkpoint_with_a_configuration_out_of_range_is_named():
    config = state()["config"]
    config["mask"]["ratio"] = 3
    with pytest.raises(UserError, match=r"somewhere\.pt: mask\.ratio"):
        restore_network(state(config=config), "somewhere.pt")
