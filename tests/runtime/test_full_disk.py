"""A disk that is full at any write of a run: the run ends well, or with one clear error, and nothing is lost."""

import builtins
import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsr_fast.errors import UserError
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.saving import Saver
from fsr_fast.train import main as train
from tests.runtime.conftest import outcome
from tests.test_resume import assert_same

pytestmark = pytest.mark.faults
CHANGES = {
    "optim": {"iterations": 2, "warmup": 1},
    "run": {"checkpoint_every": 1, "picture_every": 1, "evaluate_every": 1, "timeout": 0},
}
COUNTS = re.compile(r"config\.yaml|\.lock|metrics\.jsonl|summary\.json|checkpoints|run$")
"""What a run cannot do without."""


class Disk:
    """Counts what a run writes, and fails where told to.

    Args:
        folder: below which everything counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.done: list[tuple[str, str]] = []
        self.full_at: tuple[str, str] | None = None
        """Operation that fails the first time that it comes; None: none does."""
        self.lasting = False
        """Everything after it fails, too."""

    def pass_through(self, kind: str, path: Any) -> None:
        """Count an operation, or fail."""
        if not isinstance(path, str | Path) or not f"{path}/".startswith(f"{self.folder}/"):
            return
        operation = kind, re.sub(r"\d{7,}.*", "N", str(path)[len(self.folder) :])
        self.done.append(operation)
        hits = self.done.count(self.full_at) if self.full_at else 0
        if hits and (self.lasting or (hits == 1 and operation == self.full_at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(path)] if kind in ("make", "open") else []))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk below everything that a run opens, makes, writes, syncs, links and renames."""
    disk = Disk(tmp_path / "run")
    plain, fsync, mkdir, symlink, replace = builtins.open, os.fsync, os.mkdir, os.symlink, os.replace

    class Raw(io.FileIO):
        def write(self, content: Any) -> int | None:
            disk.pass_through("write", self.name)
            return super().write(content)

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not isinstance(file, str | Path) or not set(mode) & set("wax+"):
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        disk.pass_through("open", file)
        raw = Raw(str(file), mode.replace("b", ""), opener=opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def sync(descriptor: int) -> None:
        disk.pass_through("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def before(kind: str, function: Callable[..., None], place: int) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            disk.pass_through(kind, arguments[place])
            function(*arguments, **options)

        return call

    save = Saver.save

    def save_at_once(saver: Saver, state: dict[str, Any]) -> None:  # so that the count is the same each time
        save(saver, state)
        saver._join()

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        patch.setattr(os, "fsync", sync)
        patch.setattr(os, "mkdir", before("make", mkdir, 0))
        patch.setattr(os, "symlink", before("link", symlink, 1))
        patch.setattr(os, "replace", before("rename", replace, 1))
        patch.setattr(Saver, "save", save_at_once)
        yield disk


def run(path: Path) -> Exception | None:
    """Train, and return the error that ends it."""
    try:
        train(["--config", str(path)])
    except (UserError, OSError) as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [True, False])
def test_a_disk_that_is_full_at_any_write_of_a_run_costs_nothing_that_counts(recipe, tmp_path, disk, record, lasting):
    path, folder = recipe("run", CHANGES), tmp_path / "run"
    assert run(path) is None
    whole, operations = outcome(folder), list(dict.fromkeys(disk.done))  # each file and kind of operation once
    assert len(operations) > 20
    finished, ended = 0, []
    for number, operation in enumerate(operations):
        folder.rename(tmp_path / f"before_{number}")
        disk.done.clear()
        disk.full_at, disk.lasting = operation, lasting
        error = run(path)
        assert operation in disk.done
        if error is None:
            finished += 1
            assert (folder / "summary.json").is_file()
        else:
            place = str(error).partition(": ")[0] if isinstance(error, UserError) else str(error.filename)
            if not COUNTS.search(place.removeprefix(str(tmp_path))):
                ended.append((operation, place))
            disk.full_at = None
            assert run(path) is None  # the same command goes on
        assert_same(outcome(folder), whole)
        assert [line["iteration"] for line in read_metrics(folder)] == [1, 1, 2]
        assert not list(folder.rglob("*.partial"))
    assert not ended, "ended by output for display, or without the name of a file"
    record(
        f"full disk at each kind of write of a run, {'from then on' if lasting else 'once'}",
        injected=len(operations),
        lost="nothing",
        outcome=f"{finished} finished without the output for display; {len(operations) - finished} named the file, and "
        "the same command went on; all end bit for bit like an undisturbed run",
    )
