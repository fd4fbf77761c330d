"""What the tests of faults share: tiny runs, and the record that `docs/reliability.md` is made of."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fsr_fast.train import main as train
from tests import helpers
from tests.test_resume import final_state

RECORD = "FSR_FAULT_RECORD"
"""Environment variable: file for the record of injected faults and outcomes."""
_rows: list[dict[str, object]] = []


@pytest.fixture
def record() -> Callable[..., None]:
    """Note a fault that was survived, at the end of the test that has checked it."""

    def note(fault: str, *, injected: int, lost: str, outcome: str) -> None:
        _rows.append({"fault": fault, "injected": injected, "lost": lost, "outcome": outcome})

    return note


def pytest_sessionfinish() -> None:
    """Write the record, if requested; a new row replaces an earlier one."""
    if _rows and os.environ.get(RECORD):
        path = Path(os.environ[RECORD])
        earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        rows = {row["fault"]: row for row in (*earlier, *_rows)}
        content = {"python": platform.python_version(), "torch": torch.__version__, "rows": list(rows.values())}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Compute like the processes that the tests start: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The tiny data set; epochs end within batches."""
    return helpers.write_dataset(tmp_path_factory.mktemp("faults") / "data", train=7)


SETTINGS = {
    "optim": {"iterations": 6, "warmup": 2},
    "run": {"checkpoint_every": 2, "log_every": 1},
    "cam": {"scales": [1.0]},
}


@pytest.fixture
def recipe(root, tmp_path) -> Callable[..., Path]:
    """Write the recipe of a tiny run in `<name>`, and return its file."""

    def write(name: str, *changes: dict) -> Path:
        values = helpers.values(SETTINGS, *changes, root=root, output=tmp_path / name)
        return helpers.write_config(tmp_path / f"{name}.yaml", values)

    return write


def outcome(run: Path) -> dict[str, object]:
    """Return all that a run has computed: the newest checkpoint without the configuration."""
    return {name: value for name, value in final_state(run).items() if not name.startswith(".config.")}


@pytest.fixture(scope="package")
def whole(root, one_thread, tmp_path_factory) -> dict[str, object]:
    """What an undisturbed run computes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    path = helpers.write_config(run.with_suffix(".yaml"), helpers.values(SETTINGS, root=root, output=run))
    train(["--config", str(path)])
    return outcome(run)
