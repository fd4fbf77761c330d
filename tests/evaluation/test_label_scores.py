import json

import numpy as np
import pytest
import torch

from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.label_scores import average_precision, label_scores, score_labels
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.distributed import Process
from fsr_fast.train import main as train
from tests import helpers

ALONE = Process(0, 1, torch.device("cpu"))


def test_average_precision_is_the_mean_precision_at_the_ranks_of_the_class():
    shown = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3.0, 2.0, 1.0]), shown) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 2.0, 3.0, 4.0]), shown) == pytest.approx(100 * (2 / 4 + 1 / 2) / 2)
    assert average_precision(np.zeros(4), shown) == pytest.approx(50)  # one score for all: no order helps
    assert average_precision(np.zeros(4), np.zeros(4, bool)) is None


def test_f1_precision_and_recall_are_those_of_the_classes_above_one_half():
    logits = np.array([[2.0, -1.0, -1.0], [1.0, -2.0, 1.0], [-1.0, -1.0, -1.0], [3.0, -1.0, -1.0]])
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    scores = label_scores(logits, labels, ("cat", "dog", "cow"))
    assert scores["classes"]["cat"] == {
        "ap": pytest.approx(100 * (1 / 2 + 2 / 3 + 3 / 4) / 3),
        "f1": pytest.approx(100 * 2 / 3),
        "precision": pytest.approx(100 * 2 / 3),
        "recall": pytest.approx(100 * 2 / 3),
        "images": 3,
    }
    assert (scores["classes"]["dog"]["f1"], scores["classes"]["dog"]["precision"]) == (0, None)
    assert (scores["classes"]["cow"]["ap"], scores["classes"]["cow"]["f1"]) == (None, None)
    assert scores["mean_f1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("protocol", ["own", "official"])
def test_the_classifier_is_scored_without_the_decoder(tmp_path, monkeypatch, protocol):
    changes = {"data": {"root": str(helpers.write_dataset(tmp_path / "data"))}, "evaluate": {"protocol": protocol}}
    recipe = helpers.config(changes)
    network = helpers.network(recipe)
    monkeypatch.setattr(network.decoder, "forward", None)
    train, _ = build_datasets(recipe.data)
    assert score_labels(network, train, recipe, ALONE)["images"] == len(train)


def test_the_classifier_of_a_network_is_scored_on_pictures_without_masks(tmp_path):
    recipe = helpers.config({"data": {"root": str(helpers.write_dataset(tmp_path / "data")), "val_list": None}})
    train, _ = build_datasets(recipe.data)
    network = helpers.network(recipe)
    scores = score_labels(network, train, recipe, ALONE)
    assert scores["images"] == len(train)
    assert network.training
    network.eval()
    logits = []
    for index in range(len(train)):
        image = helpers.normalised(np.array(train.image(index)).transpose(2, 0, 1), network)
        logits.append(infer(network, image[None]).class_logits[0].numpy())
    expected = label_scores(np.array(logits), train.labels, network.classes)
    assert scores["mean_ap"] == pytest.approx(expected["mean_ap"], rel=1e-6)


def test_a_run_without_masks_is_scored_by_its_labels(tmp_path, capsys):
    root = helpers.write_dataset(tmp_path / "data")
    changes = {"data": {"val_list": None}, "run": {"evaluate_every": 2, "checkpoint_every": 2}}
    recipe = helpers.values(changes, root=root, output=tmp_path / "run")
    train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    printed = capsys.readouterr().out
    assert "average precision" in printed
    assert f"next: fsr-fast report {tmp_path / 'run'}" in printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["labels"]["images"] == 8
    assert summary["label_ap"] == summary["labels"]["mean_ap"] > 0
    assert any("label_ap" in line for line in read_metrics(tmp_path / "run"))
    assert (tmp_path / "run/checkpoints/best.pt").exists()
