"""One way to open a trained network: network, configuration and iteration, however it is stored."""

from pathlib import Path

import pytest
import torch

from fsr_fast.commands import export
from fsr_fast.errors import UserError
from fsr_fast.models.build import open_trained
from fsr_fast.options import Given
from fsr_fast.runtime.checkpoint import write_checkpoint
from tests import helpers, official

RECIPE = helpers.config({"evaluate": {"threshold": 0.4}, "loss": {"segmentation_start": 0}})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    state = {"iteration": 7, "config": RECIPE.model_dump(mode="json"), "classes": list(helpers.CLASSES)}
    write_checkpoint(folder, {**state, "student": helpers.network(RECIPE).state_dict()})
    return folder


def options(**values: str) -> dict[str, Given]:
    return {name.replace("__", "."): Given(f"--{name}", value) for name, value in values.items()}


def test_a_checkpoint_is_read_once(run, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, *rest, **more: read.append(path) or load(path, *rest, **more))
    trained = open_trained(run, with_data=True)
    assert len(read) == 1
    open_trained(run / "checkpoints/0000007.pt")
    assert len(read) == 2
    assert (trained.iteration, trained.named, trained.network.classes) == (7, True, helpers.CLASSES)
    assert trained.config == RECIPE


def test_the_command_line_goes_before_the_recipe_and_the_recipe_before_the_checkpoint(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("evaluate: {threshold: 0.3, flip: false}\noptim: {iterations: 99}\ndata: {val_list: other}\n")
    config = open_trained(run, options(evaluate__threshold="0.2"), recipe).config
    assert (config.evaluate.threshold, config.evaluate.flip, config.data.val_list) == (0.2, False, "other")
    assert config.evaluate.scales == RECIPE.evaluate.scales
    assert config.optim == RECIPE.optim  # the training is over


def test_a_value_out_of_range_is_refused_before_the_checkpoint_is_read(tmp_path):
    with pytest.raises(UserError, match="--evaluate__threshold: input should be less than or equal to 1, not 7"):
        open_trained(tmp_path / "nothing", options(evaluate__threshold="7"))


def test_what_does_not_say_its_data_needs_a_recipe_where_data_are_opened(run, tmp_path):
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "exported")])
    file = official.write_official(tmp_path / "student.pth")
    for path, named in ((tmp_path / "exported", True), (file, False)):
        with pytest.raises(UserError, match="does not name its data set; add the recipe"):
            open_trained(path, with_data=True)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("data: {root: here, subset: [cat]}\n")
        trained = open_trained(path, {}, recipe, with_data=True)
        assert (trained.config.data.dataset, trained.config.data.subset) == ("voc", ("cat",))
        assert (trained.iteration, trained.named) == (None, named)
        assert open_trained(path).config.evaluate.threshold == 0.5


def test_an_address_in_a_checkpoint_is_opened_only_where_somebody_gives_it(tmp_path):
    address = "memory://shards"
    recipe = helpers.config({"data": {"dataset": "shards", "root": address}})
    state = {"iteration": 7, "config": recipe.model_dump(mode="json"), "classes": list(helpers.CLASSES)}
    write_checkpoint(tmp_path, {**state, "student": helpers.network(recipe).state_dict()})
    with pytest.raises(UserError, match=r"names the address 'memory://shards'.* by --root"):
        open_trained(tmp_path, with_data=True)
    assert open_trained(tmp_path, options(data__root=address), with_data=True).config.data.root == address
    assert open_trained(tmp_path).network.classes == helpers.CLASSES
