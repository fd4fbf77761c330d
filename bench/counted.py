"""The table of what `bench.counts` counts."""

from typing import Any


def tabulate_counts(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    """Return the table of what `bench.counts` counts, beside what it counted at an earlier commit.

    Args:
        now: records of `counts`.
        before: records of `counts_before`, the same of an earlier commit.
    """
    lines = ["| what | figure | before | now |", "|---|---|---|---|"]
    earlier = {case.split(" ", 1)[1]: content["counts"] for cases in before for case, content in cases.items()}
    for cases in now:
        for case, content in cases.items():
            name = case.split(" ", 1)[1]
            for number, (figure, value) in enumerate(content["counts"].items()):
                known = earlier.get(name, {}).get(figure)
                cells = ("" if number else name, figure, "-" if known is None else _rounded(known), _rounded(value))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rounded(value: float) -> str:
    """Return a count, in three digits where it is large."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"
