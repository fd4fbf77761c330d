"""Pictures that show no class."""

import json
from pathlib import Path

import pytest

from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from tests.dataloading.people import SHOWN, config, voc_config

# --- pictures that show no class


def test_own_pictures_with_an_empty_label_are_trained_on_as_background(mydata: Path) -> None:
    train, _ = build_datasets(config(mydata))
    assert train.labels.sum(1).tolist() == [1, 2, 1, 0]
    assert build_datasets(config(mydata, negatives=False))[0].labels.sum(1).tolist() == [1, 2, 1]
    assert build_datasets(config(mydata, subset=["dog"]))[0].labels.tolist() == [[1], [0]]


def test_elsewhere_an_empty_label_is_refused_with_both_readings(folder: Path) -> None:
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("two,cat", "two,"))
    with pytest.raises(
        UserError, match=r"'two' has no label.*--data\.negatives true \(train on it as background alone.*or false"
    ):
        build_datasets(voc_config(folder))
    assert len(build_datasets(voc_config(folder, negatives=True))[0]) == 4
    assert len(build_datasets(voc_config(folder, negatives=False))[0]) == 3


def test_a_list_without_any_class_is_refused(mydata: Path) -> None:
    (mydata / "train.csv").write_text("image,labels\na.jpg,\n")
    with pytest.raises(UserError, match=r"no training image of .* shows any of cat, dog, potted plant"):
        build_datasets(config(mydata))


def test_classes_that_cannot_be_learned_are_warned_of(mydata: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mydata / "train.csv").write_text("image,labels\na.jpg,cat\nc.jpg,cat dog\n")
    build_datasets(config(mydata))
    text = caplog.text
    assert "every training image shows 'cat'" in text
    assert "1 training image shows 'dog': too few" in text
    assert "no training image shows 'potted plant'" in text


def test_json_with_an_empty_list_is_a_picture_of_background(mydata: Path) -> None:
    (mydata / "train.csv").unlink()
    entries = [{"image": name, "labels": labels} for name, labels in SHOWN.items()]
    (mydata / "train.json").write_text(json.dumps(entries))
    assert build_datasets(config(mydata))[0].labels.sum(1).tolist() == [1, 2, 1, 0]
