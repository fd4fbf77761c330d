"""Figures of a run as numbers by name: in its log, and in its summary."""

import math
import statistics
from typing import Any

from fsr_fast.evaluation.evaluator import Evaluation

RATES = ("images_per_second", "tflops_per_second", "of_ceiling", "data_wait", "memory_gib")
"""Rates of which a summary has the median over the log's lines."""


def median_rates(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the median of each rate over the lines that have it; None if none has.

    Args:
        lines: of the log, from `read_metrics`.
    """
    values = {name: [line[name] for line in lines if name in line] for name in RATES}
    return {name: statistics.median(found) if found else None for name, found in values.items()}


def mean_ious(evaluation: Evaluation) -> dict[str, float]:
    """Return the means by name, `pseudo_miou` for example; nan where the truth is 255 everywhere."""
    means = {name: result["mean_iou"] for name, result in evaluation.results.items()}
    return {f"{name}_miou": math.nan if mean is None else mean for name, mean in means.items()}


def mean_label_scores(scores: dict[str, Any]) -> dict[str, float]:
    """Return `label_ap` and `label_f1`, from `score_labels`; nan where no class has a mean."""
    means = {"label_ap": scores["mean_ap"], "label_f1": scores["mean_f1"]}
    return {name: math.nan if mean is None else mean for name, mean in means.items()}
