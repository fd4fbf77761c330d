"""Draw and tabulate what the benches recorded: ``python -m bench.plot``.

Writes ``waterfall.svg``, ``table_4.svg`` and ``engines.svg`` in ``docs/images``, and the tables between the markers
``<!-- figures: NAME -->`` and ``<!-- end -->`` of README.md, docs/performance.md and docs/evidence.md. Every figure
there comes from ``bench/results``.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.counted import tabulate_counts
from bench.harness import RESULTS
from bench.profile import tabulate_profiles
from bench.seeds import KINDS
from fsr_fast.commands.paper_tables import TABLES

ROOT = RESULTS.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "evidence.md")
PICTURES = ROOT / "docs" / "images"
Cases = dict[str, dict[str, Any]]
OPTIONS = {"graphs": "graphs", "fp8": "CAMs in float8"}
WAITING = {
    "openmp": "OpenMP's default, 300,000 turns",
    "10,000 turns": "10,000 turns, then sleep",
    "passive": "sleep at once",
}


def read_cases(results: Path, bench: str) -> list[Cases]:
    """Read one bench's records of all devices, GPUs first."""
    files = sorted(results.glob(f"*/{bench}.json"), key=lambda file: (file.parent.name.startswith("cpu-"), file))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


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
    rows = _rows_of(cases, number)
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


def tabulate_steps(records: list[Cases]) -> str:
    """Return the table of whole steps that `python -m bench.step` recorded."""
    lines = [
        "| device | preset | backbone | pixels, batch | engine | how | seconds | images/s | TFLOP/s | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cases in records:
        for content in cases.values():
            if "technique" not in content:
                continue
            setting, technique, row = content["setting"], content["technique"], content["rows"][0]
            shares = ", ".join(f"{row[name]:.0%}" for name in ("of_ceiling", "of_peak") if name in row)
            used = [title for name, title in OPTIONS.items() if technique.get(name)]
            rate = f"{row['tflops_per_second']:.3g} ({shares})" if "units" in row else "not counted"
            cells = (
                content["device"],
                setting["preset"],
                setting["backbone"],
                f"{setting['size']}², {setting['batch']}",
                technique["engine"],
                ", ".join(["fp32" if technique["amp"] == "off" else technique["amp"], *used]),
                f"{row['seconds']:.3g}",
                f"{row['images_per_second']:.3g}",
                rate,
                f"{row['peak_gib']:.2g} GiB",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate_kernels(results: Path) -> str:
    """Return the table of all kernels: median time of eager PyTorch, of its compiled form, and of ours."""
    lines = ["| kernel | device | phase | eager | compiled | ours | of roofline |", "|---|---|---|---|---|---|---|"]
    for file in sorted(results.glob("*/*.json")):
        for case, content in json.loads(file.read_text(encoding="utf-8")).items():
            rows = content.get("rows")
            if not isinstance(rows, list) or "phase" not in rows[0]:
                continue
            for phase in dict.fromkeys(row["phase"] for row in rows):
                named = {row["implementation"]: row for row in rows if row["phase"] == phase}
                times = [
                    f"{named[name].get('graph_ms', named[name]['median_ms']):.3g} ms" if name in named else "-"
                    for name in ("eager", "compiled", "ours")
                ]
                share = named["ours"].get("roofline_percent")
                cells = (case, content["device"], phase, *times, "-" if share is None else f"{share:.0f} %")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate_data(records: list[Cases]) -> str:
    """Return the table of the data pipelines."""
    lines = [
        "| device | views | images | pipeline | images/s | CPU time per image | host memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for cases in records:
        for case, content in cases.items():
            for row in content["rows"]:
                cells = (
                    content["device"],
                    case.removeprefix("data "),
                    content["images"],
                    row["implementation"],
                    f"{row['images_per_second']:.3g}",
                    f"{row['cpu_ms_per_image']:.3g} ms",
                    f"{row['host_memory_mib'] / 1024:.2g} GiB",
                )
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate_rehearsal(records: list[Cases]) -> str:
    """Return the table of the rehearsals at full size."""
    lines = [
        "| layout | images (train, val) | part | CPU seconds | memory | open files |",
        "|---|---|---|---|---|---|",
    ]
    for cases in records:
        for content in cases.values():
            limit = f", {content['limit']:,} images" if content["limit"] else ""
            side = f", views of {content['size']} pixels" if "size" in content else ""
            cells = (
                content["layout"],
                ", ".join(f"{count:,}" for count in content["images"]),
                content["part"] + limit + side,
                f"{content['cpu_seconds']:.3g}",
                f"{content['memory_mib'] / 1024:.2f} GiB",
                str(content["open_files"]),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate_seeds(records: list[Cases]) -> str:
    """Return the table of the demonstration from several seeds: means, and the class that is worst."""
    lines = ["| seed | pseudo | worst class | seg | worst class |", "|---|---|---|---|---|"]
    for cases in records:
        runs = sorted(cases.values(), key=lambda content: content["seed"])
        rows = [[_with_worst(content[kind]) for kind in KINDS] for content in runs]
        for content, row in zip(runs, rows, strict=True):
            cells = [cell for mean, name, worst in row for cell in (f"{mean:.1f}", f"{name} {worst:.1f}")]
            lines.append(f"| {content['seed']} | {' | '.join(cells)} |")
        summary = []
        for kind in zip(*rows, strict=True):
            _, name, worst = min(kind, key=lambda row: row[2])
            summary += [f"**{statistics.fmean(row[0] for row in kind):.1f}**", f"**{name} {worst:.1f}**"]
        lines.append(f"| **mean, worst of all** | {' | '.join(summary)} |")
    return "\n".join(lines)


def tabulate_classes(records: list[Cases]) -> str:
    """Return the IoUs of each class of every run that is recorded, and their means."""
    runs = [run for cases in records for run in cases.values()]
    titles = [f"{kind}, {run['device']}" for run in runs for kind in KINDS]
    lines = [f"| IoU | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    scored = [run[kind] for run in runs for kind in KINDS]
    rows = {name: [scores["classes"][name] for scores in scored] for name in (scored[0]["classes"] if scored else ())}
    rows["**mean**"] = [scores["mean"] for scores in scored]
    lines += [f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |" for name, values in rows.items()]
    return "\n".join(lines)


def tabulate_rows(records: list[Cases], number: int) -> str:
    """Return the rows of one of the paper's tables, trained on the embedded data set."""
    lines = [f"| row | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    for cases in records:
        for content in _rows_of(cases, number):
            runs = content["seeds"].values()
            lines.append(f"| {content['row']} | {' | '.join(_spread([run[kind] for run in runs]) for kind in KINDS)} |")
    return "\n".join(lines)


def _rows_of(cases: Cases, number: int) -> list[dict[str, Any]]:
    """Return what is recorded of one of the paper's tables, in the paper's order."""
    order = list(TABLES[number].rows)
    return sorted(
        (content for content in cases.values() if content["table"] == number),
        key=lambda content: order.index(content["row"]),
    )


def tabulate_official(records: list[Cases], whole: bool) -> str:
    """Return the table of the differences from the official code: all of them, or the largest of each kind."""
    lines = ["| what | largest difference |", "|---|---:|"]
    for cases in records:
        for content in cases.values():
            rows: dict[str, float] = {}
            for name, value in content["differences"].items():
                kind = name if whole else _kind_of_difference(name, content["iterations"])
                rows[kind] = max(value, rows.get(kind, 0.0))
            lines += [f"| {name} | {value:.1e} |" for name, value in rows.items()]
    return "\n".join(lines)


def _kind_of_difference(name: str, iterations: int) -> str:
    part, _, rest = name.partition(": ")
    if part == "loop":
        part = f"{iterations} iterations"
        rest = "losses" if rest.startswith("loss ") and "energy" not in rest else rest.removeprefix("loss ")
        return f"{part}: {rest}"
    energy = "dense energy and its gradient" if "energy" in rest else ""
    return f"{part}: {energy}" if energy else {"network": "network: all outputs", "operation": "operations"}[part]


def tabulate_depth(shared: list[Cases], never: list[Cases]) -> str:
    """Return the table of the demonstration with its own `teacher.stochastic_depth`, `shared`, and with `never`."""
    scores = {
        name: {content["seed"]: content for cases in records for content in cases.values()}
        for name, records in (("shared", shared), ("never", never))
    }
    seeds = sorted(set(scores["shared"]) & set(scores["never"]))
    lines = [f"| mIoU of seeds {', '.join(map(str, seeds))} | pseudo | seg |", "|---|---|---|"]
    runs = {name: [[known[seed][kind]["mean"] for seed in seeds] for kind in KINDS] for name, known in scores.items()}
    for name, kinds in runs.items():
        lines.append(f"| `{name}` | {' | '.join(_spread(values) for values in kinds)} |")
    pairs = ([own - other for own, other in zip(*kinds, strict=True)] for kinds in zip(*runs.values(), strict=True))
    lines.append(f"| `shared` - `never`, seed by seed | {' | '.join(_spread(values, '+.1f') for values in pairs)} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str = ".1f") -> str:
    """Return values, their mean and their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{', '.join(format(value, form) for value in values)}: {format(statistics.fmean(values), form)}{deviation}"


def _with_worst(scores: dict[str, Any]) -> tuple[float, str, float]:
    """Return the mean, and name and IoU of the worst class."""
    name, worst = min(scores["classes"].items(), key=lambda item: item[1])
    return scores["mean"], name, worst


def tabulate_waiting(records: list[Cases]) -> str:
    """Return the table of a training's speed under settings of OpenMP, alone and beside a busy process."""
    lines = ["| threads | waiting threads | alone | beside a busy process |", "|---|---|---|---|"]
    for cases in records:
        for threads in sorted({content["threads"] for content in cases.values()}, reverse=True):
            alone, beside = (cases[f"waiting {others} {threads}"]["pictures_per_second"] for others in (0, 1))
            for name, title in WAITING.items():
                cells = (_spread(rates[name], ".0f") for rates in (alone, beside))
                lines.append(f"| {threads} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate_sizes(records: list[Cases]) -> str:
    """Return the table of installation sizes on disk."""
    lines = ["| installation | on disk |", "|---|---|"]
    for cases in records:
        lines += [f"| {content['installation']} | {content['bytes'] / 1e9:.1f} GB |" for content in cases.values()]
    return "\n".join(lines)


def tabulate(results: Path) -> dict[str, str]:
    """Return every table by the name of its markers."""
    return {
        "steps": tabulate_steps(read_cases(results, "step")),
        "profile": tabulate_profiles(read_cases(results, "profile")),
        "kernels": tabulate_kernels(results),
        "data": tabulate_data(read_cases(results, "data")),
        "seeds": tabulate_seeds(read_cases(results, "seeds")),
        "photographs": tabulate_classes(read_cases(results, "photographs")),
        "official": tabulate_official(read_cases(results, "official"), whole=False),
        "official in full": tabulate_official(read_cases(results, "official"), whole=True),
        "waiting": tabulate_waiting(read_cases(results, "waiting")),
        "sizes": tabulate_sizes(read_cases(results, "sizes")),
        **{f"table {number}": tabulate_rows(read_cases(results, "tables"), number) for number in (3, 4)},
        "depth": tabulate_depth(read_cases(results, "seeds"), read_cases(results, "depth")),
        "counted": tabulate_counts(read_cases(results, "counts"), read_cases(results, "counts_before")),
        "rehearsal": tabulate_rehearsal(read_cases(results, "rehearsal")),
    }


def fill(text: str, tables: dict[str, str]) -> str:
    """Put the tables between their markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


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
