"""Files appear whole or not at all, and errors of the system name them."""

import errno
import io
import json
import logging
import os

import pytest
import torch

from fsr_fast.runtime import files
from fsr_fast.runtime.files import atomic_file, atomic_path, write_json, write_text


def failing(number: int):
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_json(tmp_path / "summary.json", {"iterations": 1})
    with pytest.raises(TypeError):
        write_json(path, {"iterations": object()})
    monkeypatch.setattr(files.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space") as caught:
        write_json(path, {"iterations": 2})
    assert caught.value.filename == str(path)
    assert json.loads(path.read_text()) == {"iterations": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with atomic_file(tmp_path / "new" / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    partial = tmp_path / ".result.partial"
    if kind == "file":
        partial.write_text("half")
    elif kind == "folder":
        (partial / "deep").mkdir(parents=True)
    else:
        partial.symlink_to(outside)
    write_text(tmp_path / "result", "whole")
    assert (tmp_path / "result").read_text() == "whole"
    assert not os.path.lexists(partial)
    assert outside.read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 120, "x" * 246])
def test_a_name_that_leaves_no_room_for_more_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    def write(name: str, error: Exception | None = None) -> None:
        with atomic_path(tmp_path / name) as folder:
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / "file").write_text("x")
            assert not (tmp_path / name).exists()
            if error is not None:
                raise error

    write("network")
    assert (tmp_path / "network" / "deep" / "file").read_text() == "x"
    with pytest.raises(ValueError, match="fails"):
        write("other", ValueError("fails"))
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


def test_a_full_disk_below_the_writer_of_torch_is_an_error_of_the_system_that_names_the_file(tmp_path):
    class Full(io.BytesIO):
        write = failing(errno.ENOSPC)

    def save() -> None:
        with atomic_path(tmp_path / "weights.pt") as partial:
            partial.touch()
            torch.save({"x": torch.zeros(10)}, Full())

    with pytest.raises(OSError, match="No space") as caught:
        save()
    assert caught.value.filename == str(tmp_path / "weights.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_write_out_folders_is_noted_once(tmp_path, monkeypatch, caplog):
    files._note_unsynced.cache_clear()
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            failing(errno.EINVAL)()
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", only_files)
    with caplog.at_level(logging.WARNING):
        write_text(tmp_path / "a", "1")
        write_text(tmp_path / "b", "2")
    assert (tmp_path / "b").read_text() == "2"
    assert [message for message in caplog.messages if "power failure" in message] == caplog.messages[:1]
    monkeypatch.setattr(files.os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "c", "3")


def test_a_folder_that_cannot_be_written_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space") as caught:
        files.sync_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)
