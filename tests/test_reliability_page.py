"""The table of `docs/reliability.md` is what the tests of faults have recorded."""

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_shows_the_record():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    record = json.loads((DOCS / "reliability.json").read_text(encoding="utf-8"))
    assert runpy.run_path(str(DOCS / "build_reliability.py"))["fill"](page, record) == page
    for row in record["rows"]:
        assert f"| {row['fault']} | {row['injected']} |" in page
