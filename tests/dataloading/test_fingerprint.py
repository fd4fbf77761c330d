"""A training set that changed during a run is detected, by its first difference."""

import os
from pathlib import Path

import pytest
from PIL import Image

from fsr_fast.config import build_config
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.fingerprint import fingerprint, first_difference
from fsr_fast.errors import UserError
from fsr_fast.train import main as train
from tests import helpers

LIST = "ImageSets/Segmentation/train.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return helpers.write_dataset(tmp_path / "data", train=4, val=1)


def training_set(root: Path):
    return build_datasets(build_config(helpers.values(root=root), "the test").data)[0]


def reverse(root: Path) -> None:
    (root / LIST).write_text("\n".join(reversed((root / LIST).read_text().split())))


def shorten(root: Path) -> None:
    (root / LIST).write_text("\n".join((root / LIST).read_text().split()[:3]))


def relabel(root: Path) -> None:
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("picture_1,", "picture_1,blue "))


def resize(root: Path) -> None:
    Image.new("RGB", (36, 40)).save(root / "JPEGImages" / "picture_2.jpg")


def repaint(root: Path) -> None:
    """Change the content of a file but not its size."""
    path = root / "JPEGImages" / "picture_3.jpg"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


CHANGES = {
    "order": (reverse, "number 1 of its list is now 'picture_3' (4 of 4 differ)"),
    "length": (shorten, "it had 4 entries and has 3"),
    "labels": (relabel, "number 2 of its list 'picture_1' has other labels (1 of 4 differ)"),
    "size": (resize, "number 3 of its list 'picture_2' has a file of another size (1 of 4 differ)"),
    "content": (repaint, "number 4 of its list 'picture_3' has a file of other content (1 of 4 differ)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_first_difference_is_named(root, kind):
    before = fingerprint(training_set(root), contents=True)
    assert first_difference(before, before.clone(), training_set(root)) is None
    change, expected = CHANGES[kind]
    change(root)
    after = training_set(root)
    assert first_difference(before, fingerprint(after, contents=True), after) == expected
    without = first_difference(before, fingerprint(after, contents=False), after)
    assert without == (None if kind == "content" else expected)


def test_a_set_that_was_moved_and_touched_is_the_same(root, tmp_path):
    before = fingerprint(training_set(root), contents=True)
    moved = root.rename(tmp_path / "moved")
    for path in (moved / "JPEGImages").iterdir():
        os.utime(path, (0, 0))
    assert first_difference(before, fingerprint(training_set(moved), contents=True), training_set(moved)) is None


@pytest.mark.faults
def test_a_run_does_not_go_on_with_another_training_set_unless_it_is_told_to(root, tmp_path):
    recipe = helpers.values({"optim": {"iterations": 2}}, root=root, output=tmp_path / "run")
    command = ["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))]
    train(command)
    relabel(root)
    with pytest.raises(UserError, match=r"'picture_1' has other labels .*--data\.fingerprint off"):
        train(command)
    train([*command, "--data.fingerprint", "off"])
