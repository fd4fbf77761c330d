"""Write the table in `reliability.md` from `reliability.json`, which the fault tests record.

FSR_FAULT_RECORD=docs/reliability.json python -m pytest tests/runtime -m faults
python docs/build_reliability.py
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- table: build_reliability.py -->\n", "<!-- end of the table -->\n"


def table(record: dict[str, Any]) -> str:
    """Format the table as Markdown.

    Args:
        record: content of reliability.json.
    """
    lines = ["| fault | injected | lost work | outcome |", "|---|---|---|---|"]
    lines += [f"| {row['fault']} | {row['injected']} | {row['lost']} | {row['outcome']} |" for row in record["rows"]]
    lines += ["", f"Recorded on a CPU with Python {record['python']} and torch {record['torch']}."]
    return "\n".join(lines) + "\n"


def fill(page: str, record: dict[str, Any]) -> str:
    """Put the table between its marks.

    Args:
        page: content of reliability.md.
        record: content of reliability.json.
    """
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table(record) + END + after


if __name__ == "__main__":
    path = HERE / "reliability.md"
    record = json.loads((HERE / "reliability.json").read_text(encoding="utf-8"))
    path.write_text(fill(path.read_text(encoding="utf-8"), record), encoding="utf-8")
