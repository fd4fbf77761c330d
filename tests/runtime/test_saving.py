"""Checkpoints are written in the background, whole or not at all, and the right ones are kept."""

import errno
import hashlib
import json
import math
import os
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from fsr_fast.config import RunConfig
from fsr_fast.errors import UserError
from fsr_fast.runtime import checkpoint, saving
from fsr_fast.runtime.checkpoint import list_checkpoints, read_checkpoint, read_newest, write_checkpoint
from fsr_fast.runtime.saving import Saver
from tests.runtime import children


def state(iteration: int) -> dict:
    return {"iteration": iteration, "values": torch.full((300,), float(iteration)), "nested": [{"rate": 0.5}]}


def saver(folder: Path, saved: int | None = None, **options: int) -> Saver:
    return Saver(RunConfig(output=folder, **options), saved)


def kept(folder: Path) -> list[int]:
    return [int(path.stem) for path in list_checkpoints(folder)]


# --- what stays


def test_the_newest_and_the_multiples_stay(tmp_path):
    with saver(tmp_path, keep_checkpoints=2, keep_every=10) as writer:
        for iteration in (4, 8, 10, 12, 16, 20, 24, 28):
            writer.save(state(iteration))
    assert kept(tmp_path) == [10, 20, 24, 28]


def test_the_best_stays_under_its_name_and_a_worse_one_does_not_replace_it(tmp_path):
    with saver(tmp_path, keep_checkpoints=1) as writer:
        for iteration, score in ((1, 20.0), (2, 50.0), (3, 40.0), (4, 45.0)):
            writer.save(state(iteration))
            writer.mark_best(score)
    assert kept(tmp_path) == [2, 4]
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["iteration"] == 2
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"iteration": 2, "seg_miou": 50.0}
    with saver(tmp_path, 4, keep_checkpoints=1) as writer:
        writer.mark_best(49.0)
        assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["iteration"] == 2
        writer.save(state(5))
        writer.mark_best(51.0)
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["iteration"] == 5


@pytest.mark.faults
def test_a_file_system_without_links_gets_a_copy_of_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Not permitted")))
    with saver(tmp_path, keep_checkpoints=1) as writer:
        for iteration, score in ((1, 50.0), (2, 40.0)):
            writer.save(state(iteration))
            writer.mark_best(score)
    assert not (tmp_path / "checkpoints" / "best.pt").is_symlink()
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["iteration"] == 1
    assert kept(tmp_path) == [2]
    assert "has no links" in capsys.readouterr().err


@pytest.mark.faults
def test_a_best_one_that_cannot_be_marked_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with saver(tmp_path) as writer:
        writer.save(state(1))
        writer.mark_best(50.0)
        writer.save(state(2))
    assert kept(tmp_path) == [1, 2]
    assert "cannot be written (No space left); the training goes on without" in capsys.readouterr().err


def test_a_score_that_is_none_is_the_worst(tmp_path):
    with saver(tmp_path) as writer:
        for iteration, score in ((1, math.nan), (2, 10.0), (3, math.nan)):
            writer.save(state(iteration))
            writer.mark_best(score)
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["iteration"] == 2


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    write_checkpoint(tmp_path, state(3))
    (tmp_path / "checkpoints" / "0000004.partial").write_bytes(b"half")
    with saver(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000003.pt"]


def test_checkpoints_beyond_the_one_that_the_run_went_on_from_are_dropped(tmp_path):
    for iteration in (2, 4, 9):
        write_checkpoint(tmp_path, state(iteration))
    with saver(tmp_path, 4) as writer:
        writer.save(state(6))
    assert kept(tmp_path) == [4, 6]


def test_what_the_run_went_on_from_is_not_written_again(tmp_path):
    path = write_checkpoint(tmp_path, state(4))
    before = path.stat()
    with saver(tmp_path, 4) as writer:
        writer.save(state(4))
    assert path.stat() == before


# --- beside the training


def test_a_save_copies_and_returns_while_another_thread_writes(tmp_path, monkeypatch):
    go, writers = threading.Event(), []

    def write_later(run, content):
        writers.append(threading.current_thread())
        go.wait()
        return write_checkpoint(run, content)

    monkeypatch.setattr(saving, "write_checkpoint", write_later)
    with saver(tmp_path) as writer:
        training = state(1)
        writer.save(training)
        training["values"].fill_(7)  # the training goes on
        assert kept(tmp_path) == []
        go.set()
    assert writers[0] is not threading.current_thread()
    assert read_checkpoint(tmp_path)["values"].eq(1).all()
    assert read_checkpoint(tmp_path)["nested"] == [{"rate": 0.5}]


def test_the_copies_use_the_same_memory_again(tmp_path):
    with saver(tmp_path) as writer:
        for iteration in (1, 2):
            writer.save(state(iteration))
            if iteration == 1:
                first = next(iter(writer._copy._buffers.values())).data_ptr()
    assert next(iter(writer._copy._buffers.values())).data_ptr() == first
    assert read_checkpoint(tmp_path)["values"].eq(2).all()


@pytest.mark.faults
def test_a_save_that_fails_is_reported_and_the_next_one_works(tmp_path, monkeypatch, capsys):
    def fail(run, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with saver(tmp_path) as writer:
        writer.save(state(1))
        with monkeypatch.context() as patch:
            patch.setattr(saving, "write_checkpoint", fail)
            writer.save(state(2))
            with pytest.raises(UserError, match="No space left on device"):
                writer.finish()
        assert "no checkpoint at this iteration (No space left on device); the training goes on" in (
            capsys.readouterr().err
        )
        assert kept(tmp_path) == [1]
        writer.save(state(2))
        writer.finish()
    assert kept(tmp_path) == [1, 2]


def test_a_failure_of_the_writer_that_is_no_fault_of_the_disk_is_not_hidden(tmp_path):
    writer = saver(tmp_path)
    writer.save({"iteration": 1, "function": lambda: None})
    with pytest.raises((TypeError, AttributeError), match="lambda"):
        writer.finish()


# --- damage


def test_a_checkpoint_is_a_zip_archive_whose_comment_is_its_checksum(tmp_path):
    path = write_checkpoint(tmp_path, state(1))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    assert path.read_bytes().endswith(comment)
    assert comment.decode() == f"sha256:{hashlib.sha256(path.read_bytes()[: -len(comment)]).hexdigest()}"


@pytest.mark.faults
def test_any_flipped_bit_or_missing_end_of_the_newest_is_found_and_the_one_before_is_read(tmp_path, capsys, record):
    first = write_checkpoint(tmp_path, state(1))
    newest = write_checkpoint(tmp_path, state(2))
    content = newest.read_bytes()
    flips = [*range(0, len(content), 29), *range(len(content) - 200, len(content))]
    cuts = [0, 1, 100, len(content) // 2, len(content) - 72, len(content) - 71, len(content) - 1]
    damages = [content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :] for place in flips]
    damages += [content[:place] for place in cuts]
    for damaged in damages:
        newest.write_bytes(damaged)
        found, origin = read_newest(tmp_path)
        assert found["iteration"] == 1
        assert origin == first
        message = capsys.readouterr().err
        assert str(newest) in message
        assert "0000001.pt is read instead" in message
    record(
        "newest checkpoint has a flipped bit",
        injected=len(flips),
        lost="work since the previous checkpoint",
        outcome="found by the checksum; a warning names the file, the previous one is read",
    )
    record(
        "newest checkpoint is truncated",
        injected=len(cuts),
        lost="work since the previous checkpoint",
        outcome="found; a warning names the file, the previous one is read",
    )


def test_a_folder_of_damaged_checkpoints_alone_is_refused(tmp_path):
    for iteration in (1, 2):
        path = write_checkpoint(tmp_path, state(iteration))
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"0000002\.pt: not a readable.*no other checkpoint is left"):
        read_newest(tmp_path)


@pytest.mark.faults
def test_a_disk_that_fills_up_during_a_write_leaves_the_earlier_checkpoint_and_no_rest(tmp_path):
    pytest.importorskip("resource")
    write_checkpoint(tmp_path, state(1))
    (code,) = children.exit_codes([children.start(write_large, tmp_path)])
    assert code == errno.EFBIG
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000001.pt"]
    assert read_checkpoint(tmp_path)["iteration"] == 1


def write_large(folder: Path) -> None:
    children.limit_files(0, 50_000)
    try:
        checkpoint.write_checkpoint(folder, {"iteration": 2, "values": torch.zeros(100_000)})
    except OSError as error:
        raise SystemExit(error.errno) from None
