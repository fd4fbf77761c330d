"""Charts of a report, as plotly figures; the page sets their colours, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.reporting.record import RunRecord

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
DASHES = ("solid", "dash", "dot", "dashdot")
TABLE_ROWS = 12
"""Rows of the table that replaces a chart: evenly spaced points of its curves."""


@dataclass(frozen=True)
class Chart:
    """A chart, and the same in words and numbers for screen readers."""

    key: str
    """Unique in the page; letters, digits and dashes."""
    title: str
    description: str
    figure: go.Figure
    header: list[str]
    """Column titles of the table that replaces the chart."""
    rows: list[list[str]]


GROUPS = (
    ("losses", "Losses", "mean since the last line", lambda name: name.startswith("loss/")),
    ("miou", "Mean IoU on the validation list", "mIoU, percent", lambda name: name.endswith("_miou")),
    ("speed", "Training speed", "images per second", lambda name: name == "images_per_second"),
    ("wait", "Waiting for data", "share of the time", lambda name: name == "data_wait"),
    ("memory", "Peak memory", "peak memory in GiB", lambda name: name == "memory_gib"),
    ("rate", "Learning rate", "learning rate of the encoder", lambda name: name == "learning_rate"),
)


def curves(runs: Sequence[RunRecord]) -> list[Chart]:
    """Draw the curves of metrics.jsonl, a chart for each kind of number; several runs share the charts.

    Args:
        runs: at least one.

    Returns:
        Charts of what was recorded; no chart for an empty record.
    """
    charts = []
    for key, title, unit, belongs in GROUPS:
        lines = {}
        for number, run in enumerate(runs):
            for name, points in _points(run).items():
                if belongs(name):
                    several = key in ("losses", "miou")
                    short = name.removeprefix("loss/").removesuffix("_miou").replace("_", " ") if several else unit
                    lines[f"{short} · {run.name}" if len(runs) > 1 else short] = (points, DASHES[number % len(DASHES)])
        if lines:
            charts.append(_line_chart(key, title, unit, lines))
    return charts


def confusion(matrix: ConfusionMatrix, names: Sequence[str], key: str) -> Chart:
    """Draw a confusion matrix: the share of each true class that was predicted as each class.

    Args:
        matrix: counts over C classes.
        names: of the C + 1 classes, background first.
        key: of the chart.
    """
    counts, shown = matrix.counts, [html.escape(name, quote=False) for name in names]  # plotly reads HTML
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
    seen = (counts.sum(1) > 0).tolist()
    figure = go.Figure(
        go.Heatmap(
            z=[row if there else [None] * len(row) for row, there in zip(shares, seen, strict=True)],
            x=shown,
            y=[name if there else f"{name} (no truth)" for name, there in zip(shown, seen, strict=True)],
            customdata=counts.tolist(),
            colorscale="Cividis",
            zmin=0,
            zmax=100,
            colorbar={"title": "%"},
            hovertemplate="true %{y}<br>predicted %{x}<br>%{z:.1f} %, %{customdata:,} pixels<extra></extra>",
        )
    )
    side = max(360, 22 * len(names) + 160)
    figure.update_layout(
        height=min(side, 1100), xaxis_title="predicted", yaxis_title="true", yaxis_autorange="reversed"
    )
    rows = [
        [f"{names[true]} → {names[found]}", f"{shares[true][found]:.1f} %"]
        for true, found in _largest_confusions(torch.tensor(shares), TABLE_ROWS)
    ]
    return Chart(
        key,
        "Confusion matrix of the segmentation",
        "Rows are true classes, columns predicted ones; a cell is the share of the true class's pixels. "
        "The table names the most frequent confusions.",
        figure,
        ["true → predicted", "share of the true pixels"],
        rows,
    )


def entropy(values: Tensor, patches: int, key: str) -> Chart:
    """Draw the entropy of the trunk's attention by block and head (paper, Fig. 6).

    Args:
        values: (depth, heads), nats.
        patches: number N of patches; log N is the entropy of uniform attention.
        key: of the chart.
    """
    depth, heads = values.shape
    blocks = list(range(1, depth + 1))
    figure = go.Figure()
    for head in range(heads):
        figure.add_scatter(
            x=blocks,
            y=values[:, head].tolist(),
            mode="markers",
            name=f"head {head + 1}",
            marker={"color": COLOURS[0], "opacity": 0.7, "size": 9},
            showlegend=False,
            hovertemplate=f"block %{{x}}, head {head + 1}: %{{y:.2f}} nats<extra></extra>",
        )
    figure.add_scatter(x=blocks, y=values.mean(1).tolist(), name="mean of the heads", line={"color": COLOURS[1]})
    figure.add_scatter(
        x=[1, depth], y=[math.log(patches)] * 2, mode="lines", name="even attention", line={"dash": "dot"}
    )
    figure.update_layout(xaxis={"title": "block", "dtick": 1}, yaxis={"title": "entropy, nats", "rangemode": "tozero"})
    rows = [
        [str(block), *(f"{value:.2f}" for value in row)] for block, row in zip(blocks, values.tolist(), strict=True)
    ]
    return Chart(
        key,
        "Entropy of the attention by block and head (the paper's Figure 6)",
        f"A head that attends to one patch has entropy 0; one that attends evenly to all {patches} has "
        f"{math.log(patches):.2f}.",
        figure,
        ["block", *(f"head {head + 1}" for head in range(heads))],
        rows,
    )


def _points(run: RunRecord) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    last = {
        f"{name}_miou": scores["mean_iou"] for name, scores in run.results.items() if scores.get("mean_iou") is not None
    }
    for line in [*run.metrics, {"iteration": run.summary.get("iterations", 0), **last}]:
        for name, value in line.items():
            if name not in ("iteration", "wall_seconds") and isinstance(value, int | float):
                found.setdefault(name, []).append((line["iteration"], float(value)))
    return found


def _line_chart(key: str, title: str, unit: str, lines: Mapping[str, tuple[list[tuple[int, float]], str]]) -> Chart:
    figure = go.Figure()
    kinds = list(dict.fromkeys(name.partition(" · ")[0] for name in lines))  # with several runs, one colour per kind
    for number, (name, (points, dash)) in enumerate(lines.items()):
        colour = kinds.index(name.partition(" · ")[0]) if len(kinds) > 1 else number
        figure.add_scatter(
            x=[iteration for iteration, _ in points],
            y=[value for _, value in points],
            name=html.escape(name, quote=False),
            mode="lines" if len(points) > TABLE_ROWS else "lines+markers",
            line={"color": COLOURS[colour % len(COLOURS)], "dash": dash, "width": 2},
        )
    figure.update_layout(xaxis_title="iteration", yaxis_title=unit, showlegend=len(lines) > 1)
    figure.update_yaxes(exponentformat="e", rangemode="tozero" if key in ("speed", "wait", "memory") else "normal")
    known = {name: dict(points) for name, (points, _) in lines.items()}
    iterations = sorted({iteration for points in known.values() for iteration in points})
    shown = [iterations[round(index)] for index in torch.linspace(0, len(iterations) - 1, TABLE_ROWS).tolist()]
    rows = [
        [f"{iteration:,}", *(_number(points.get(iteration)) for points in known.values())]
        for iteration in dict.fromkeys(shown)
    ]
    ends = "; ".join(f"{name} ends at {_number(points[-1][1])}" for name, (points, _) in lines.items())
    return Chart(key, title, f"Over the iterations, {ends}.", figure, ["iteration", *known], rows)


def _largest_confusions(shares: Tensor, count: int) -> list[tuple[int, int]]:
    off = shares.clone().fill_diagonal_(0)
    order = off.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(cell, len(off)) for cell in order if off.flatten()[cell] > 0]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
