"""Draw and tabulate what the benches recorded: ``python -m bench.plot``.

Writes ``waterfall.svg``, ``table_4.svg`` and ``engines.svg`` in ``docs/images``, and the tables between the markers
``<!-- figures: NAME -->`` and ``<!-- end -->`` of README.md and the documents. Every figure there comes from
``bench/results``.
"""

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.harness import RESULTS
from bench.seeds import KINDS
from bench.tabulate import Cases, fill, read_cases, rows_of, tabulate

ROOT = RESULTS.parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("performance", "evidence", "large_pictures")),
)
PICTURES = ROOT / "docs" / "images"


def draw_waterfall(cases: Cases, path: Path) -> None:
    """Draw images per second, and peak memory on a GPU, from the reference step to ours.

    Args:
        cases: of the bench `step` on one device.
        path: SVG file.
    """
    chosen = {case: content for case, content in cases.items() if case.startswith("step waterfall paper")}
    on_gpu = not next(iter(chosen.values()))["device"].startswith("cpu-")
    fields = [("images_per_second", "images per second")] + [("peak_gib", "peak memory, GiB")] * on_gpu
    figure = Figure(figsize=(8, 1.2 + 1.5 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), len(fields), squeeze=False)
    for row, (case, content) in zip(grid, chosen.items(), strict=True):
        setting, names = content["setting"], list(content["rows"])
        for axes, (field, label) in zip(row, fields, strict=True):
            values = [content["rows"][name][field] for name in names]
            bars = axes.barh(names, values, color=["#9aa5b1"] * (len(names) - 1) + ["#1f6f8b"])
            texts = [f"{value:.3g}" + f"  (x{value / values[0]:.2g})" * (field == fields[0][0]) for value in values]
            axes.bar_label(bars, texts, padding=3)
            axes.invert_yaxis()
            axes.margins(x=0.25)
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_title(
            f"{case.split()[-1]}, {setting['size']} px, batch {setting['batch']}, {content['device']}", loc="left"
        )
    _save(figure, path)


def draw_rows(cases: Cases, number: int, path: Path) -> None:
    """Draw the rows of one of the paper's tables: a dot per seed, a line at the mean.

    Args:
        cases: of the bench `tables` on one device.
        number: of the table.
        path: SVG file.
    """
    rows = rows_of(cases, number)
    figure = Figure(figsize=(8, 1.0 + 0.4 * len(rows)), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        for place, row in enumerate(rows):
            values = [scores[kind] for scores in row["seeds"].values()]
            axes.plot(values, [place] * len(values), "o", color="#1f6f8b", alpha=0.6, markeredgewidth=0)
            axes.plot(statistics.fmean(values), place, "|", color="#222", markersize=16, markeredgewidth=2)
        axes.set_xlabel(f"{kind}, mIoU in percent")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _save(figure, path)


def draw_engines(engines: dict[str, list[Cases]], path: Path) -> None:
    """Draw the mIoUs of both engines against iterations and against seconds, a line per seed; pseudo labels dashed.

    Args:
        engines: records of `bench.seeds` with evaluations on the way, by the name of the engine.
        path: SVG file.
    """
    figure = Figure(figsize=(8, 3), layout="constrained")
    fields = {"iteration": "iterations", "wall_seconds": "seconds"}
    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), fields.items(), strict=True):
        for (name, records), colour in zip(engines.items(), ("#1f6f8b", "#d1793a"), strict=True):
            for content in (content for cases in records for content in cases.values()):
                for kind, dashes in zip(KINDS, ("--", "-"), strict=True):
                    points = [(line[field], line[f"{kind}_miou"]) for line in content["curve"]]
                    axes.plot(*zip(*points, strict=True), dashes, color=colour, alpha=0.8, marker="o", markersize=3)
            axes.plot([], color=colour, label=name)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mIoU in percent (dashed: pseudo)")
    figure.axes[0].legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG file, reproducibly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw and tabulate everything that is recorded."""
    tables = tabulate(RESULTS)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(fill(text, tables), encoding="utf-8")
    drawn = (cases for cases in read_cases(RESULTS, "step") if any(case.startswith("step waterfall") for case in cases))
    draw_waterfall(next(drawn), PICTURES / "waterfall.svg")
    for cases in read_cases(RESULTS, "tables"):
        draw_rows(cases, 4, PICTURES / "table_4.svg")
    if reference := read_cases(RESULTS, "reference"):
        draw_engines({"fast": read_cases(RESULTS, "fast"), "reference": reference}, PICTURES / "engines.svg")


if __name__ == "__main__":
    main()
