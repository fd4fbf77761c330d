"""Run the rows of one of the paper's tables: `fsr-fast ablate --table 4 --config F.yaml [--seeds 0 1 2]`.

A row is a recipe with a few keys changed. Each row and seed has a run folder of its own below the output folder. The
same command goes on where it stopped: finished runs are read, not repeated. `table.md` and `table.json` are written
anew after every run.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsr_fast.cli import run_command
from fsr_fast.config import CONFIG_FOLDER, Config, build_config, dump_config, load_config, read_yaml
from fsr_fast.errors import UserError, nearest
from fsr_fast.options import Parser
from fsr_fast.runtime.distributed import Process, start_process, stop_process
from fsr_fast.runtime.files import write_json, write_text
from fsr_fast.runtime.run_folder import CONFIG_FILE, claim_run_folder
from fsr_fast.trainer import Trainer

Changes = dict[str, dict[str, Any]]
"""Values that a row gives to keys, by section."""

KINDS = ("pseudo", "seg")
ABSENT = "\u2013"
PAPER_COLUMN = "paper (VOC val, not ours)"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)

Score = dict[str, float | None]
"""`mean` and `std`, mean IoU in percent; `std` is None where there is none."""


class PaperTable(NamedTuple):
    """One of the paper's tables."""

    title: str
    rows: dict[str, Changes]
    full_method: str
    """The row that is the paper's full method."""
    paper: dict[str, dict[str, Score]]
    """What the paper gives for its rows, by kind: on PASCAL VOC val, without CRF."""


def _augment(**changes: Any) -> Changes:
    return {"augment": {"blur": 0.0, "solarise": 0.0, "policy": "none"} | changes}


def _mask(strategy: str, **changes: Any) -> Changes:
    """Return a row of Table 3, which the paper trains without L_c."""
    return {"mask": {"strategy": strategy, **changes}, "loss": {"class_token": 0.0}}


def _losses(aggregation: str, *off: str) -> Changes:
    changes: Changes = {"model": {"aggregation": aggregation}}
    return changes | ({"loss": dict.fromkeys(off, 0.0)} if off else {})


def _paper(pseudo: float, seg: float, stds: tuple[float, float] | None = None) -> dict[str, Score]:
    return {
        kind: {"mean": mean, "std": std}
        for kind, mean, std in zip(KINDS, (pseudo, seg), stds or (None, None), strict=True)
    }


def _paper_ratios(strategy: str, pseudo: Sequence[float], seg: Sequence[float]) -> dict[str, dict[str, Score]]:
    return {f"{strategy}_{ratio}": _paper(p, s) for ratio, p, s in zip(RATIOS, pseudo, seg, strict=True)}


TABLES = {
    3: PaperTable(
        "which patches are masked, trained without L_c; full: uncertain_0.4 with it",
        {
            "edge_strict": _mask("edge_strict"),
            "cam_strict": _mask("cam_strict"),
            **{
                f"{strategy}_{ratio}": _mask(strategy, ratio=ratio)
                for strategy in ("random", "uncertain")
                for ratio in RATIOS
            },
            "full": {"mask": {"strategy": "uncertain", "ratio": 0.4}},
        },
        "full",
        {
            "edge_strict": _paper(73.3, 71.6),
            "cam_strict": _paper(74.0, 71.8),
            **_paper_ratios("random", (73.1, 73.6, 74.1, 74.2, 73.2), (71.7, 72.3, 71.3, 72.3, 71.2)),
            **_paper_ratios("uncertain", (74.1, 74.2, 73.9, 74.4, 73.7), (72.2, 72.3, 72.0, 72.5, 72.1)),
        },
    ),
    4: PaperTable(
        "self-reinforcement of uncertain patches (unc) and of certain ones (cer) by three aggregations",
        {
            "none": _losses("mca", "uncertain", "class_token"),
            "unc": _losses("mca", "class_token"),
            "cer_gap": _losses("gap", "uncertain"),
            "cer_gmp": _losses("gmp", "uncertain"),
            "cer_mca": _losses("mca", "uncertain"),
            "both": _losses("mca"),
        },
        "both",
        {
            "none": _paper(71.1, 67.9),
            "unc": _paper(74.4, 72.5),
            "cer_gap": _paper(72.3, 70.9),
            "cer_gmp": _paper(71.8, 70.0),
            "cer_mca": _paper(75.2, 73.3),
            "both": _paper(75.7, 73.6),
        },
    ),
    5: PaperTable(
        "further augmentation; a learned policy takes the place of colour jitter, but for the rows named jitter",
        {
            "none": _augment(),
            "blur": _augment(blur=0.1),
            "solarise": _augment(solarise=0.2),
            "autoaugment": _augment(policy="autoaugment", jitter=0.0),
            "autoaugment_jitter": _augment(policy="autoaugment"),
            "randaugment": _augment(policy="randaugment", jitter=0.0, crop_scale=(0.08, 1.0)),  # the official code's
            "randaugment_jitter": _augment(policy="randaugment"),
        },
        "none",
        {
            "none": _paper(75.7, 73.6),
            "blur": _paper(75.9, 73.6, (0.05, 0.02)),
            "solarise": _paper(75.3, 73.2, (0.12, 0.06)),
            "autoaugment": _paper(74.8, 72.8, (0.09, 0.04)),
        },
    ),
}

Scores = Mapping[tuple[str, int], dict[str, Any] | None]
"""Scores of each row and seed; none where the run is not finished."""


def main(arguments: Sequence[str]) -> None:
    """Run a table's rows as the arguments say."""
    options, overrides = build_parser().parse_known_args(arguments)
    chosen = _choose_rows(options.table, options.rows)
    _check_overrides(options.table, overrides)
    base, print_only = load_config(["--config", str(options.config), *overrides])
    if base.data.val_list is None:
        raise UserError("data.val_list: none; a table needs scores, and so a list of images with masks")
    output = options.output or base.run.output.with_name(f"{base.run.output.name}_table_{options.table}")
    seeds = list(dict.fromkeys(options.seeds))
    rows = TABLES[options.table].rows
    runs = {
        (row, seed): row_config(base, rows[row], output / row / f"seed_{seed}", seed) for row in rows for seed in seeds
    }
    if print_only:
        print("\n".join(f"# {row}\n{dump_config(runs[row, seeds[0]])}" for row in chosen))
        return
    scores = {key: read_finished(config) for key, config in runs.items()}
    process = start_process(base.run.device, base.run.timeout)
    try:
        for row, seed in ((row, seed) for row in chosen for seed in seeds):
            if scores[row, seed] is None:
                if process.is_main:
                    print(f"table {options.table}: row {row}, seed {seed}", flush=True)
                scores[row, seed] = _train(runs[row, seed], process)
            if process.is_main:
                write_table(output, options.table, base, seeds, scores)
        if process.is_main:
            print((output / "table.md").read_text(encoding="utf-8"))
            print(f"table: {output / 'table.md'}")
    finally:
        stop_process()


def row_config(base: Config, changes: Changes, folder: Path, seed: int) -> Config:
    """Return the configuration of a row.

    Args:
        base: the recipe.
        changes: what the row changes.
        folder: its run folder.
        seed: its seed.

    Raises:
        UserError: the recipe and the row do not go together.
    """
    values = base.model_dump(mode="json")
    for section, content in {**changes, "run": {"output": str(folder), "seed": seed}}.items():
        values[section] |= content
    return build_config(values, str(folder))


def read_finished(config: Config) -> dict[str, Any] | None:
    """Read the scores of a run, if it is finished.

    Args:
        config: of the run.

    Returns:
        Mean IoU of each kind, as in its summary.json; none where the run is to be started or to go on.

    Raises:
        UserError: the run folder holds another run, one that is evaluated otherwise, or a damaged summary.
    """
    folder = config.run.output
    claim_run_folder(config)
    if not (folder / CONFIG_FILE).is_file():
        return None
    recorded = build_config(read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if recorded.evaluate != config.evaluate:
        raise UserError(
            f"{folder} was last started with other values of evaluate: a table compares like with like; give another "
            "--output, delete the folder, or repeat the values that made it"
        )
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {f"{kind}_miou": summary[f"{kind}_miou"] for kind in KINDS}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder / 'summary.json'}: damaged; delete it, and the row is evaluated again") from None


def write_table(folder: Path, number: int, base: Config, seeds: Sequence[int], scores: Scores) -> None:
    """Write table.md and table.json.

    Args:
        folder: where to.
        number: of the paper's table.
        base: the recipe.
        seeds: those of each row.
        scores: what is known of each row and seed.
    """
    table = TABLES[number]
    content = {
        "table": number,
        "title": table.title,
        "metric": f"mean IoU in percent on the list {base.data.val_list} of {base.data.dataset}, without CRF",
        "images": base.evaluate.limit or "all",
        "iterations": base.optim.iterations,
        "seeds": list(seeds),
        "rows": [_row(row, number, [(seed, scores[row, seed]) for seed in seeds]) for row in table.rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", content)
    write_text(folder / "table.md", _markdown(content))


def _row(row: str, number: int, summaries: Sequence[tuple[int, dict[str, Any] | None]]) -> dict[str, Any]:
    table = TABLES[number]
    runs = {
        str(seed): {kind: summary[f"{kind}_miou"] for kind in KINDS}
        for seed, summary in summaries
        if summary is not None
    }
    return {
        "row": row,
        "changes": table.rows[row],
        "seeds": runs,
        **{kind: _mean_and_deviation([run[kind] for run in runs.values()]) for kind in KINDS},
        PAPER_COLUMN: table.paper.get(row),
    }


def _markdown(content: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, content["seeds"]))
    lines = [
        f"# Table {content['table']}: {content['title']}",
        "",
        f"Values: {content['metric']} ({content['images']} images), after {content['iterations']} iterations; "
        f"mean ± sample standard deviation over the finished seeds of {seeds}.",
        "",
        f"| row | pseudo | seg | finished seeds | {PAPER_COLUMN}: pseudo / seg |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        paper = row[PAPER_COLUMN]
        numbers = ABSENT if paper is None else " / ".join(_cell(paper[kind], ".2f") for kind in KINDS)
        cells = [row["row"], *(_cell(row[kind]) for kind in KINDS), str(len(row["seeds"])), numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _train(config: Config, process: Process) -> dict[str, Any]:
    trainer = Trainer(config, process)
    try:
        return trainer.run()
    finally:
        trainer.close()


def _mean_and_deviation(values: Sequence[float | None]) -> Score:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }


def _cell(score: Score, std_format: str = ".1f") -> str:
    mean, std = score["mean"], score["std"]
    if mean is None:
        return ABSENT
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:{std_format}}"


def _choose_rows(number: int, names: Sequence[str] | None) -> list[str]:
    rows = TABLES[number].rows
    for name in names or ():
        if name not in rows:
            raise UserError(f"--rows: table {number} has no row {name!r}{nearest(name, rows)}")
    return list(dict.fromkeys(names or rows))


def _check_overrides(number: int, overrides: Sequence[str]) -> None:
    varied = {
        f"{section}.{key}": f"table {number} varies it"
        for changes in TABLES[number].rows.values()
        for section, content in changes.items()
        for key in content
    }
    taken = {"run.output": "give --output", "run.seed": "give --seeds", **varied}
    for argument in overrides:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key in taken:
            raise UserError(f"command line: --{key} cannot be given here: {taken[key]}")


def build_parser() -> Parser:
    """Build the parser of this verb."""
    parser = Parser(
        "ablate",
        description=__doc__,
        epilog="Every other option is one of the recipe, --section.key value, and holds for all rows.",
    )
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True, help="number of the paper's table")
    parser.add_argument("--config", type=Path, default=CONFIG_FOLDER / "synthetic.yaml", help="recipe of all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each row (default: 0)")
    parser.add_argument("--rows", nargs="+", help="run only these rows (default: all)")
    parser.add_argument("--output", type=Path, help="folder of the table and its runs; by default beside run.output")
    return parser


if __name__ == "__main__":
    run_command(main)
