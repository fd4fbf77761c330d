"""Result tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def score_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Arrange IoU per class, one column per kind of result, the mean in the last row; print it with rich.

    Args:
        results: scores (`evaluation.metrics.scores`) by kind, e.g. `pseudo`, `seg`, `seg + CRF`; same classes in each.

    Returns:
        The table; `-` where a class is absent from the ground truth.
    """
    table = Table(box=box.ASCII2, show_footer=True)
    table.add_column("IoU (%)", footer="mean")
    for kind, scores in results.items():
        table.add_column(kind, footer=_percent(scores["mean_iou"]), justify="right")
    for name in next(iter(results.values()))["classes"]:
        table.add_row(escape(name), *(_percent(scores["classes"][name]["iou"]) for scores in results.values()))
    return table


def label_table(scores: Mapping[str, Any]) -> Table:
    """Arrange the classifier's scores from image labels; print it with rich.

    Args:
        scores: from `evaluation.label_scores.label_scores`.
    """
    table = Table(box=box.ASCII2, show_footer=True)
    table.add_column("image labels (%)", footer="mean")
    table.add_column("average precision", footer=_percent(scores["mean_ap"]), justify="right")
    table.add_column("F1", footer=_percent(scores["mean_f1"]), justify="right")
    table.add_column("images", justify="right")
    for name, one in scores["classes"].items():
        table.add_row(Text(name), _percent(one["ap"]), _percent(one["f1"]), str(one["images"]))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
