"""Export of a run to the official code's format."""

from pathlib import Path

import pytest
import torch

from fsr_fast import load_network, train
from fsr_fast.commands import export
from fsr_fast.config import build_config
from fsr_fast.errors import UserError
from fsr_fast.models import build_network
from fsr_fast.models.official import official_state_dict
from fsr_fast.runtime.checkpoint import read_checkpoint
from tests import helpers, official

SIZES = official.MODEL
OFFICIAL = ("--to", "official")
SHORT = {"optim": {"iterations": 2, "warmup": 0}, "evaluate": {"limit": 1}}


def run(folder: Path, **sections) -> Path:
    """Train two iterations and return the run folder."""
    root = helpers.write_dataset(folder / "data")
    recipe = helpers.values({"model": SIZES}, SHORT, sections, root=root, output=folder / "run")
    train.main(["--config", str(helpers.write_config(folder / "recipe.yaml", recipe))])
    return folder / "run"


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    """A run whose teacher is a whole averaged network."""
    return run(
        tmp_path_factory.mktemp("averaged"),
        model={"normalisation": "imagenet"},
        teacher={"encoder_momentum": 0.9, "projector_momentum": 0.9},
    )


def test_the_student_is_written_bit_by_bit_under_the_official_names(averaged, tmp_path):
    export.main(["--checkpoint", str(averaged), *OFFICIAL, "--output", str(tmp_path / "new/student.pth")])
    weights = torch.load(tmp_path / "new/student.pth", weights_only=True)
    student = read_checkpoint(averaged)["student"]
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in official.official_weights().items()
    }
    assert all(torch.equal(value, student[name]) for name, value in weights.items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["student.pth"]


def test_the_teacher_is_the_averaged_network(averaged, tmp_path):
    export.main(["--checkpoint", str(averaged), *OFFICIAL, "--output", str(tmp_path / "teacher.pth"), "--teacher"])
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    checkpoint = read_checkpoint(averaged)
    assert weights.keys() == checkpoint["student"].keys()
    assert all(torch.equal(value, checkpoint["teacher"][f"network.{name}"]) for name, value in weights.items())
    assert not torch.equal(weights["encoder.norm.weight"], checkpoint["student"]["encoder.norm.weight"])


def test_the_card_of_the_teacher_has_no_scores_for_they_are_the_student_s(averaged, tmp_path):
    for name, options in (("student", []), ("teacher", ["--teacher"])):
        export.main(["--checkpoint", str(averaged), "--output", str(tmp_path / name), *options])
    student, teacher = ((tmp_path / name / "README.md").read_text() for name in ("student", "teacher"))
    assert "| **mean** |" in student
    assert "Not evaluated." in teacher
    assert "| **mean** |" not in teacher


def test_where_the_projector_alone_is_averaged_the_teacher_has_the_students_encoder(tmp_path):
    folder = run(tmp_path, model={"normalisation": "imagenet"}, teacher={"projector_momentum": 0.9})
    export.main(["--checkpoint", str(folder), *OFFICIAL, "--output", str(tmp_path / "teacher.pth"), "--teacher"])
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    checkpoint = read_checkpoint(folder)
    own = {name.replace("own_projector", "projector"): value for name, value in checkpoint["teacher"].items()}
    assert len(own) == 8
    assert all(torch.equal(value, (checkpoint["student"] | own)[name]) for name, value in weights.items())
    assert not torch.equal(own["projector.mlp.0.weight"], checkpoint["student"]["projector.mlp.0.weight"])


def test_an_exported_network_says_the_same_of_a_picture(tmp_path):
    source = network(normalisation="checkpoint", mask_mode="exclude")
    torch.save(official_state_dict(source), tmp_path / "student.pth")
    picture = torch.rand(2, 3, 32, 32, generator=helpers.generator())
    outputs = []
    for one in (source, load_network(tmp_path / "student.pth")):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (one.mean, one.std))
        with torch.no_grad():
            outputs.append(one((picture - mean) / std))
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_official_file_is_written_back_bit_by_bit(tmp_path):
    file = official.write_official(tmp_path / "student.pth")
    export.main(["--checkpoint", str(file), *OFFICIAL, "--output", str(tmp_path / "copy.pth")])
    weights = torch.load(tmp_path / "copy.pth", weights_only=True)
    assert weights.keys() == official.official_weights().keys()
    assert all(torch.equal(value, weights[name]) for name, value in official.official_weights().items())


def test_a_training_starts_from_a_run(averaged):
    recipe = build_config(helpers.values({"model": {**SIZES, "initial": str(averaged)}}), "")
    start = build_network(recipe.model, helpers.CLASSES, 32).state_dict()
    student = read_checkpoint(averaged)["student"]
    patch = "encoder.patch_embed.proj"  # rewritten for the normalisation
    assert all(torch.equal(start[name], student[name]) for name in student if not name.startswith(patch))


def test_a_run_that_started_from_a_file_is_loaded_and_resumed_without_it(tmp_path):
    file = official.write_official(tmp_path / "student.pth")
    folder = run(tmp_path, model={"normalisation": "imagenet", "initial": str(file)})
    file.unlink()
    assert load_network(folder).classes == helpers.CLASSES
    (folder / "summary.json").unlink()
    train.main(["--config", str(tmp_path / "recipe.yaml")])
    assert (folder / "summary.json").is_file()


# --- what an official checkpoint cannot hold


def network(**model):
    recipe = helpers.config({"model": {**SIZES, **model}})
    return helpers.network(recipe).eval()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"aggregation": "gap"}, "model.aggregation 'gap'"),
        ({"backbone_options": {**SIZES["backbone_options"], "num_heads": 2}}, "attention heads: here 2.*take 1"),
        ({"backbone_options": {**SIZES["backbone_options"], "embed_dim": 32}}, "attention heads: here 1.*take 0.5"),
        ({"backbone_options": {**SIZES["backbone_options"], "init_values": 0.1}}, r"encoder\.blocks\.0\.ls1\.gamma"),
        ({"backbone_options": {**SIZES["backbone_options"], "qk_norm": True}}, r"encoder\.blocks\.0\.attn\.q_norm"),
        ({"aux_block": -2}, "auxiliary block: here 2.*take 1"),
    ],
)
def test_what_readers_would_take_for_another_network_is_refused(model, named):
    with pytest.raises(UserError, match=named):
        official_state_dict(network(**model))


def test_a_file_that_exists_is_not_overwritten(averaged, tmp_path):
    (tmp_path / "student.pth").write_text("mine")
    with pytest.raises(UserError, match=r"student\.pth exists"):
        export.main(["--checkpoint", str(averaged), "--output", str(tmp_path / "student.pth")])
    assert (tmp_path / "student.pth").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "command"), [("copy.pth", None), ("copy", "fsr-fast predict --checkpoint {} PICTURES")]
)
def test_the_ending_of_the_output_says_what_is_written_and_the_last_line_what_comes_next(
    averaged, tmp_path, capsys, name, command
):
    output = tmp_path / name
    export.main(["--checkpoint", str(averaged), "--output", str(output)])
    assert output.is_dir() == (command is not None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ([f"next: {command.format(output)}"] if command else [])


def test_an_official_file_holds_no_second_network(tmp_path):
    file = official.write_official(tmp_path / "student.pth")
    with pytest.raises(UserError, match="not a checkpoint of a run"):
        export.main(["--checkpoint", str(file), *OFFICIAL, "--output", str(tmp_path / "teacher.pth"), "--teacher"])
