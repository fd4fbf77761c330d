"""Figures of a run by name."""

import math

from fsr_fast.evaluation.evaluator import Evaluation
from fsr_fast.reporting.summary import RATES, mean_ious, mean_label_scores, median_rates


def test_a_rate_is_the_median_of_the_lines_that_have_it():
    lines = [{"images_per_second": 3.0}, {"images_per_second": 1.0}, {"seg_miou": 0.5}, {"images_per_second": 2.0}]
    rates = median_rates(lines)
    assert rates.pop("images_per_second") == 2.0
    assert rates == {name: None for name in RATES if name != "images_per_second"}


def test_a_mean_that_is_not_known_is_not_a_number():
    evaluation = Evaluation({"pseudo": {"mean_iou": 0.25}, "seg": {"mean_iou": None}}, [])
    ious = mean_ious(evaluation)
    assert ious.pop("pseudo_miou") == 0.25
    assert ious.keys() == {"seg_miou"}
    assert math.isnan(ious["seg_miou"])
    scores = mean_label_scores({"mean_ap": None, "mean_f1": 0.75})
    assert scores["label_f1"] == 0.75
    assert math.isnan(scores["label_ap"])
