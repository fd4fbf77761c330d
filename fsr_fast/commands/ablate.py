"""Run the rows of one of the paper's tables: `fsr-fast ablate --table 4 --config F.yaml [--seeds 0 1 2]`.

A row is a recipe with a few keys changed. Each row and seed has a run folder of its own below the output folder. The
same command resumes: finished runs are read, not repeated. `table.md` and `table.json` are rewritten after every run.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.commands.paper_tables import KINDS, TABLES, Changes, Score
from fsr_fast.config import Config, build_config, dump_config, read_yaml, user_config
from fsr_fast.errors import UserError, nearest
from fsr_fast.options import given
from fsr_fast.runtime.distributed import Process, start_process, stop_process
from fsr_fast.runtime.files import write_json, write_text
from fsr_fast.runtime.run_folder import CONFIG_FILE, claim_run_folder
from fsr_fast.trainer import Trainer

ABSENT = "\u2013"
PAPER_COLUMN = "paper (VOC val, not ours)"

Scores = Mapping[tuple[str, int], dict[str, Any] | None]
"""Scores of each row and seed; None if the run is not finished."""


def main(arguments: Sequence[str]) -> None:
    """Run a table's rows as the arguments say."""
    options = parsers.ablate().parse_args(arguments)
    chosen = _choose_rows(options.table, options.rows)
    changes = given(options)
    _check_changes(options.table, changes)
    base = user_config(options.config, changes)
    if base.data.val_list is None:
        raise UserError("data.val_list: none; a table needs scores, hence a list of images with masks")
    output = options.output or base.run.output.with_name(f"{base.run.output.name}_table_{options.table}")
    seeds = list(dict.fromkeys(options.seeds))
    rows = TABLES[options.table].rows
    runs = {
        (row, seed): row_config(base, rows[row], output / row / f"seed_{seed}", seed) for row in rows for seed in seeds
    }
    if options.print_config:
        print("\n".join(f"# {row}\n{dump_config(runs[row, seeds[0]])}" for row in chosen))
        return
    scores = {key: read_finished(config) for key, config in runs.items()}
    _check_place(output, options.table)
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
        UserError: the recipe and the row are incompatible.
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
        Mean IoU of each kind, as in its summary.json; None if the run is still to be started or resumed.

    Raises:
        UserError: the run folder holds another run, one that was evaluated differently, or a damaged summary.
    """
    folder = config.run.output
    claim_run_folder(config)
    if not (folder / CONFIG_FILE).is_file():
        return None
    if build_config(read_yaml(folder / CONFIG_FILE), str(folder)).evaluate != config.evaluate:
        raise UserError(
            f"{folder} was last started with other evaluate settings, but a table compares equal ones; give another "
            "--output, delete the folder, or repeat those settings"
        )
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return {f"{kind}_miou": summary[f"{kind}_miou"] for kind in KINDS}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder / 'summary.json'}: damaged; delete it to evaluate the row again") from None


def write_table(folder: Path, number: int, base: Config, seeds: Sequence[int], scores: Scores) -> None:
    """Write table.md and table.json.

    Args:
        folder: of the table.
        number: of the paper's table.
        base: the recipe.
        seeds: of each row.
        scores: of each row and seed so far.
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


def _check_place(folder: Path, number: int) -> None:
    """Refuse to overwrite another table."""
    for name in ("table.json", "table.md"):
        text = (folder / name).read_text(encoding="utf-8", errors="replace") if (folder / name).is_file() else ""
        if (folder / name).exists() and TABLES[number].title not in text:
            raise UserError(f"--output: {folder / name} exists and is not table {number}; give another folder")


def _check_changes(number: int, changes: Iterable[str]) -> None:
    varied = {
        f"{section}.{key}": f"table {number} varies it"
        for row in TABLES[number].rows.values()
        for section, content in row.items()
        for key in content
    }
    taken = {"run.output": "give --output", "run.seed": "give --seeds", **varied}
    for key in changes:
        if key in taken:
            raise UserError(f"command line: --{key} cannot be given here: {taken[key]}")


if __name__ == "__main__":
    run_command(main)
