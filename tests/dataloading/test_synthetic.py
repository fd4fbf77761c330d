import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsr_fast.config import DataConfig
from fsr_fast.dataloading import synthetic
from fsr_fast.dataloading.creatures import HEAD_RADIUS, KINDS, Scene, draw_scene
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.synthetic import CLASSES, MARKER, ensure, generate
from fsr_fast.errors import UserError


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(0, index) for index in range(200)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Draw six images instead of 2,200; count the folders drawn."""
    calls: list[Path] = []

    def few(root: Path) -> None:
        calls.append(root)
        generate(root, train=4, val=2, processes=1)

    monkeypatch.setattr(synthetic, "generate", few)
    return calls


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path) -> None:
    draw: Callable[..., None] = partial(generate, train=5, val=2)
    draw(tmp_path / "alone", processes=1)
    draw(tmp_path / "pair", processes=2)
    draw(tmp_path / "other", processes=1, seed=1)
    assert digest(tmp_path / "alone") == digest(tmp_path / "pair") != digest(tmp_path / "other")


def test_the_folder_has_voc_layout(creatures: DataConfig) -> None:
    assert creatures.root is not None
    train, val = build_datasets(creatures)
    assert (len(train), len(val), train.classes) == (22, 7, CLASSES)
    for dataset in (train, val):
        for index in range(len(dataset)):
            mask = dataset.mask(index)
            assert mask is not None
            assert dataset.image(index).size == mask.shape == (96, 96)
            assert set(np.unique(mask)) - {0} == set(np.flatnonzero(dataset.labels[index]) + 1)
    with Image.open(creatures.root / "SegmentationClassAug" / f"{train.ids[0]}.png") as mask_file:
        assert mask_file.mode == "P"
    assert os.listdir(creatures.root.parent) == [creatures.root.name]


def test_images_show_one_to_three_classes_and_all_classes_appear(scenes: list[Scene]) -> None:
    counts = [len(np.unique(scene.mask[scene.mask > 0])) for scene in scenes]
    assert set(counts) == {1, 2, 3}
    assert {creature.kind for scene in scenes for creature in scene.creatures} == set(range(len(KINDS)))
    for scene in scenes:
        assert set(np.unique(scene.mask)) == {0, *(creature.kind + 1 for creature in scene.creatures)}


def test_the_foreground_covers_about_a_third(scenes: list[Scene]) -> None:
    assert 0.25 < np.mean([(scene.mask > 0).mean() for scene in scenes]) < 0.40


def test_a_quarter_of_the_heads_is_hidden_and_the_others_are_seen(scenes: list[Scene]) -> None:
    seen = [(c.hidden, share) for scene in scenes for c, share in zip(scene.creatures, scene.head_seen, strict=True)]
    assert 0.18 < np.mean([share < 0.2 for _, share in seen]) < 0.32
    assert max(share for hidden, share in seen if hidden) < 0.25
    assert np.mean([share > 0.7 for hidden, share in seen if not hidden]) > 0.9


def test_the_head_is_a_fifth_of_its_creature(scenes: list[Scene]) -> None:
    shares = [
        share * np.pi * (HEAD_RADIUS * creature.scale) ** 2 / (scene.mask == creature.kind + 1).sum()
        for scene in scenes
        for creature, share in zip(scene.creatures, scene.head_seen, strict=True)
        if not creature.hidden
    ]
    assert 0.15 < np.median(shares) < 0.25


def test_heads_are_saturated_and_all_else_is_muted(scenes: list[Scene]) -> None:
    muted, heads = [], []
    for scene in scenes:
        saturation = np.asarray(Image.fromarray(scene.image).convert("HSV"))[..., 1] / 255
        y, x = np.mgrid[0:96, 0:96]
        near = np.zeros((96, 96), bool)
        for creature, share in zip(scene.creatures, scene.head_seen, strict=True):
            reach = 0.9 * creature.scale
            away = np.hypot(
                x - creature.x - reach * np.cos(creature.angle), y - creature.y - reach * np.sin(creature.angle)
            )
            near |= away < 0.7 * creature.scale
            if share > 0.95:
                heads.append(saturation[away < 0.3 * creature.scale].mean())
        muted.append(saturation[~near].mean())
    assert np.mean(heads) > 0.45 > 0.35 > np.mean(muted)


def test_no_body_has_the_hue_of_another_kind_s_head() -> None:
    """Else its evidence drowns: the classifier only sees each feature's largest value over the picture."""
    pairs = [(body, head) for body in KINDS for head in KINDS if body is not head]
    assert min(_hue_distance(body.tint, head.head[0]) for body, head in pairs) > 0.12


def test_two_kinds_of_a_family_differ_in_the_tint_of_their_bodies() -> None:
    for family in range(3):
        one, other = (kind.tint for kind in KINDS if kind.family == family)
        assert _hue_distance(one, other) > 0.1


def _hue_distance(one: float, other: float) -> float:
    return abs((one - other + 0.5) % 1 - 0.5)


def test_a_drawn_data_set_is_kept(tmp_path: Path, drawn: list[Path]) -> None:
    root = tmp_path / "new" / "set"
    ensure(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    ensure(root)
    assert drawn == [root]
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_pictures_of_another_version_are_drawn_anew(tmp_path: Path, drawn: list[Path]) -> None:
    ensure(tmp_path / "set")
    (tmp_path / "set" / MARKER).write_text('{"version": 0}')
    (tmp_path / "set" / "left.over").touch()
    ensure(tmp_path / "set")
    assert len(drawn) == 2
    assert not (tmp_path / "set" / "left.over").exists()


def test_of_two_that_ask_at_once_one_draws(tmp_path: Path, drawn: list[Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ensure, [tmp_path / "set"] * 2))
    assert len(drawn) == 1


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seed: int, index: int) -> Scene:
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(seed, index)

    monkeypatch.setattr(synthetic, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", train=4, val=2, processes=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused(folder: Path, drawn: list[Path]) -> None:
    with pytest.raises(UserError, match=r"data\.root.* is not the embedded data set.*--data\.dataset voc"):
        build_datasets(DataConfig(dataset="synthetic", root=folder))
    assert not drawn


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, drawn: list[Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.root.*file/set.*give another folder"):
        ensure(tmp_path / "file" / "set")
