"""TensorBoard event files, written immediately, so that a disk error is raised where it can be handled."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar


class Board:
    """Writes one event file, each event immediately.

    Args:
        folder: of the event files.
        purge_step: first step of this start; later events in earlier files are not shown.

    Raises:
        OSError: a disk error; all methods raise it.
    """

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        self._records.flush()

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write a picture."""
        self._write(Event(step=step, summary=image(name, np.asarray(picture.convert("RGB")), dataformats="HWC")))
        self._records.flush()

    def close(self) -> None:
        """Write out what is buffered, and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
