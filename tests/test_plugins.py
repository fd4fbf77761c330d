"""Losses, data sets and backbones from the user's own modules."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.export import main as export
from fsr_fast.commands.predict import main as predict
from fsr_fast.config import build_config, load_config
from fsr_fast.engine import build_step
from fsr_fast.errors import UserError
from fsr_fast.method.plugin_losses import LossInputs
from fsr_fast.method.schedules import schedule_at
from fsr_fast.models import build_network, load_network
from fsr_fast.plugins import BACKBONES, DATASETS, LOSSES, load_plugins
from fsr_fast.train import main as train
from tests import helpers
from tests.test_untrusted import stranger

PLUGIN = """
from pathlib import Path

import timm
import torch

from fsr_fast.dataloading.layout import FolderFiles, Split
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.plugins import register_backbone, register_dataset, register_loss

built = []


@register_loss("spread")
def spread(inputs):
    return inputs.patch_features.float().square().mean()


@register_loss("never")
def never(inputs):
    return None


@register_loss("unreduced")
def unreduced(inputs):
    return inputs.class_logits


@register_dataset("pairs")
def open_pairs(root, list_name, key, config):
    names = Names(Path(root, f"{list_name}.names").read_text().split())
    files = FolderFiles((root / "shots",), (root / "drawn",), classes=3)
    first = {"r": 0, "g": 1, "b": 2}
    return Split(root, names, ("red", "green", "blue"), files, lambda name: [first[name[0]]], Notes())


@register_backbone("thin_vit")
def build_thin(pretrained, width=32):
    built.append(pretrained)
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"num_classes": 0, "global_pool": "", "dynamic_img_size": True, "img_size": 32, "patch_size": 8},
        **{"embed_dim": width, "depth": 4, "num_heads": 2},
    )
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch, no_plugins) -> str:
    """Write a module where Python finds it."""
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine/__init__.py").touch()
    (tmp_path / "of_mine/method.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "of_mine.method"
    for name in [name for name in sys.modules if name.split(".")[0] == "of_mine"]:
        del sys.modules[name]


def forget() -> None:
    """Imitate a process that has imported no plug-in yet."""
    for registry in (LOSSES, DATASETS, BACKBONES):
        registry._found.clear()
    for name in ("of_mine.method", "of_mine"):
        del sys.modules[name]


def write_pairs(root: Path) -> Path:
    """Write the tiny data set in a layout that the package does not know."""
    helpers.write_dataset(root, train=3, val=3)
    (root / "shots").mkdir()
    (root / "drawn").mkdir()
    for number, letter in enumerate("rgbrgb"):
        name = f"{letter}{number}"
        Image.open(root / f"JPEGImages/picture_{number}.jpg").save(root / f"shots/{name}.png")
        (root / f"SegmentationClass/picture_{number}.png").rename(root / f"drawn/{name}.png")
    (root / "these.names").write_text("r0 g1 b2 r3")
    (root / "those.names").write_text("g4 b5")
    return root


def recipe(tmp_path: Path, plugin: str, **run: object) -> Path:
    values = helpers.values(
        {
            "run": {"plugins": [plugin], "log_every": 1, **run},
            "data": {"dataset": "pairs", "train_list": "these", "val_list": "those", "labels": "auto"},
            "loss": {"extra": {"spread": 0.5, "never": 1.0}},
            "optim": {"iterations": 2},
        },
        root=write_pairs(tmp_path / "data"),
        output=tmp_path / "run",
    )
    del values["data"]["classes"]
    values["model"] |= {"backbone": "thin_vit", "backbone_options": {"width": 16}, "pretrained": "hub"}
    return helpers.write_config(tmp_path / "recipe.yaml", values)


def test_a_run_takes_its_loss_its_data_set_and_its_backbone_from_a_plugin(tmp_path, plugin, capsys):
    train(["--config", str(recipe(tmp_path, plugin))])
    assert capsys.readouterr().out.endswith("PICTURES --run.plugins of_mine.method\n")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss/spread"] > 0 for line in lines if "loss/total" in line)
    assert all("loss/never" not in line for line in lines)
    scores = json.loads((tmp_path / "run/summary.json").read_text())["results"]["seg"]["classes"]
    assert list(scores) == ["background", "red", "green", "blue"]
    network = load_network(tmp_path / "run")
    assert (network.encoder.width, network.classes) == (16, ("red", "green", "blue"))
    assert sys.modules[plugin].built == [True, False], "pretrained weights are wanted at the start alone"


def test_what_was_trained_with_a_plugin_is_used_where_the_user_names_it_and_imports_nothing_by_itself(tmp_path, plugin):
    train(["--config", str(recipe(tmp_path, plugin))])
    forget()
    run, pictures = str(tmp_path / "run"), str(tmp_path / "data/shots/g4.png")
    verbs = {
        "predict": (predict, [pictures, "--checkpoint", run, "--output", str(tmp_path / "out")]),
        "evaluate": (evaluate, ["--checkpoint", run, "--output", str(tmp_path / "scores")]),
        "export": (export, ["--checkpoint", run, "--output", str(tmp_path / "network")]),
    }
    for main, arguments in verbs.values():
        with pytest.raises(
            UserError, match=r"'thin_vit' is not .* --run\.plugins names its module.*used \['of_mine\.method'"
        ):
            main(arguments)
        assert plugin not in sys.modules
    for main, arguments in verbs.values():
        main([*arguments, "--run.plugins", plugin])
    assert (tmp_path / "out/masks/g4.png").is_file()
    assert (tmp_path / "scores/metrics.json").is_file()
    forget()
    predict([*verbs["predict"][1], "--config", str(tmp_path / "recipe.yaml")])  # a recipe is the user's word, too
    forget()
    with pytest.raises(UserError, match=r"'thin_vit' is no"):
        load_network(tmp_path / "network")
    load_plugins([plugin])
    assert load_network(tmp_path / "network").encoder.width == 16


def test_a_network_whose_training_alone_used_plugins_needs_none(tmp_path, plugin):
    run = stranger(tmp_path / "run", {"run": {"plugins": [plugin]}, "loss": {"extra": {"spread": 0.5}}})
    assert load_network(run).classes == helpers.CLASSES
    assert plugin not in sys.modules


def test_the_loss_of_a_plugin_counts_by_its_weight(plugin):
    load_plugins([plugin])

    def total(**extra: float) -> torch.Tensor:
        config = helpers.config({"loss": {"extra": extra}, "model": {"stochastic_depth": 0.0}})
        step = helpers.step(config).double()
        views = tuple(view.double() for view in helpers.views())
        draws = step.draw(2, helpers.generator())
        with helpers.float64():
            output = step(views, helpers.labels().double(), draws, schedule_at(config, 0))
        assert ("spread" in output.losses) == (extra["spread"] > 0)
        if extra["spread"] > 0:
            seen.append(output.losses["spread"])
        return output.loss

    seen: list[torch.Tensor] = []
    without, single, triple = total(spread=0.0), total(spread=1.0), total(spread=3.0)
    torch.testing.assert_close(single, without + seen[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(triple, without + 3 * seen[0], rtol=1e-9, atol=0)


def test_the_loss_of_a_plugin_gets_what_the_step_knows_of_view_1(no_plugins):
    known: list[LossInputs] = []
    LOSSES.register("look")(lambda inputs: known.append(inputs))
    config = helpers.config({"loss": {"extra": {"look": 1.0}, "segmentation_start": 1}})
    step, views, labels = helpers.step(config), helpers.views(), helpers.labels()
    outputs = [
        step(views, labels, step.draw(2, helpers.generator()), schedule_at(config, iteration)) for iteration in (0, 1)
    ]
    before, after = known
    assert (before.seg_logits, before.cams, before.pseudo_labels) == (None, None, None)
    for inputs in known:
        assert torch.equal(inputs.images, views[0])
        assert torch.equal(inputs.labels, labels)
    assert torch.equal(after.pseudo_labels, outputs[1].pseudo_labels)
    assert torch.equal(after.cams.values, outputs[1].cams.values)
    assert all(one.requires_grad for one in (after.class_logits, after.patch_features, after.seg_logits))
    assert not after.cams.values.requires_grad


def test_a_backbone_of_a_plugin_without_mean_and_deviation_takes_imagenet_s(plugin):
    load_plugins([plugin])
    made = sys.modules[plugin].build_thin(pretrained=False)
    made.pretrained_cfg = {}
    BACKBONES.register("bare")(lambda pretrained: made)
    model = helpers.config().model.model_copy(update={"backbone": "bare", "backbone_options": {}})
    network = build_network(model, helpers.CLASSES, 32)
    assert (network.mean, network.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


# --- mistakes


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    return str(caught.value)


def test_an_unknown_name_lists_what_is_registered(plugin):
    named = ("--run.plugins", plugin)
    hint = "(a plug-in's is known once --run.plugins names its module)"
    message = refusal(*named, "--loss.extra", "xyz=1")
    assert f"loss.extra: unknown loss 'xyz' {hint}; known are: never, spread, unreduced" in message
    message = refusal(*named, "--data.dataset", "pears", "--data.root", "x")
    assert f"data.dataset: unknown data set 'pears' {hint}; did you mean 'pairs'?" in message
    config = build_config(helpers.values({"model": {"backbone": "thin_vat", "backbone_options": {}}}), "the test")
    with pytest.raises(UserError, match=r"'thin_vat' is not .*; did you mean 'thin_vit'"):
        build_network(config.model, helpers.CLASSES, 32)


def test_without_its_plugin_a_name_says_how_to_bring_it(no_plugins):
    assert refusal("--loss.extra", "spread=1").endswith("is known once --run.plugins names its module)")
    assert "is known once --run.plugins names its module); did you mean 'coco'?" in refusal(
        "--data.dataset", "mycoco", "--data.root", "x"
    )


def test_a_loss_of_the_method_is_no_loss_of_a_plugin():
    assert "loss.extra: unknown loss 'affinity'" in refusal("--loss.extra", "affinity=1")


def test_a_name_cannot_be_registered_twice(tmp_path, plugin):
    load_plugins([plugin])
    (tmp_path / "of_mine/again.py").write_text(
        "from fsr_fast.plugins import register_loss\n\n\n@register_loss('spread')\ndef other(inputs):\n    pass\n"
    )
    with pytest.raises(
        UserError,
        match=r"of_mine\.again: of_mine\.again\.other: the loss 'spread' is registered already, "
        r"by of_mine\.method\.spread; rename one",
    ):
        load_plugins(["of_mine.again"])
    assert LOSSES["spread"] is sys.modules[plugin].spread


@pytest.mark.parametrize(("registry", "name"), [(LOSSES, "affinity"), (DATASETS, "voc")])
def test_the_package_s_own_names_cannot_be_taken(plugin, registry, name):
    with pytest.raises(UserError, match=f"fsr_fast itself has a .* {name!r}; choose another name"):
        registry.register(name)(refusal)
    assert name not in registry


def test_a_backbone_with_a_name_of_timm_is_refused(plugin):
    BACKBONES.register("vit_tiny_patch16_224")(lambda **_: pytest.fail("built"))
    with pytest.raises(UserError, match="'vit_tiny_patch16_224' is a plug-in's and timm's"):
        helpers.network(helpers.config())


def test_a_backbone_that_the_encoder_cannot_take_over_says_why(plugin):
    BACKBONES.register("flat")(lambda pretrained: torch.nn.Flatten())
    with pytest.raises(UserError, match="flat, of a plug-in, cannot be the encoder: its patches or its blocks are of"):
        build_network(
            helpers.config().model.model_copy(update={"backbone": "flat", "backbone_options": {}}), ("a",), 32
        )


def test_a_plugin_that_fails_names_file_and_line(tmp_path, plugin):
    (tmp_path / "of_mine/broken.py").write_text("import torch\n\nlosses = torch.no_such_thing\n")
    message = refusal("--run.plugins", "of_mine.broken")
    assert "run.plugins: of_mine.broken cannot be imported: " in message
    assert f"{tmp_path}/of_mine/broken.py, line 3: AttributeError" in message
    (tmp_path / "of_mine/poor.py").write_text("import a_package_that_is_not_there\n")
    assert "of_mine/poor.py, line 1: ModuleNotFoundError" in refusal("--run.plugins", "of_mine.poor")


@pytest.mark.parametrize("name", ["of_mine.nothing", "of_yours.method"])
def test_a_plugin_that_is_not_there_says_where_python_looks(plugin, name):
    assert f"there is no module '{name}'; install its package, or put the folder" in refusal("--run.plugins", name)


@pytest.mark.parametrize("name", ["my_losses.py", "../mine", ".mine", "a b"])
def test_a_path_is_no_module(name):
    with pytest.raises(UserError, match=r"is not a module name; expected one such as"):
        load_plugins([name])


def test_a_loss_that_is_no_scalar_is_refused(plugin):
    load_plugins([plugin])
    config = helpers.config({"loss": {"extra": {"unreduced": 1.0}}})
    step = helpers.step(config)
    with pytest.raises(UserError, match=r"unreduced returned a tensor of shape \(2, 3\); expected a scalar"):
        step(helpers.views(), helpers.labels(), step.draw(2, helpers.generator()), schedule_at(config, 0))


def test_the_reference_refuses_losses_that_it_does_not_know(plugin):
    load_plugins([plugin])
    config = helpers.config({"run": {"engine": "reference"}, "loss": {"extra": {"spread": 1.0}}})
    with pytest.raises(UserError, match=r"loss\.extra: the reference only has the paper's losses"):
        build_step(helpers.network(config), config, 2)
