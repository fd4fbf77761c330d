"""Compare two evaluations of the same pictures: `fsr-fast compare FIRST SECOND`.

Both folders hold what `fsr-fast evaluate` wrote. The intervals are paired bootstraps over the pictures: they account
for the choice of pictures on the list, not for the seed of the training.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsr_fast.cli import run_command
from fsr_fast.commands import parsers
from fsr_fast.errors import UserError
from fsr_fast.evaluation.bootstrap import Difference, paired_bootstrap
from fsr_fast.evaluation.journal import read_journal
from fsr_fast.evaluation.tally import class_counts
from fsr_fast.runtime.files import write_json, write_text
from fsr_fast.runtime.outputs import output_folder

MEASURES = ("mIoU", "boundary mIoU")


def main(arguments: Sequence[str]) -> None:
    """Compare as the arguments say."""
    options = parsers.compare().parse_args(arguments)
    if options.draws < 100:
        raise UserError(f"--draws: {options.draws} resamples are too few for an interval; expected 100 or more")
    if options.seed < 0:
        raise UserError(f"--seed: {options.seed}; expected 0 or more")
    images, differences = compare(options.first, options.second, draws=options.draws, seed=options.seed)
    text = markdown(options.first, options.second, images, differences)
    print(text, end="")
    if options.output:
        values = {kind: {name: row._asdict() for name, row in rows.items()} for kind, rows in differences.items()}
        folders = {"first": str(options.first), "second": str(options.second)}
        with output_folder(options.output, "compare", f"{options.first.resolve()}\n{options.second.resolve()}"):
            path = write_json(options.output / "comparison.json", {**folders, "images": images, "results": values})
            write_text(options.output / "comparison.md", text)
        print(f"\ncomparison: {path}")


def compare(
    first: Path, second: Path, *, draws: int = 2000, seed: int = 0
) -> tuple[int, dict[str, dict[str, Difference]]]:
    """Compare the journals of two evaluations.

    Args:
        first: folder of an evaluation.
        second: folder of an evaluation of the same images and classes.
        draws: number of resamples.
        seed: of the draws.

    Returns:
        Number of common images, and the differences by measure for each common kind of result.

    Raises:
        UserError: a folder without evaluation, other classes, no common image or no common kind of result.
    """
    (header, lines), (other_header, other_lines) = read_journal(first), read_journal(second)
    classes = header["classes"]
    if classes != other_header["classes"]:
        raise UserError(f"{second}: its classes {other_header['classes']} are not those of {first}, {classes}")
    mine, theirs = _by_name(lines, first), _by_name(other_lines, second)
    names = [name for name in mine if name in theirs]
    if not names:
        raise UserError(f"{first} and {second} have no image in common; evaluate both on the same list")
    kinds = [kind for kind in mine[names[0]] if kind in theirs[names[0]]]
    if not kinds:
        raise UserError(f"{first} and {second} have no kind of result in common; evaluate both with the same options")
    differences = {}
    for kind in kinds:
        counts = [
            np.stack([class_counts(side[name][kind], len(classes)) for name in names], axis=1)
            for side in (mine, theirs)
        ]
        pairs = zip(MEASURES, *counts, strict=True)
        differences[kind] = {name: paired_bootstrap(*pair, draws=draws, seed=seed) for name, *pair in pairs}
    return len(names), differences


def markdown(first: Path, second: Path, images: int, differences: Mapping[str, Mapping[str, Difference]]) -> str:
    """Write the comparison as a table."""
    lines = [
        f"Comparison of {first} (first) and {second} (second) on the {images} images scored by both.",
        "Percent; the interval holds 95 % of the paired bootstrap's resamples of the images.\n",
        "| result | measure | first | second | change | 95 % interval | second is better in |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {kind} | {name} | {row.first:.2f} | {row.second:.2f} | {row.change:+.2f} "
        f"| {row.low:+.2f} to {row.high:+.2f} | {row.better:.1%} of the resamples |"
        for kind, rows in differences.items()
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _by_name(lines: Iterable[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for line in lines:
        if "error" not in line:
            if "counts" not in line:
                raise UserError(f"{folder}: holds label maps, but no scores; give the folder of `fsr-fast evaluate`")
            found[line["name"]] = line["counts"]
    return found


if __name__ == "__main__":
    run_command(main)
