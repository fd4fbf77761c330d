"""The ablation command: which runs it makes, what it does not repeat, and the table that it writes."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from fsr_fast.commands import ablate
from fsr_fast.commands.ablate import TABLES, row_config
from fsr_fast.config import CONFIG_FOLDER, Config, load_config
from fsr_fast.errors import UserError
from fsr_fast.reporting.tracking import write_json
from fsr_fast.runtime.run_folder import open_run_folder
from tests import helpers


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = helpers.values({"optim": {"iterations": 2, "warmup": 0}}, root=tmp_path / "data", output=tmp_path / "run")
    return helpers.write_config(tmp_path / "recipe.yaml", values)


class FakeTrainer:
    """Leaves what a training leaves; its scores are functions of row and seed. Stops before the run `stop`."""

    made: list[str]
    stop: str | None

    def __init__(self, config, process) -> None:
        self.config = config
        self.name = "/".join(config.run.output.parts[-2:])

    def run(self):
        open_run_folder(self.config)
        if self.name == type(self).stop:
            raise KeyboardInterrupt
        self.made.append(self.name)
        seed = self.config.run.seed
        summary = {
            "iterations": self.config.optim.iterations,
            "pseudo_miou": 10.0 + seed**2,
            "seg_miou": 20.0 + 3 * seed,
        }
        write_json(self.config.run.output / "summary.json", summary)
        return summary

    def close(self) -> None:
        pass


@pytest.fixture
def trainer(monkeypatch) -> type[FakeTrainer]:
    monkeypatch.setattr(ablate, "Trainer", FakeTrainer)
    FakeTrainer.made, FakeTrainer.stop = [], None
    return FakeTrainer


def call(recipe: Path, *arguments: str, table: int = 4) -> Path:
    ablate.main(["--table", str(table), "--config", str(recipe), *arguments])
    return recipe.parent / f"run_table_{table}"


def test_every_row_is_run_with_every_seed(recipe, trainer):
    folder = call(recipe, "--seeds", "0", "5")
    rows = ["none", "unc", "cer_gap", "cer_gmp", "cer_mca", "both"]
    assert trainer.made == [f"{row}/seed_{seed}" for row in rows for seed in (0, 5)]
    written = yaml.safe_load((folder / "cer_gap/seed_5/config.yaml").read_text())
    assert written["run"]["seed"] == 5
    assert (written["model"]["aggregation"], written["loss"]["uncertain"]) == ("gap", 0.0)


@pytest.mark.parametrize("name", ["table.md", "table.json"])
def test_a_table_is_written_over_by_itself_alone(recipe, trainer, tmp_path, name):
    for _ in range(2):
        folder = call(recipe, "--rows", "none")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text((folder / name).read_text())
    with pytest.raises(UserError, match=rf"--output: .*{name} exists and is not table 3"):
        call(recipe, "--rows", "full", "--output", str(mine), table=3)
    assert (mine / name).read_text() == (folder / name).read_text()


def test_a_table_that_was_interrupted_goes_on_where_it_stopped(recipe, trainer):
    trainer.stop = "cer_gap/seed_1"
    with pytest.raises(KeyboardInterrupt):
        call(recipe, "--seeds", "0", "1")
    assert trainer.made[-1] == "cer_gap/seed_0"
    trainer.made, trainer.stop = [], None
    call(recipe, "--seeds", "0", "1")
    assert trainer.made[0] == "cer_gap/seed_1"
    assert len(trainer.made) == 7


def test_a_finished_table_is_not_run_again(recipe, trainer):
    first = (call(recipe) / "table.md").read_text()
    trainer.made = []
    assert (call(recipe) / "table.md").read_text() == first
    assert trainer.made == []


def test_the_table_gives_mean_and_sample_deviation_over_the_seeds(recipe, trainer, capsys):
    folder = call(recipe, "--seeds", "0", "1", "3")
    row = json.loads((folder / "table.json").read_text())["rows"][0]
    assert row["seeds"]["3"] == {"pseudo": 19.0, "seg": 29.0}
    assert row["pseudo"]["mean"] == pytest.approx((10 + 11 + 19) / 3)
    assert row["pseudo"]["std"] == pytest.approx(statistics.stdev([10, 11, 19]))
    line = "| none | 13.3 ± 4.9 | 24.0 ± 4.6 | 3 | 71.1 / 67.9 |"
    assert line in (folder / "table.md").read_text().splitlines()
    assert line in capsys.readouterr().out


def test_one_seed_has_no_deviation(recipe, trainer):
    text = (call(recipe) / "table.md").read_text()
    assert "| unc | 10.0 | 20.0 | 1 | 74.4 / 72.5 |" in text


@pytest.mark.parametrize(
    ("number", "row", "numbers"),
    [
        (3, "edge_strict", "73.3 / 71.6"),
        (3, "random_0.5", "73.2 / 71.2"),
        (3, "uncertain_0.4", "74.4 / 72.5"),
        (4, "none", "71.1 / 67.9"),
        (4, "both", "75.7 / 73.6"),
        (5, "none", "75.7 / 73.6"),
        (5, "solarise", "75.3 ± 0.12 / 73.2 ± 0.06"),
        (5, "randaugment", ablate.ABSENT),
    ],
)
def test_the_papers_numbers_stand_in_a_column_of_their_own(recipe, trainer, number, row, numbers):
    lines = (call(recipe, table=number) / "table.md").read_text().splitlines()
    assert next(line for line in lines if "| row |" in line).endswith("| paper (VOC val, not ours): pseudo / seg |")
    assert f"| {row} | 10.0 | 20.0 | 1 | {numbers} |" in lines


def test_one_setting_has_the_same_numbers_in_every_table_of_the_paper():
    assert TABLES[3].paper["uncertain_0.4"] == TABLES[4].paper["unc"]
    assert TABLES[4].paper["both"] == TABLES[5].paper["none"]
    assert all(set(table.paper) <= set(table.rows) for table in TABLES.values())


def test_chosen_rows_alone_are_run_and_the_others_stay_empty(recipe, trainer):
    folder = call(recipe, "--rows", "both", "none")
    assert trainer.made == ["both/seed_0", "none/seed_0"]
    assert "| unc | \u2013 | \u2013 | 0 | 74.4 / 72.5 |" in (folder / "table.md").read_text()
    call(recipe, "--rows", "unc")
    assert trainer.made[2:] == ["unc/seed_0"]
    assert "| both | 10.0 | 20.0 | 1 |" in (folder / "table.md").read_text()


def test_options_of_the_recipe_hold_for_all_rows(recipe, trainer, tmp_path):
    call(recipe, "--output", str(tmp_path / "elsewhere"), "--mask.ratio", "0.25", "--rows", "none")
    written = yaml.safe_load((tmp_path / "elsewhere/none/seed_0/config.yaml").read_text())
    assert written["mask"]["ratio"] == 0.25


def test_the_resolved_rows_are_printed_and_nothing_is_run(recipe, trainer, capsys):
    folder = call(recipe, "--print-config", "--rows", "cer_gmp")
    written = yaml.safe_load(capsys.readouterr().out)
    assert written["model"]["aggregation"] == "gmp"
    assert not trainer.made
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "cer_gab"], r"table 4 has no row 'cer_gab'; did you mean 'cer_gap'"),
        (["--loss.uncertain", "0.3"], r"--loss\.uncertain cannot be given here: table 4 varies it"),
        (["--model.aggregation=gap"], r"--model\.aggregation cannot be given here"),
        (["--run.seed", "3"], r"--run\.seed cannot be given here: give --seeds"),
        (["--run.output", "x"], r"give --output"),
        (["--mask.ration", "0.3"], r"unknown option '--mask\.ration'"),
        (["--config", "missing.yaml"], r"missing\.yaml: no such configuration"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(recipe, trainer, arguments, message):
    with pytest.raises(UserError, match=message):
        call(recipe, *arguments)
    assert not trainer.made


def test_a_folder_of_another_recipe_is_refused(recipe, trainer):
    call(recipe, "--rows", "none")
    with pytest.raises(UserError, match=r"none/seed_0 holds another run: mask\.ratio"):
        call(recipe, "--rows", "unc", "--mask.ratio", "0.25")


def test_rows_that_were_evaluated_otherwise_are_not_mixed(recipe, trainer):
    call(recipe, "--rows", "none", "--evaluate.limit", "1")
    with pytest.raises(UserError, match=r"none/seed_0 was last started with other evaluate settings"):
        call(recipe)


def test_scores_of_a_later_start_with_other_values_are_not_mixed_either(recipe, trainer):
    folder = call(recipe, "--rows", "none")
    base, _ = load_config(["--config", str(recipe), "--evaluate.limit", "1"])
    row = row_config(base, TABLES[4].rows["none"], folder / "none/seed_0", 0)
    trainer(row, None).run()
    with pytest.raises(UserError, match=r"none/seed_0 was last started with other evaluate settings"):
        call(recipe)


@pytest.mark.parametrize("text", ['{"iterations"', '{"iterations": 2}', "[]"])
def test_a_damaged_summary_is_refused(recipe, trainer, text):
    folder = call(recipe, "--rows", "none")
    (folder / "none/seed_0/summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        call(recipe)


@pytest.mark.parametrize("name", ["voc_vit_b", "voc_official", "coco_vit_b", "coco_official", "synthetic"])
@pytest.mark.parametrize(("number", "full_method"), [(3, "full"), (4, "both"), (5, "none")])
def test_every_row_is_a_valid_change_of_every_recipe(name, number, full_method, tmp_path):
    base, _ = load_config(["--config", str(CONFIG_FOLDER / f"{name}.yaml")])
    configs = [row_config(base, changes, tmp_path, 0) for changes in TABLES[number].rows.values()]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    if name == "voc_vit_b":
        full = TABLES[number].rows[full_method]
        assert row_config(base, full, base.run.output, base.run.seed) == base


def paper_rows(number: int) -> dict[str, Config]:
    base, _ = load_config(["--config", "voc_vit_b"])
    return {name: row_config(base, changes, base.run.output, 0) for name, changes in TABLES[number].rows.items()}


def test_table_3_trains_every_row_but_the_full_method_without_l_c():
    rows = paper_rows(3)
    assert {name for name, row in rows.items() if row.loss.class_token} == {"full"}
    assert {row.loss.uncertain for row in rows.values()} == {0.1}
    strict = {name: (name, 0.4) for name in ("edge_strict", "cam_strict")}
    ratios = {f"{kind}_{r / 10}": (kind, r / 10) for kind in ("random", "uncertain") for r in range(1, 6)}
    masks = {name: (row.mask.strategy, row.mask.ratio) for name, row in rows.items()}
    assert masks == {**strict, **ratios, "full": ("uncertain", 0.4)}


def test_in_table_5_a_policy_takes_the_place_of_jitter_as_paper_and_official_code_have_it():
    found = {
        name: (row.augment.policy, row.augment.jitter, row.augment.crop_scale) for name, row in paper_rows(5).items()
    }
    usual = (0.32, 1.0)
    assert found == {
        **dict.fromkeys(("none", "blur", "solarise"), ("none", 0.5, usual)),
        "autoaugment": ("autoaugment", 0.0, usual),
        "autoaugment_jitter": ("autoaugment", 0.5, usual),
        "randaugment": ("randaugment", 0.0, (0.08, 1.0)),
        "randaugment_jitter": ("randaugment", 0.5, usual),
    }


def test_two_real_rows_end_with_their_table(recipe, tmp_path, capsys):
    helpers.write_dataset(tmp_path / "data")
    folder = call(recipe, "--rows", "none", "both", "--seeds", "0", "1", "--evaluate.limit", "2")
    content = json.loads((folder / "table.json").read_text())
    for row in (content["rows"][0], content["rows"][-1]):
        for seed in ("0", "1"):
            summary = json.loads((folder / row["row"] / f"seed_{seed}/summary.json").read_text())
            assert row["seeds"][seed] == {"pseudo": summary["pseudo_miou"], "seg": summary["seg_miou"]}
            assert 0 < summary["pseudo_miou"] < 100
    assert capsys.readouterr().out.rstrip().endswith("table.md")


def test_a_recipe_without_a_validation_list_is_refused_before_any_run(recipe, trainer):
    with pytest.raises(UserError, match=r"data\.val_list: none; a table needs scores"):
        call(recipe, "--data.val_list", "None")
    assert trainer.made == []
