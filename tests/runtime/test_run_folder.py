from pathlib import Path

import pytest
import yaml

from fsr_fast.config import Config, build_config, dump_config, load_config
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.run_folder import claim_run_folder, open_run_folder
from tests import helpers


def config(folder: Path, *changes) -> Config:
    return build_config(helpers.values(*changes, output=folder), "the test")


def refusal(folder: Path, *changes) -> str:
    before = sorted(folder.rglob("*")) if folder.is_dir() else None
    with pytest.raises(UserError) as caught:
        claim_run_folder(config(folder, *changes))
    assert (sorted(folder.rglob("*")) if folder.is_dir() else None) == before
    message = str(caught.value)
    assert message.startswith(f"run.output: {folder} ") or str(folder) in message
    return message


def run_in(folder: Path, *iterations: int) -> Path:
    open_run_folder(config(folder))
    for iteration in iterations:
        (folder / "checkpoints" / f"{iteration:07d}.pt").touch()
    return folder


def test_a_new_folder_is_free_and_is_not_made_before_the_run(tmp_path):
    assert claim_run_folder(config(tmp_path / "deep" / "run")) is None
    assert not (tmp_path / "deep").exists()


def test_an_empty_folder_is_free(tmp_path):
    assert claim_run_folder(config(tmp_path)) is None


def test_the_resolved_configuration_of_the_newest_start_is_written(tmp_path):
    run_in(tmp_path / "run")
    written = tmp_path / "run" / "config.yaml"
    assert load_config(["--config", str(written)])[0] == config(tmp_path / "run")
    change = {"run": {"log_every": 7}}
    open_run_folder(config(tmp_path / "run", change))
    assert written.read_text() == dump_config(config(tmp_path / "run", change))


def test_the_same_run_goes_on_from_its_newest_checkpoint(tmp_path):
    assert claim_run_folder(config(run_in(tmp_path / "none"))) is None
    folder = run_in(tmp_path / "run", 4, 120, 16)
    assert claim_run_folder(config(folder)) == folder / "checkpoints" / "0000120.pt"


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"log_every": 9, "picture_every": 3, "checkpoint_every": 2, "evaluate_every": 5, "device": "auto"}},
        {"evaluate": {"scales": [1.0, 2.0], "crf": True}},
        {"data": {"workers": 3, "root": "moved"}},
    ],
)
def test_a_run_may_go_on_with_what_does_not_change_the_computation(tmp_path, change):
    folder = run_in(tmp_path / "run", 4)
    assert claim_run_folder(config(folder, change)) is not None


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"run": {"seed": 3}}, "run.seed (0 there, 3 now)"),
        ({"run": {"amp": "bf16"}}, "run.amp ('off' there, 'bf16' now)"),
        ({"run": {"seed_per_rank": False}}, "run.seed_per_rank (True there, False now)"),
        ({"optim": {"learning_rate": 0.5}}, "optim.learning_rate (0.001 there, 0.5 now)"),
        ({"model": {"backbone_options": {"depth": 5}}}, "model.backbone_options."),
        ({"data": {"subset": ["red"]}}, "data.subset (None there, ['red'] now)"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, change, difference):
    message = refusal(run_in(tmp_path / "run", 4), change)
    assert "holds another run" in message
    assert difference in message
    assert "give another --run.output" in message


def test_without_resume_a_folder_with_checkpoints_is_refused(tmp_path):
    message = refusal(run_in(tmp_path / "run", 4), {"run": {"resume": False}})
    assert "run.resume is off" in message
    assert claim_run_folder(config(run_in(tmp_path / "fresh"), {"run": {"resume": False}})) is None


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and not a run" in refusal(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    assert "is a file; give a folder" in refusal(tmp_path / "run")


@pytest.mark.parametrize("text", ["run: 3", "[1,", "just words"])
def test_a_damaged_configuration_of_the_folder_is_refused(tmp_path, text):
    folder = run_in(tmp_path / "run", 4)
    (folder / "config.yaml").write_text(text)
    refusal(folder)


def test_a_key_that_a_recorded_configuration_lacks_had_its_default(tmp_path):
    folder = run_in(tmp_path / "run", 4)  # as version 0.1.0 recorded it, which had fewer keys
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    del recorded["mask"]["ratio"]
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert claim_run_folder(config(folder)) is not None
    assert "mask.ratio (0.4 there, 0.3 now)" in refusal(folder, {"mask": {"ratio": 0.3}})


@pytest.mark.faults
def test_a_configuration_that_a_power_failure_emptied_is_taken_from_the_checkpoint(tmp_path):
    folder = run_in(tmp_path / "run")
    (folder / "config.yaml").write_text("")
    assert claim_run_folder(config(folder)) is None
    write_checkpoint(folder, {"iteration": 4, "config": config(folder).model_dump(mode="json")})
    assert claim_run_folder(config(folder)) == folder / "checkpoints" / "0000004.pt"
    assert "run.seed (0 there, 3 now)" in refusal(folder, {"run": {"seed": 3}})
