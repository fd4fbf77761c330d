"""The page of a report: one self-contained HTML file that needs no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from fsr_fast.dataloading.images import read_image
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.reporting.charts import confusion, curves, entropy
from fsr_fast.reporting.figures import TEMPLATES, colourise, data_uri, heatmap, outline
from fsr_fast.reporting.gallery import CHOICES, Entry, Gallery
from fsr_fast.reporting.record import RunRecord

SNAPSHOTS = 8
"""Training pictures that are shown, evenly spaced."""


def render_page(runs: Sequence[RunRecord], galleries: Mapping[str, Gallery], classes: Sequence[str]) -> str:
    """Write the page.

    Args:
        runs: records of the runs; at least one, names unique.
        galleries: by name of the run; none for a run without checkpoint.
        classes: names of the foreground classes.
    """
    names = ["background", *classes]
    charts = curves(runs)
    sections: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        gallery = galleries.get(run.name)
        sections.append(
            {
                "id": f"run-{number + 1}",
                "run": run,
                "summary": _summary(run),
                "configuration": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
                "environment": _flat(run.environment),
                "snapshots": _snapshots(run),
                "gallery": gallery,
                "list": "validation" if run.config.get("data", {}).get("val_list") else "training",
                "entries": [_shown(entry, names) for entry in gallery.entries] if gallery else [],
                "confusion": confusion(gallery.matrix, names, f"confusion-{number + 1}")
                if gallery and gallery.matrix
                else None,
                "entropy": entropy(gallery.entropy, gallery.patches, f"entropy-{number + 1}") if gallery else None,
            }
        )
    drawn = [*charts, *(section[key] for section in sections for key in ("confusion", "entropy") if section[key])]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs),
        generator=_generator(runs),
        sections=sections,
        charts=charts,
        scores=_score_columns(runs),
        names=_all_classes(runs),
        differences=_differences(runs),
        choices=CHOICES,
        legend=[(name, _hex(label)) for label, name in enumerate(names)] + [("ignored", _hex(255))],
        specifications=Markup(_script_json({chart.key: json.loads(chart.figure.to_json()) for chart in drawn})),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def is_page_of(path: Path, runs: Sequence[RunRecord]) -> bool:
    """Return whether a file is a report of these runs."""
    with path.open("rb") as file:
        return f'content="{_generator(runs)}"'.encode() in file.read(2000)


def _generator(runs: Sequence[RunRecord]) -> str:
    folders = "\n".join(str(run.folder.resolve()) for run in runs)
    return f"fsr-fast report {hashlib.sha256(folders.encode(errors='replace')).hexdigest()[:16]}"


def mask_uri(mask: np.ndarray) -> str:
    """Return labels as a `data:` URI, in VOC's colours with white borders."""
    return data_uri(Image.fromarray(outline(colourise(mask), mask)), None, lossless=True)


def _shown(entry: Entry, names: Sequence[str]) -> dict[str, Any]:
    labels = " and ".join(entry.classes) or "no class"
    cells = [
        ("image", data_uri(Image.fromarray(entry.image)), f"{entry.name}, a picture of {labels}"),
        *(
            [("truth", mask_uri(entry.truth), f"true mask: {_shares(entry.truth, names)}")]
            if entry.truth is not None
            else []
        ),
        (
            "CAM" if entry.cam.any() else "CAM (empty)",
            data_uri(Image.fromarray(heatmap(entry.image, entry.cam))),
            f"class activation map of {labels}",
        ),
        ("pseudo", mask_uri(entry.pseudo), f"pseudo label: {_shares(entry.pseudo, names)}"),
        ("seg", mask_uri(entry.seg), f"segmentation: {_shares(entry.seg, names)}"),
        ("CRF", mask_uri(entry.crf), f"segmentation after the CRF: {_shares(entry.crf, names)}"),
    ]
    attention = [
        (
            f"block {number}",
            data_uri(Image.fromarray(heatmap(entry.image, block))),
            f"attention of the class token in block {number}, picture {entry.name}",
        )
        for number, block in enumerate(entry.attention, start=1)
    ]
    return {"entry": entry, "cells": cells, "attention": attention, "image": cells[0]}


def _shares(mask: np.ndarray, names: Sequence[str]) -> str:
    labels, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts)
    return ", ".join(
        f"{names[labels[i]] if labels[i] < len(names) else 'ignored'} {counts[i] / mask.size:.0%}" for i in order
    )


def _summary(run: RunRecord) -> list[tuple[str, str]]:
    known = [
        ("iterations", run.summary.get("iterations") or (run.metrics[-1]["iteration"] if run.metrics else 0), "{:,}"),
        *((f"{kind} mIoU", scores.get("mean_iou"), "{:.1f} %") for kind, scores in run.results.items()),
        ("mean average precision of the labels", run.labels.get("mean_ap"), "{:.1f} %"),
        ("images per second", run.summary.get("images_per_second"), "{:.1f}"),
        ("minutes", (run.summary.get("wall_seconds") or 0) / 60 or None, "{:.1f}"),
    ]
    return [(name, form.format(value)) for name, value, form in known if value is not None]


def _snapshots(run: RunRecord) -> list[tuple[int, str]]:
    count = len(run.pictures)
    chosen = {round(index) for index in np.linspace(0, count - 1, min(count, SNAPSHOTS))} if count else set()
    pictures = []
    for index in sorted(chosen):
        iteration, path = run.pictures[index]
        pictures.append((iteration, data_uri(read_image(path), 1400)))
    return pictures


def _score_columns(runs: Sequence[RunRecord]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{kind}, {run.name}" if len(runs) > 1 else kind, scores)
        for run in runs
        for kind, scores in run.results.items()
    ]


def _all_classes(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for scores in run.results.values() for name in scores["classes"]))


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key, "") for values in flat]) for key in keys if key != "run.output"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(values: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(values, Mapping):
        return [pair for key, value in values.items() for pair in _flat(value, f"{path}.{key}".removeprefix("."))]
    if isinstance(values, list):
        return [(path, ", ".join(map(str, values)) or "none")]
    return [(path, "none" if values is None else str(values))]


def _hex(label: int) -> str:
    return "#" + "".join(f"{value:02x}" for value in voc_palette()[label])


def _script_json(values: Any) -> str:
    return json.dumps(values).replace("<", "\\u003c")
