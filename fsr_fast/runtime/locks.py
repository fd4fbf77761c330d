"""Locks of folders, which the kernel releases however the process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path

from fsr_fast.errors import UserError

LOGGER = logging.getLogger("fsr_fast")
_CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""Error numbers of file systems without locks, such as Lustre without the option flock."""
_held: set[int] = set()


class BusyError(Exception):
    """Another process holds the lock; the text is what it wrote there."""


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[FileIO]:
    """Hold the lock of a file; if the file system has no locks, go on without, with one warning.

    Args:
        path: the file; created if missing.
        shared: alongside others that share it, read-only.

    Yields:
        The open file, unbuffered: its content says who holds the lock.

    Raises:
        BusyError: another process holds it.
        UserError: there is a link or something else in its place.
    """
    with _open(path) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(file.read(1000).decode(errors="replace").strip()) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            _note_unlocked(error.strerror)
        _held.add(file.fileno())
        try:
            yield file
        finally:
            _held.discard(file.fileno())


def _open(path: Path) -> FileIO:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    try:
        file = open(path, "r+b", buffering=0, opener=opener)  # noqa: SIM115 its caller closes it
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path}: a link or not a file, in place of a lock; delete it") from None
        raise error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: a link or not a file, in place of a lock; delete it")
    return file


@cache
def _note_unlocked(reason: str) -> None:
    LOGGER.warning("the file system has no locks (%s): nothing keeps a second process out of this folder", reason)


def _let_go() -> None:
    """Release the locks in a forked process: a loader process that outlives its parent must not keep the folder."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
