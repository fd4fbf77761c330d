"""The report of an evaluation: metrics.json, report.md, and the confusion matrices as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fsr_fast.evaluation.evaluator import Evaluation
from fsr_fast.runtime.files import atomic_file, write_json, write_text
from fsr_fast.runtime.markdown import code, plain

MEANINGS = {
    "pseudo": "labels from the class activation maps, given the true image labels",
    "seg": "the decoder's segmentation",
    "seg+crf": "the decoder's segmentation after the dense CRF",
}
SUMMARY = {
    "mean_iou": "mIoU",
    "mean_boundary_iou": "boundary mIoU",
    "mean_precision": "precision",
    "mean_recall": "recall",
    "pixel_accuracy": "pixel accuracy",
}
COLUMNS = {"iou": "IoU", "boundary_iou": "boundary IoU", "precision": "precision", "recall": "recall"}


def write_report(
    folder: Path, evaluation: Evaluation, settings: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[Path, Path]:
    """Write the report.

    Args:
        folder: that exists.
        evaluation: of all processes.
        settings: what was evaluated, for both files.
        class_names: of the foreground classes.

    Returns:
        metrics.json and report.md; `confusion_KIND.png` is written beside them for each kind of result.
    """
    pictures = {}
    for kind, tally in evaluation.tallies.items():
        pictures[kind] = folder / f"confusion_{kind.replace('+', '_')}.png"
        draw_confusion(tally.matrix.counts, class_names, f"{kind}: {MEANINGS[kind]}", pictures[kind])
    values = {
        **settings,
        "images": evaluation.images,
        "failed": evaluation.failed,
        "results": evaluation.results,
        "confusion": {kind: tally.matrix.counts.tolist() for kind, tally in evaluation.tallies.items()},
    }
    metrics = write_json(folder / "metrics.json", values)
    return metrics, write_text(folder / "report.md", markdown(evaluation, settings, pictures))


def markdown(evaluation: Evaluation, settings: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """Write the report as Markdown: what was evaluated, means, classes, failures, pictures."""
    parts = ["# Evaluation\n", *(f"* {name}: {code(value)}" for name, value in settings.items())]
    parts.append(f"* images: {evaluation.images}, failed: {len(evaluation.failed)}\n")
    parts += [f"* **{plain(name)}** failed: {plain(message)}" for name, message in evaluation.failed.items()]
    parts += ["\nAll figures are percent. A class that is absent from the truth has no IoU.\n"]
    parts += [f"* *{kind}*: {MEANINGS[kind]}" for kind in evaluation.results]
    rows = [[kind, *(_cell(result[key]) for key in SUMMARY)] for kind, result in evaluation.results.items()]
    parts += ["", _table(["result", *SUMMARY.values()], rows)]
    for kind, result in evaluation.results.items():
        rows = [[plain(name), *(_cell(row[key]) for key in COLUMNS)] for name, row in result["classes"].items()]
        parts += [f"\n## {kind}\n", _table(["class", *COLUMNS.values()], rows)]
        parts += [f"\n![Confusion matrix of {kind}]({pictures[kind].name})"]
    return "\n".join(parts) + "\n"


def draw_confusion(counts: Tensor, class_names: Sequence[str], title: str, path: Path) -> None:
    """Draw a confusion matrix: for each true class (row), the share of its pixels assigned to each class.

    Args:
        counts: (C+1, C+1), pixels.
        class_names: of the C foreground classes.
        title: above the picture.
        path: PNG.
    """
    names = ["background", *class_names]
    true = counts.sum(1, keepdim=True).clamp(min=1)
    shares = (100 * counts.double() / true).numpy()
    side = 3 + 0.32 * len(names)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.title.set_fontsize(9)
    if len(names) <= 25:
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] < 60 else "black"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(picture, label="% of the true class's pixels", shrink=0.7)
    with atomic_file(path, sync=False) as file:
        figure.savefig(file, format="png")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
