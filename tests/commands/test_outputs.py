"""Where results go when no --output is given."""

from pathlib import Path

import pytest

from fsr_fast.commands.outputs import default_output, evaluation_folder


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    (tmp_path / "run/checkpoints/best.pt").touch()
    return tmp_path / "run"


def test_results_belong_to_the_run_of_a_checkpoint(run):
    assert default_output(run, "predictions") == run / "predictions"
    assert default_output(run / "checkpoints/best.pt", "predictions") == run / "predictions"


def test_results_of_a_checkpoint_without_a_run_stay_in_the_folder_that_one_is_in(tmp_path):
    for checkpoint in (tmp_path / "student.pth", tmp_path / "exported"):
        assert default_output(checkpoint, "predictions") == Path("predictions")


def test_evaluations_of_a_file_do_not_overwrite_that_of_the_run(run, tmp_path):
    assert evaluation_folder(run) == run
    assert evaluation_folder(run / "checkpoints/best.pt") == run / "evaluations/best"
    assert evaluation_folder(run / "checkpoints/0000400.pt") == run / "evaluations/0000400"
    assert evaluation_folder(tmp_path / "student.pth") == tmp_path / "evaluations/student"
    assert evaluation_folder(tmp_path) == tmp_path
