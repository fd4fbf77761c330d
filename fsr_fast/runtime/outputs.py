"""Ownership of result folders, so that no verb overwrites anything but its own results."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsr_fast.errors import UserError
from fsr_fast.runtime.files import naming
from fsr_fast.runtime.locks import BusyError, locked


@contextmanager
def output_folder(folder: Path, verb: str, results: str | None = None, *, own: bool = False) -> Iterator[None]:
    """Reserve a folder for the results of one command, while it runs and afterwards.

    Its verb is recorded in `.VERB.json`, which is also the lock.

    Args:
        folder: created if missing; removed if nothing was written to it.
        verb: the writing verb.
        results: origin of the results: fingerprint of the network, settings, folder of the run; None: any.
        own: the folder may hold other things; it is the run's own.

    Raises:
        UserError: the folder holds something else or other results, or another process writes to it.
    """
    mark = folder / f".{verb}.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; give a folder")
    known = os.path.lexists(mark) and mark.lstat().st_size > 0
    if not (known or own) and folder.is_dir() and any(path != mark for path in folder.iterdir()):
        raise UserError(
            f"--output: {folder} holds something that `fsr-fast {verb}` has not written; give a new or empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(mark) as file:
            about = {"verb": verb, "results": results}
            if known and results is not None and _read(file.read()) != about:
                raise UserError(
                    f"--output: {folder} holds the results of another run or network, or of other settings; "
                    "give another folder, or delete it"
                )
            with naming(mark):
                file.seek(0)
                file.truncate()
                file.write(json.dumps({**about, "host": socket.gethostname(), "process": os.getpid()}).encode())
            yield
    except BusyError as error:
        raise UserError(
            f"--output: another process writes to {folder} ({error}); wait for it, or give another folder"
        ) from None
    except BaseException:
        with suppress(OSError):
            if not known and next(folder.iterdir()) == mark and len(list(folder.iterdir())) == 1:
                mark.unlink()
                folder.rmdir()
        raise


def _read(text: bytes) -> dict[str, object] | None:
    try:
        content = json.loads(text)
        return {"verb": content["verb"], "results": content["results"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
