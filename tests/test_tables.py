"""The paper's tables on the embedded data set: what is trained, and what is recorded."""

import json
from pathlib import Path

import pytest

from bench import tables


def test_rows_with_a_finished_seed_are_recorded(tmp_path, monkeypatch):
    calls, recorded = [], {}

    def run(arguments):
        calls.append(list(arguments))
        folder = Path(arguments[arguments.index("--output") + 1])
        rows = [{"row": "none", "seeds": {"1": {"pseudo": 60.0, "seg": 59.0}}}, {"row": "unc", "seeds": {}}]
        folder.mkdir(exist_ok=True)
        (folder / "table.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(tables.ablate, "main", run)
    monkeypatch.setattr(tables, "record", lambda case, device, content: recorded.update({case: content}))
    folder = tmp_path / "runs"
    tables.main(["--table", "4", "--rows", "none", "--seeds", "1", "--output", str(folder), "--mask.ratio", "0.3"])
    chosen = ["--table", "4", "--config", "synthetic", "--output", str(folder)]
    assert calls == [[*chosen, "--rows", "none", "--seeds", "1", "--mask.ratio", "0.3"]]
    assert list(recorded) == ["tables 4 none"]
    content = recorded["tables 4 none"]
    assert (content["table"], content["options"]) == (4, ["--mask.ratio", "0.3"])
    assert content["seeds"] == {"1": {"pseudo": 60.0, "seg": 59.0}}


def test_another_table_is_refused():
    with pytest.raises(SystemExit):
        tables.main(["--table", "7"])
