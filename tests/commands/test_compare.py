import json

import numpy as np
import pytest

from fsr_fast.commands.compare import compare, main
from fsr_fast.errors import UserError
from fsr_fast.evaluation.bootstrap import mean_iou, paired_bootstrap


def counts(hits: list[int], *, of: int = 100) -> np.ndarray:
    """Images of background and one class of `of` pixels each, as many of which are right in both."""
    return np.array([[[hit, of, of], [hit, of, of]] for hit in hits])


def write_evaluation(folder, hits: list[int], *, classes=("cat",), kind: str = "seg", first: int = 0):
    """Write the journal of an evaluation of images of 100 background and 100 cat pixels."""
    folder.mkdir()
    lines = [{"classes": list(classes), "list": "val"}]
    for number, hit in enumerate(hits, start=first):
        cells = [[0, 0, hit], [0, 1, 100 - hit], [1, 0, 100 - hit], [1, 1, hit]]
        scored = {"cells": cells, "bands": [[1, hit // 10, 10, 10]]}
        lines.append({"name": f"image_{number}", "counts": {kind: scored}})
    lines.append({"name": "bad", "error": "cannot be decoded"})
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_mean_iou_is_over_the_classes_of_the_truth():
    sums = np.array([[50, 100, 100], [30, 40, 30], [0, 0, 20]])
    assert mean_iou(sums) == pytest.approx(100 * (50 / 150 + 30 / 40) / 2)


def test_the_interval_is_that_of_resamples_drawn_one_by_one():
    generator = np.random.default_rng(3)
    first, second = (counts(list(generator.integers(40, 95, 30))) for _ in range(2))
    found = paired_bootstrap(first, second, draws=4000)
    changes = []
    for _ in range(4000):
        chosen = generator.integers(0, 30, 30)
        changes.append(mean_iou(second[chosen].sum(0)) - mean_iou(first[chosen].sum(0)))
    assert found.change == pytest.approx(mean_iou(second.sum(0)) - mean_iou(first.sum(0)))
    low, high = np.percentile(changes, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.6), pytest.approx(high, abs=0.6))
    assert found.low < found.change < found.high


def test_pairing_makes_a_small_but_steady_change_certain():
    hits = list(np.random.default_rng(0).integers(40, 90, 40))
    found = paired_bootstrap(counts(hits), counts([hit + 1 for hit in hits]))
    assert found.better == 1
    assert 0 < found.low < found.high < 2
    again = paired_bootstrap(counts(hits), counts([hit + 1 for hit in hits]))
    assert found == again


def test_two_evaluations_are_compared_on_the_images_that_both_have(tmp_path):
    first = write_evaluation(tmp_path / "a", [50] * 12)
    second = write_evaluation(tmp_path / "b", [80] * 12, first=4)
    images, differences = compare(first, second, draws=200)
    assert images == 8
    assert differences["seg"]["mIoU"].first == pytest.approx(100 * 50 / 150)
    assert differences["seg"]["mIoU"].second == pytest.approx(100 * 80 / 120)
    assert differences["seg"]["boundary mIoU"].second == pytest.approx(100 * 8 / 12)


def test_the_comparison_is_printed_and_written(tmp_path, capsys):
    folders = [str(write_evaluation(tmp_path / name, hits)) for name, hits in (("a", [50] * 9), ("b", [60] * 9))]
    main([*folders, "--draws", "100", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in printed
    assert "| seg | mIoU | 33.33 | 42.86 | +9.52 | +9.52 to +9.52 | 100.0% of the resamples |" in text
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["images"] == 9
    assert written["results"]["seg"]["mIoU"]["change"] == pytest.approx(9.5238, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["dog"]}, r"its classes \['dog'\]"),
        ({"first": 50}, "no image in common"),
        ({"kind": "pseudo"}, "no kind of result in common"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(tmp_path, options, message):
    first = write_evaluation(tmp_path / "a", [50] * 3)
    second = write_evaluation(tmp_path / "b", [50] * 3, **options)
    with pytest.raises(UserError, match=message):
        compare(first, second)


@pytest.mark.parametrize("content", [None, "", "no json\n", '{"classes": ["cat"]}\n{"name": "a", "cou\n'])
def test_a_folder_without_a_whole_evaluation_is_named(tmp_path, content):
    first = write_evaluation(tmp_path / "a", [50] * 3)
    (tmp_path / "b").mkdir()
    if content is not None:
        (tmp_path / "b" / "images.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"b/images\.jsonl: (no finished evaluation|not the journal)"):
        compare(first, tmp_path / "b")


def test_too_few_resamples_are_refused():
    with pytest.raises(UserError, match="--draws: 10 resamples"):
        main(["a", "b", "--draws", "10"])


def test_a_seed_that_is_none_is_refused():
    with pytest.raises(UserError, match="--seed: -1; expected 0 or more"):
        main(["a", "b", "--seed", "-1"])
