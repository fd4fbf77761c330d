"""Result tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table


def score_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay out IoU per class, one column a kind of result, the mean in the last row; print it with rich.

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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
