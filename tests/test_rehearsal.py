"""The rehearsal at full size: the data sets that it makes, and what it measures for a part."""

import json
import sys
from pathlib import Path

import pytest

from bench import rehearsal
from bench.rehearsal_sets import LAYOUTS, LINKED, make_set
from fsr_fast.cli import parser_of
from fsr_fast.commands import data
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError

DIVISOR = {"voc": 100, "coco": 600}


@pytest.fixture(scope="module", params=["voc", "coco"])
def made(request, tmp_path_factory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("rehearsal") / request.param
    make_set(root, request.param, DIVISOR[request.param])
    return request.param, root


def test_the_sets_have_the_counts_of_the_real_ones(made):
    name, root = made
    train, val = build_datasets(rehearsal.open_data(name, "files", root))
    counts = [-(-part.images // DIVISOR[name]) for part in LAYOUTS[name].parts]
    assert [len(train), len(val)] == counts
    assert train.classes == LAYOUTS[name].classes
    mask = val.mask(0)
    assert mask is not None
    assert mask.shape == LAYOUTS[name].size[::-1]
    assert {value - 1 for value in set(mask.ravel().tolist()) - {0}} <= set(val.labels[0].nonzero()[0])


def test_shards_are_opened_by_the_names_under_which_they_are_packed(made, tmp_path):
    name, root = made
    pack = rehearsal.list_parts(name, root, tmp_path, None, 64)["data pack"]
    assert pack[1:4] == ["-m", "fsr_fast", "data"]
    data.main(pack[4:])
    for packed, files in zip(
        build_datasets(rehearsal.open_data(name, "shards", tmp_path / "shards")),
        build_datasets(rehearsal.open_data(name, "files", root)),
        strict=True,
    ):
        assert len(packed) == len(files)


def test_a_hundred_names_are_one_stored_picture(made):
    name, root = made
    train, _ = build_datasets(rehearsal.open_data(name, "files", root))
    stored = {train.image_path(index).stat().st_ino for index in range(len(train))}
    assert len(stored) == -(-len(train) // LINKED)


def test_coco_has_the_objects_and_the_images_without_one(tmp_path):
    make_set(tmp_path, "coco", 4000)
    content = json.loads((tmp_path / "annotations/instances_val2014.json").read_text())
    assert len(content["annotations"]) == -(-291_875 // 4000)
    assert len(content["images"]) - len({entry["image_id"] for entry in content["annotations"]}) == 1


def test_a_finished_set_is_kept_and_another_size_replaces_it(tmp_path):
    make_set(tmp_path, "voc", 5000)
    file = tmp_path / "ImageSets/Segmentation/val.txt"
    before = file.stat().st_mtime_ns
    make_set(tmp_path, "voc", 5000)
    assert file.stat().st_mtime_ns == before
    make_set(tmp_path, "voc", 1000)
    assert len(file.read_text().split()) == 2


def test_a_part_is_measured_with_its_children(tmp_path):
    child = "files = [open(__file__) for _ in range(40)]; held = b'x' * 2**27; sum(range(10**8))"
    (tmp_path / "child.py").write_text(child)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'child.py')!r}], check=True)"
    measured = rehearsal.run_part([sys.executable, "-c", parent], tmp_path / "logs/part.log")
    assert measured["open_files"] >= 40
    assert measured["memory_mib"] >= 128
    assert measured["cpu_seconds"] > 0.5


def test_a_part_that_fails_stops_the_rehearsal(tmp_path):
    with pytest.raises(UserError, match=r"exit code 3; see .*part\.log"):
        rehearsal.run_part([sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], tmp_path / "part.log")
    assert (tmp_path / "part.log").read_text() == "why\n"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_is_a_command_that_parses(layout, tmp_path):
    for command in rehearsal.list_parts(layout, tmp_path, tmp_path / "work", 5, 64).values():
        module, arguments = command[2], command[3:]
        if module == "bench.rehearsal":
            options = rehearsal.build_parser().parse_args(arguments)
            assert (bool(options.load), options.size) == (True, 64)
            continue
        parser_of(arguments[0]).parse_args(arguments[1:])


def test_an_epoch_takes_every_full_batch(tmp_path, monkeypatch):
    make_set(tmp_path, "voc", 600)
    monkeypatch.setattr(rehearsal, "WORKERS", 0)
    taken = []
    real = rehearsal.islice
    monkeypatch.setattr(rehearsal, "islice", lambda loader, count: taken.append(count) or real(loader, count))
    assert rehearsal.load_epoch("voc", "files", tmp_path, "torch", 32) == 18
    assert taken == [18 // rehearsal.BATCH]


def test_an_unknown_part_is_refused_before_a_set_is_made(tmp_path):
    with pytest.raises(UserError, match=r"--parts: unknown: nothing; known: start-up; data check; .*report"):
        rehearsal.main(["--layout", "voc", "--folder", str(tmp_path / "set"), "--parts", "report", "nothing"])
    assert not any(tmp_path.iterdir())


def test_chosen_parts_run_in_their_order_and_are_recorded(tmp_path, monkeypatch, capsys):
    commands, cases = [], []
    monkeypatch.setattr(rehearsal, "run_part", lambda command, log: commands.append(command) or {"seconds": 1.5})
    monkeypatch.setattr(rehearsal, "record", lambda case, device, content: cases.append((case, content)))
    root = tmp_path / "set"
    rehearsal.main(
        ["--layout", "voc", "--folder", str(root), "--divide", "600", "--limit", "2", "--parts", "report", "evaluate"]
    )
    known = rehearsal.list_parts("voc", root, tmp_path / "set_work", 2, 448)
    assert commands == [known["report"], known["evaluate"]]
    assert [case for case, _ in cases] == ["rehearsal voc 18 report", "rehearsal voc 18 evaluate"]
    assert [content["limit"] for _, content in cases] == [None, 2]
    assert "voc report: seconds 1.5" in capsys.readouterr().out
