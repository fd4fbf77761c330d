"""Train the rows of one of the paper's tables on the embedded data set: ``python -m bench.tables --table 4``.

Runs `fsr-fast ablate` with the demonstration's recipe and records it: ``FSR_RECORD=1`` writes
``bench/results/<device>/tables.json``, from which ``python -m bench.plot`` makes table and picture. Finished runs are
read, not repeated.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import record
from fsr_fast.cli import run_command
from fsr_fast.commands import ablate
from fsr_fast.commands.paper_tables import TABLES


def main(arguments: Sequence[str]) -> None:
    """Train what is not finished, and record every row with a finished seed."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True)
    parser.add_argument("--rows", nargs="+", help="some rows of the table; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, help="folder of the runs; by default runs/table_NUMBER")
    options, recipe = parser.parse_known_args(arguments)
    output = options.output or Path(f"runs/table_{options.table}")
    rows = ["--rows", *options.rows] if options.rows else []
    seeds = ["--seeds", *map(str, options.seeds)]
    chosen = ["--table", str(options.table), "--config", "synthetic", "--output", str(output), *rows, *seeds]
    ablate.main([*chosen, *recipe])
    setting = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    for row in json.loads((output / "table.json").read_text(encoding="utf-8"))["rows"]:
        if row["seeds"]:
            content = {"table": options.table, "options": list(recipe), **setting, **row}
            record(f"tables {options.table} {row['row']}", torch.device("cpu"), content)


if __name__ == "__main__":
    run_command(main)
