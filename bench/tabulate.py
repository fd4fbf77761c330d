"""The tables that the documents show, made of what the benches recorded."""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.markdown import table
from bench.profile import tabulate_profiles
from bench.seeds import KINDS
from fsr_fast.commands.paper_tables import TABLES

Cases = dict[str, dict[str, Any]]
OPTIONS = {"graphs": "graphs", "fp8": "CAMs in float8", "tune": "tuned products"}
WAITING = {
    "openmp": "OpenMP's default, 300,000 turns",
    "10,000 turns": "10,000 turns, then sleep",
    "passive": "sleep at once",
}


def read_cases(results: Path, bench: str) -> list[Cases]:
    """Read one bench's records of all devices, GPUs first."""
    files = sorted(results.glob(f"*/{bench}.json"), key=lambda file: (file.parent.name.startswith("cpu-"), file))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def fill(text: str, tables: dict[str, str]) -> str:
    """Put the tables between their markers."""
    for name, content in tables.items():
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, inner=content: f"{found[1]}{inner}\n{found[2]}", text, flags=re.DOTALL)
    return text


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
        "tiles": tabulate_tiles(read_cases(results, "tiles")),
        "large pictures": tabulate_large(read_cases(results, "evaluation_cost")),
    }


def _contents(records: Iterable[Cases]) -> list[dict[str, Any]]:
    """Return what is recorded of all cases."""
    return [content for cases in records for content in cases.values()]


def tabulate_steps(records: list[Cases]) -> str:
    """Return the table of whole steps that `python -m bench.step` recorded."""
    rows = []
    for content in _contents(records):
        if "technique" not in content:
            continue
        setting, technique, row = content["setting"], content["technique"], content["rows"][0]
        shares = ", ".join(f"{row[name]:.0%}" for name in ("of_ceiling", "of_peak") if name in row)
        used = [title for name, title in OPTIONS.items() if technique.get(name)]
        rows.append(
            (
                content["device"],
                setting["preset"],
                setting["backbone"],
                f"{setting['size']}², {setting['batch']}",
                technique["engine"],
                ", ".join(["fp32" if technique["amp"] == "off" else technique["amp"], *used]),
                f"{row['seconds']:.3g}",
                f"{row['images_per_second']:.3g}",
                f"{row['tflops_per_second']:.3g} ({shares})" if "units" in row else "not counted",
                f"{row['peak_gib']:.2g} GiB",
            )
        )
    titles = ("device", "preset", "backbone", "pixels, batch", "engine", "how", "seconds")
    return table((*titles, "images/s", "TFLOP/s", "peak"), rows)


def tabulate_kernels(results: Path) -> str:
    """Return the table of all kernels: median time of eager PyTorch, of its compiled form, and of ours."""
    lines = []
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
                lines.append((case, content["device"], phase, *times, "-" if share is None else f"{share:.0f} %"))
    return table(("kernel", "device", "phase", "eager", "compiled", "ours", "of roofline"), lines)


def tabulate_data(records: list[Cases]) -> str:
    """Return the table of the data pipelines."""
    rows = [
        (
            content["device"],
            case.removeprefix("data "),
            content["images"],
            row["implementation"],
            f"{row['images_per_second']:.3g}",
            f"{row['cpu_ms_per_image']:.3g} ms",
            f"{row['host_memory_mib'] / 1024:.2g} GiB",
        )
        for cases in records
        for case, content in cases.items()
        for row in content["rows"]
    ]
    return table(("device", "views", "images", "pipeline", "images/s", "CPU time per image", "host memory"), rows)


def tabulate_rehearsal(records: list[Cases]) -> str:
    """Return the table of the rehearsals at full size."""
    rows = []
    for content in _contents(records):
        limit = f", {content['limit']:,} images" if content["limit"] else ""
        side = f", views of {content['size']} pixels" if "size" in content else ""
        rows.append(
            (
                content["layout"],
                ", ".join(f"{count:,}" for count in content["images"]),
                content["part"] + limit + side,
                f"{content['cpu_seconds']:,.{0 if content['cpu_seconds'] >= 100 else 1}f}",
                f"{content['memory_mib'] / 1024:.2f} GiB",
                str(content["open_files"]),
            )
        )
    return table(("layout", "images (train, val)", "part", "CPU seconds", "memory", "open files"), rows)


def tabulate_tiles(records: list[Cases]) -> str:
    """Return the table of how far tiles with an overlap of a quarter differ from the whole picture."""
    rows = []
    for cases in records:
        for case, content in cases.items():
            for row in (row for row in content["tilings"] if row["overlap"] == 0.25):
                scores = (row["mean_iou"], content["whole_mean_iou"])
                rows.append(
                    (
                        f"{case.removeprefix('tiles ')} ({row['pictures']})",
                        str(row["tile"]),
                        *(f"{row[part]:.2f} %" for part in ("differ", "beside_seams", "pseudo_differ")),
                        *("-" if score is None else f"{score:.1f}" for score in scores),
                    )
                )
    titles = ("pictures", "tile", "segmentation", "beside seams", "pseudo labels", "mIoU in tiles", "mIoU whole")
    return table(titles, rows)


def tabulate_large(records: list[Cases]) -> str:
    """Return the table of seconds per megapixel and peak memory, whole and in tiles."""
    rows = [
        (
            "whole" if row["tile"] is None else f"tiles of {row['tile']}",
            f"{row['megapixels']:.3g}",
            f"{row['seconds']:.3g}",
            f"{row['seconds'] / row['megapixels']:.3g}",
            f"{row['peak_mib'] / 1024:.2f} GiB",
        )
        for content in _contents(records)
        for row in content["rows"]
    ]
    return table(("how", "megapixels", "seconds", "seconds per megapixel", "memory"), rows)


def tabulate_seeds(records: list[Cases]) -> str:
    """Return the table of the demonstration from several seeds: means, and the class that is worst."""
    lines = []
    for cases in records:
        runs = sorted(cases.values(), key=lambda content: content["seed"])
        rows = [[_with_worst(content[kind]) for kind in KINDS] for content in runs]
        for content, row in zip(runs, rows, strict=True):
            cells = [cell for mean, name, worst in row for cell in (f"{mean:.1f}", f"{name} {worst:.1f}")]
            lines.append([str(content["seed"]), *cells])
        summary = []
        for kind in zip(*rows, strict=True):
            _, name, worst = min(kind, key=lambda row: row[2])
            summary += [f"**{statistics.fmean(row[0] for row in kind):.1f}**", f"**{name} {worst:.1f}**"]
        lines.append(["**mean, worst of all**", *summary])
    return table(("seed", "pseudo", "worst class", "seg", "worst class"), lines)


def tabulate_classes(records: list[Cases]) -> str:
    """Return the IoUs of each class of every run that is recorded, and their means."""
    runs = _contents(records)
    scored = [run[kind] for run in runs for kind in KINDS]
    rows = {name: [scores["classes"][name] for scores in scored] for name in (scored[0]["classes"] if scored else ())}
    rows["**mean**"] = [scores["mean"] for scores in scored]
    lines = [[name, *(f"{value:.1f}" for value in values)] for name, values in rows.items()]
    return table(["IoU", *(f"{kind}, {run['device']}" for run in runs for kind in KINDS)], lines)


def tabulate_rows(records: list[Cases], number: int) -> str:
    """Return the rows of one of the paper's tables, trained on the embedded data set."""
    lines = []
    for content in (content for cases in records for content in rows_of(cases, number)):
        runs = content["seeds"].values()
        lines.append([content["row"], *(_spread([run[kind] for run in runs]) for kind in KINDS)])
    return table(("row", *KINDS), lines)


def rows_of(cases: Cases, number: int) -> list[dict[str, Any]]:
    """Return what is recorded of one of the paper's tables, in the paper's order."""
    order = list(TABLES[number].rows)
    return sorted(
        (content for content in cases.values() if content["table"] == number),
        key=lambda content: order.index(content["row"]),
    )


def tabulate_official(records: list[Cases], whole: bool) -> str:
    """Return the table of the differences from the official code: all of them, or the largest of each kind."""
    lines = []
    for content in _contents(records):
        rows: dict[str, float] = {}
        for name, value in content["differences"].items():
            kind = name if whole else _kind_of_difference(name, content["iterations"])
            rows[kind] = max(value, rows.get(kind, 0.0))
        lines += [(name, f"{value:.1e}") for name, value in rows.items()]
    return table(("what", "largest difference"), lines)


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
        name: {content["seed"]: content for content in _contents(records)}
        for name, records in (("shared", shared), ("never", never))
    }
    seeds = sorted(set(scores["shared"]) & set(scores["never"]))
    runs = {name: [[known[seed][kind]["mean"] for seed in seeds] for kind in KINDS] for name, known in scores.items()}
    lines = [[f"`{name}`", *map(_spread, kinds)] for name, kinds in runs.items()]
    pairs = ([own - other for own, other in zip(*kinds, strict=True)] for kinds in zip(*runs.values(), strict=True))
    lines.append(["`shared` - `never`, seed by seed", *(_spread(values, "+.1f") for values in pairs)])
    return table((f"mIoU of seeds {', '.join(map(str, seeds))}", *KINDS), lines)


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
    lines = []
    for cases in records:
        for threads in sorted({content["threads"] for content in cases.values()}, reverse=True):
            alone, beside = (cases[f"waiting {others} {threads}"]["pictures_per_second"] for others in (0, 1))
            for name, title in WAITING.items():
                lines.append([str(threads), title, *(_spread(rates[name], ".0f") for rates in (alone, beside))])
    return table(("threads", "waiting threads", "alone", "beside a busy process"), lines)


def tabulate_sizes(records: list[Cases]) -> str:
    """Return the table of installation sizes on disk."""
    rows = [(content["installation"], f"{content['bytes'] / 1e9:.1f} GB") for content in _contents(records)]
    return table(("installation", "on disk"), rows)


def tabulate_counts(now: list[Cases], before: list[Cases]) -> str:
    """Return the table of what `bench.counts` counts, beside what it counted at an earlier commit.

    Args:
        now: records of `counts`.
        before: records of `counts_before`, the same of an earlier commit.
    """
    rows = []
    earlier = {case.split(" ", 1)[1]: content["counts"] for cases in before for case, content in cases.items()}
    for cases in now:
        for case, content in cases.items():
            name = case.split(" ", 1)[1]
            for number, (figure, value) in enumerate(content["counts"].items()):
                known = earlier.get(name, {}).get(figure)
                both = "-" if known is None else _rounded(known), _rounded(value)
                rows.append(("" if number else name, figure, *both))
    return table(("what", "figure", "before", "now"), rows)


def _rounded(value: float) -> str:
    """Return a count, in three digits where it is large."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"
