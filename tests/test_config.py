import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from fsr_fast.config import CONFIG_FOLDER, SECTIONS, Config, build_config, dump_config, load_config, read_yaml
from fsr_fast.errors import UserError
from fsr_fast.train import main
from tests import helpers

RECIPES = sorted(CONFIG_FOLDER.glob("*.yaml"))


def load(*arguments: str) -> Config:
    return load_config(arguments)[0]


def recipe(name: str) -> Config:
    return load("--config", str(CONFIG_FOLDER / f"{name}.yaml"))


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    return str(caught.value)


def refusal_of_file(path: Path, text: str) -> str:
    path.write_text(text)
    message = refusal("--config", str(path))
    assert str(path) in message
    return message


# --- recipes


def test_all_recipes_are_there():
    names = {path.stem for path in RECIPES}
    paper = {"voc_vit_b", "coco_vit_b", "voc_official", "coco_official"}
    assert names == paper | {
        "synthetic",
        "voc_animals",
        "own",
        "own_small",
        "voc_dinov2_b",
        "voc_dinov3_b",
        "voc_dinov2_s_animals",
        "voc_official_bf16",
    }


@pytest.mark.parametrize("name", ["voc_vit_b", "coco_vit_b", "voc_official", "coco_official", "own"])
def test_recipes_of_paper_and_official_code_start_from_the_official_code_s_weights(name):
    assert recipe(name).model.backbone == "vit_base_patch16_224.orig_in21k_ft_in1k"
    assert recipe(name).model.pretrained == "hub"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_its_own_run_folder(path):
    assert load("--config", str(path)).run.output == Path("runs") / path.stem


def test_without_a_recipe_the_embedded_data_set_is_trained():
    assert load().data.dataset == "synthetic"
    assert load() == recipe("synthetic")


def test_the_paper_s_recipe_has_the_paper_s_values():
    config = recipe("voc_vit_b")
    assert (config.data.image_size, config.augment.crop_scale, config.augment.flip) == (448, (0.32, 1.0), 0.5)
    assert (config.model.stochastic_depth, config.model.prototypes, config.cam.scales) == (0.1, 4096, (1.0, 0.5, 1.5))
    assert (config.mask.strategy, config.mask.ratio, config.mask.low, config.mask.high) == ("uncertain", 0.4, 0.2, 0.7)
    assert (config.pseudo_label.high, config.pseudo_label.low, config.pseudo_label.iterations) == (0.7, 0.25, 10)
    assert config.pseudo_label.dilations == (1, 2, 4, 8, 12, 24)
    loss = config.loss
    assert (loss.classification, loss.affinity, loss.segmentation) == (1.0, 0.2, 0.1)
    assert (loss.uncertain, loss.class_token, loss.segmentation_start) == (0.1, 0.1, 2000)
    teacher = config.teacher
    assert (teacher.student_temperature, teacher.temperature, teacher.temperature_fraction) == (
        0.1,
        (0.04, 0.07),
        0.125,
    )
    optim = config.optim
    assert (optim.iterations, optim.batch_size, optim.learning_rate, optim.head_factor) == (20_000, 8, 6e-5, 10.0)
    assert (optim.weight_decay, optim.betas, optim.warmup, optim.warmup_factor) == (0.05, (0.9, 0.999), 1500, 0.1)
    assert optim.clip_norm is None
    assert (config.evaluate.scales, config.evaluate.threshold) == ((1.0, 1.25, 1.5), 0.5)


DIFFERENCES = {
    ("mask", "source"): ("top", "aux"),
    ("mask", "multi_scale"): (False, True),
    ("mask", "block"): (1, 4),
    ("mask", "random_fraction"): (0.0, 0.2),
    ("model", "mask_mode"): ("exclude", "none"),
    ("model", "normalisation"): ("checkpoint", "imagenet"),
    ("teacher", "encoder_momentum"): (0.0, 0.9995),
    ("teacher", "projector_momentum"): (0.996, 0.9995),
    ("teacher", "stochastic_depth"): ("never", "always"),
    ("loss", "energy"): (0.0, 0.03),
    ("loss", "normalise"): ("global", "process"),
    ("run", "seed_per_rank"): (True, False),
    ("run", "amp"): ("auto", "off"),
    ("run", "output"): (Path("runs/voc_vit_b"), Path("runs/voc_official")),
}


def test_the_official_recipe_differs_from_the_paper_s_in_these_points_alone():
    paper, official = recipe("voc_vit_b"), recipe("voc_official")
    found = {}
    for section in Config.model_fields:
        for key in type(getattr(paper, section)).model_fields:
            pair = (getattr(getattr(paper, section), key), getattr(getattr(official, section), key))
            if pair[0] != pair[1]:
                found[section, key] = pair
    assert found == DIFFERENCES


@pytest.mark.parametrize("kind", ["vit_b", "official"])
def test_coco_s_recipes_are_those_of_voc_with_coco_s_data_and_lengths(kind):
    voc, coco = recipe(f"voc_{kind}"), recipe(f"coco_{kind}")
    assert (coco.mask, coco.teacher, coco.model) == (voc.mask, voc.teacher, voc.model)
    assert coco.loss == voc.loss.model_copy(update={"affinity_start": 12_000, "segmentation_start": 8_000})
    assert (coco.optim.iterations, coco.evaluate.threshold, coco.data.dataset) == (80_000, 0.45, "coco")
    assert (voc.pseudo_label.high, coco.pseudo_label.high) == (0.7, 0.65)


@pytest.mark.parametrize(("old", "new"), [(False, "shared"), (True, "always"), ("never", "never")])
def test_stochastic_depth_as_version_0_1_0_wrote_it_means_what_it_meant(tmp_path, old, new):
    path = helpers.write_config(tmp_path / "recipe.yaml", helpers.values({"teacher": {"stochastic_depth": old}}))
    assert load("--config", str(path)).teacher.stochastic_depth == new
    assert load("--config", str(path), "--teacher.stochastic_depth", str(old)).teacher.stochastic_depth == new


# --- layers


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {root: here}\noptim: {iterations: 3000, batch_size: 6}\n")
    config = load("--config", str(path), "--optim.batch_size", "2", "--cam.scales", "1.0,2.0")
    assert (config.optim.iterations, config.optim.batch_size, config.optim.warmup) == (3000, 2, 1500)
    assert config.cam.scales == (1.0, 2.0)


def test_a_recipe_is_laid_over_its_base_key_by_key(tmp_path):
    (tmp_path / "below.yaml").write_text("data: {root: here, workers: 3}\nmask: {ratio: 0.1}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\ndata: {workers: 5}\n")
    config = load("--config", str(tmp_path / "above.yaml"))
    assert (config.data.root, config.data.workers, config.mask.ratio) == (Path("here"), 5, 0.1)


def test_no_environment_variable_changes_a_run(monkeypatch):
    before = load()
    monkeypatch.setenv("MASK", '{"ratio": 0.1}')
    monkeypatch.setenv("mask__ratio", "0.1")
    assert load() == before


def test_a_configuration_is_fixed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load().optim.iterations = 3


def test_what_is_dumped_is_read_back_the_same(tmp_path):
    config = recipe("voc_animals")
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load("--config", str(tmp_path / "resolved.yaml")) == config


def test_print_config_prints_every_resolved_value_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--print-config", "--mask.ratio", "0.25"])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert load("--config", str(tmp_path / "printed.yaml")) == load("--mask.ratio", "0.25")
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_help_shows_every_field_with_its_description(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help", "all")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, field in Config.model_fields.items():
        (kind,) = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        assert issubclass(kind, BaseModel)
        for key, inner in kind.model_fields.items():
            assert f"--{section}.{key}" in text
            assert inner.description, f"{section}.{key} is not described"
            assert " ".join(inner.description.split()[:3]) in text


# --- what is refused


def test_an_unknown_key_of_a_file_is_named_with_the_nearest_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert "unknown key 'optim.iteratons'; did you mean 'iterations'?" in refusal_of_file(path, "optim: {iteratons: 3}")
    assert "unknown key 'optimm'; did you mean 'optim'?" in refusal_of_file(path, "optimm: {iterations: 3}")


def test_an_unknown_option_is_named_with_the_nearest_one():
    message = refusal("--optim.iteration", "3")
    assert message == "command line: unknown option '--optim.iteration'; did you mean '--optim.iterations'?"
    assert "unknown option '--mask.ratioo'" in refusal("--mask.ratioo=0.3")


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("mask.ratio", "1.5", "less than 1"),
        ("mask.strategy", "certain", "'uncertain', 'random', 'cam_strict' or 'edge_strict'"),
        ("optim.iterations", "0", "greater than or equal to 1"),
        ("optim.batch_size", "many", "valid integer"),
        ("optim.learning_rate", "-1", "greater than 0"),
        ("loss.affinity", "nan", "finite number"),
        ("optim.learning_rate", "inf", "finite number"),
        ("run.amp", "fp16", "'off' or 'bf16'"),
        ("data.image_size", "8", "greater than or equal to 32"),
        ("teacher.encoder_momentum", "1.1", "less than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key_and_the_range(tmp_path, key, value, expectation):
    on_command_line = refusal(f"--{key}", value)
    assert on_command_line.startswith(f"command line: --{key}: ")
    section, name = key.split(".")
    in_file = refusal_of_file(tmp_path / "recipe.yaml", f"{section}: {{{name}: {value}}}")
    assert f"recipe.yaml: {key}: " in in_file
    for message in (on_command_line, in_file):
        assert expectation in message
        assert value.strip("-") in message


def test_a_moment_that_never_moves_is_refused():
    assert (
        refusal("--optim.betas", "[0.9,1.0]") == "command line: --optim.betas.1: input should be less than 1, not 1.0"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mask: {low: 0.8}", ("mask.low", "0.8 is not below high: 0.7", "lower --mask.low or raise --mask.high")),
        ("pseudo_label: {low: 0.9}", ("pseudo_label.low", "0.9 is not below high: 0.7", "raise --pseudo_label.high")),
        (
            "optim: {iterations: 100}",
            ("optim.warmup", "1500 is not below iterations: 100", "or raise --optim.iterations"),
        ),
        ("augment: {crop_scale: [0.9, 0.3]}", ("augment.crop_scale", "0.9 to 0.3", "0 < smallest <= largest")),
        ("cam: {scales: [0.5, 1.0]}", ("cam.scales", "the first is 0.5", "must be 1.0")),
        ("cam: {scales: []}", ("cam.scales", "at least 1")),
        ("data: {dataset: voc}", ("data.root", "missing", "--data.root FOLDER")),
    ],
)
def test_values_that_contradict_each_other_are_named(tmp_path, text, parts):
    message = refusal_of_file(tmp_path / "recipe.yaml", text if "data:" in text else f"data: {{root: here}}\n{text}")
    for part in parts:
        assert part in message


def test_several_mistakes_are_told_at_once(tmp_path):
    message = refusal_of_file(tmp_path / "recipe.yaml", "mask: {ratio: 2, blok: 1}\nrun: {seed: -1}\ndata: {root: x}")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("data: [1,", "not valid YAML"),
        ("- run", "expected a mapping of sections"),
        ("1: 2", "expected a mapping of sections"),
        ("optim: 3", "optim: input should be a valid dictionary"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, part):
    assert part in refusal_of_file(tmp_path / "recipe.yaml", text)


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("--config", "coco_official", "--data.root", "d") == load(
        "--config", str(CONFIG_FOLDER / "coco_official.yaml"), "--data.root", "d"
    )
    (tmp_path / "synthetic").write_text("data: {dataset: synthetic}\nmask: {ratio: 0.125}\n")
    assert load("--config", "synthetic").mask.ratio == 0.125


def test_a_base_is_a_file_beside_or_a_recipe_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: voc_animals\nmask: {ratio: 0.125}\n")
    config = load("--config", str(tmp_path / "mine.yaml"))
    assert (config.mask.ratio, config.data.subset) == (0.125, recipe("voc_animals").data.subset)
    (tmp_path / "voc_animals").write_text("data: {dataset: synthetic}\n")
    assert load("--config", str(tmp_path / "mine.yaml")).data.dataset == "synthetic"


def test_a_missing_file_is_named_with_the_recipes_that_there_are(tmp_path):
    message = refusal("--config", str(tmp_path / "none.yaml"))
    assert "none.yaml: no such configuration" in message
    assert "voc_vit_b" in message


def test_a_missing_base_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: lost.yaml\n")
    assert f"{tmp_path / 'lost.yaml'}: no such configuration" in refusal("--config", str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("base: other.yaml\n")
    message = refusal_of_file(tmp_path / "other.yaml", "base: one.yaml\n")
    assert "base" in message


@pytest.mark.parametrize("arguments", [["--mask", "ratio"], ["--optim.iterations"], ["stray"]])
def test_a_malformed_command_line_is_explained(arguments):
    message = refusal(*arguments)
    assert message.startswith("command line: ")
    assert arguments[0] in message


def test_a_configuration_of_a_checkpoint_is_checked_like_a_file():
    values = read_yaml(CONFIG_FOLDER / "synthetic.yaml")
    values["mask"] = {"ratio": 7}
    with pytest.raises(UserError, match=r"old\.pt: mask\.ratio: .*less than 1.*7"):
        build_config(values, "old.pt")


BOMBS = {
    "references": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    + "optim: *a11\n",
    "a reference to itself": "optim: &a {betas: *a}\n",
    "depth": "optim: " + "[" * 20_000,
    "a long number": f"optim: {{iterations: {'9' * 5000}}}\n",
}


@pytest.mark.fuzz
@pytest.mark.parametrize("case", BOMBS)
def test_a_recipe_that_would_fill_the_memory_is_one_short_error(tmp_path, case):
    message = refusal_of_file(tmp_path / "bomb.yaml", BOMBS[case])
    assert "bomb.yaml: " in message
    assert len(message) < 6000


# --- what others rely on


def keys_of_the_configuration() -> str:
    """Return name, type, range and default of every key, one line each."""
    lines = []
    for section, model in SECTIONS.items():
        for key, schema in model.model_json_schema()["properties"].items():
            kept = {name: value for name, value in schema.items() if name not in ("title", "description")}
            lines.append(f"{section}.{key} {json.dumps(kept, sort_keys=True)}\n")
    return "".join(lines)


def test_a_change_of_a_key_its_type_range_or_default_is_a_decision():
    """Decided? `python -m tests.test_config > tests/configuration_keys.txt`: old runs and recipes rely on them."""
    recorded = (Path(__file__).parent / "configuration_keys.txt").read_text()
    assert keys_of_the_configuration().splitlines() == recorded.splitlines()


@pytest.mark.parametrize("word", ["none", "None", "null", "NULL"])
@pytest.mark.parametrize(
    "key",
    ["optim.clip_norm", "data.val_list", "data.subset", "evaluate.limit", "data.root", "augment.policy"],
)
def test_nothing_is_one_word_on_the_command_line_and_in_files(tmp_path, key, word):
    section, name = key.split(".")
    (tmp_path / "recipe.yaml").write_text(f"base: synthetic\n{section}: {{{name}: {word}}}\n")
    expected = "none" if key == "augment.policy" else None
    for config in (load(f"--{key}", word), load("--config", str(tmp_path / "recipe.yaml"))):
        assert getattr(getattr(config, section), name) == expected


def test_a_file_without_quotes_says_off_and_none_as_the_command_line_does(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "base: synthetic\nrun: {amp: off}\nmodel: {pretrained: null, mask_mode: None}\n"
    )
    config = load("--config", str(tmp_path / "recipe.yaml"))
    assert (config.run.amp, config.model.pretrained, config.model.mask_mode) == ("off", "none", "none")


def test_lists_take_commas_and_spaces_alike():
    for words in (["1", "1.5"], ["1,1.5"], ["1,", "1.5"], ["[1, 1.5]"]):
        assert load("--evaluate.scales", *words).evaluate.scales == (1.0, 1.5)
    for words in (["cat", "potted plant"], ["cat,potted plant"], ['["cat", "potted plant"]']):
        assert load("--data.classes", *words).data.classes == ("cat", "potted plant")
    for words in (["depth=3", "init_values=0.1"], ["depth=3,init_values=0.1"], ["{depth: 3, init_values: 0.1}"]):
        options = recipe("synthetic").model.backbone_options | {"depth": 3, "init_values": 0.1}
        assert load("--model.backbone_options", *words).model.backbone_options == options


def test_an_image_size_that_the_patches_do_not_divide_is_refused_before_the_network_is_built():
    message = refusal("--data.image_size", "100", "--print-config")
    assert "data.image_size: 100 is not a multiple of the patch size 8" in message
    assert message.endswith("the nearest that fits: --data.image_size 96")


def test_a_value_of_several_forms_is_refused_once():
    assert refusal("--run.compile", "maybe") == "command line: --run.compile: expected auto, true, false, not maybe"


if __name__ == "__main__":
    print(keys_of_the_configuration(), end="")
