"""Atomic files: the one way in which results, records and checkpoints are written.

The content goes to `.NAME.partial` beside the file, which replaces it once complete. A process that is killed leaves
the file as it was, and at most that hidden one, which the next attempt removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

LOGGER = logging.getLogger("fsr_fast")
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
"""Error numbers of file systems that cannot sync a folder."""
_LONGEST = 255
"""Largest file name, in bytes."""


@contextmanager
def atomic_path(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Make a file, folder or link appear under its name only once complete.

    Args:
        path: its name; missing parent folders are created. An existing file is replaced at the end.
        sync: wait until it is on disk. False if the same command can write it again.

    Yields:
        The path to write to; nothing is there yet. It is removed if anything fails.

    Raises:
        OSError: no space, no permission; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_partial_name(path.name))
    _remove(partial)  # left by a process that was killed
    try:
        with naming(path):
            yield partial
            if sync:
                _sync(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once complete, as `atomic_path`; it can also be read."""
    with atomic_path(path, sync=sync) as partial, partial.open("x+b") as file:
        yield file


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically.

    Args:
        path: the file.
        text: its content, written as UTF-8.

    Returns:
        The file.
    """
    with atomic_file(path) as file:
        file.write(text.encode())
    return path


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a JSON file atomically.

    Args:
        path: the file.
        values: anything that JSON can hold; non-finite values become null.

    Returns:
        The file.
    """
    return write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def write_png(path: Path, picture: Image.Image) -> Path:
    """Write a picture atomically; the same command can write it again, so nothing waits for the disk.

    Args:
        path: the file.
        picture: of any mode that PNG supports.

    Returns:
        The file.
    """
    with atomic_file(path, sync=False) as file:
        picture.save(file, format="PNG")
    return path


def finite(values: Any) -> Any:
    """Replace non-finite numbers, which JSON cannot hold, by None."""
    if isinstance(values, Mapping):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk; file systems that cannot cause one warning."""
    try:
        with naming(folder):
            _sync_one(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        _note_unsynced(error.strerror)


def _partial_name(name: str) -> str:
    """Return the name of the file during writing; a name that is too long to extend gets its digest."""
    partial = f".{name}.partial"
    content = os.fsencode(name)
    return partial if len(os.fsencode(partial)) <= _LONGEST else f".{hashlib.sha256(content).hexdigest()}.partial"


def _sync(path: Path) -> None:
    for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
        sync_folder(part) if part.is_dir() else _sync_one(part)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _note_unsynced(reason: str) -> None:
    LOGGER.warning(
        "the file system cannot sync folders (%s): after a power failure, the files of the last seconds may be missing",
        reason,
    )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to system errors, which only have it where a path was opened."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch's writer hides the system's error
        if not isinstance(cause, OSError):
            raise
        if cause.errno is not None:
            cause.filename, cause.filename2 = str(path), None
        if cause is error:
            raise
        raise cause from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
