"""The journal of an evaluation: one line per image, from which an interrupted evaluation resumes.

Each process writes `images.RANK.partial.jsonl`: a line that says what is evaluated, then a line per image. At the
end the first process joins them into `images.jsonl`, which also serves the comparison of two evaluations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fsr_fast.errors import UserError
from fsr_fast.runtime.files import atomic_file, naming, write_text

FILE = "images.jsonl"
PARTIAL = "images.{}.partial.jsonl"


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers, with their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """One process's part of the journal, and what all processes wrote before an interruption.

    Args:
        folder: of the results; created if missing.
        rank: number of this process. `found` must be read by all processes before one of them writes.
        header: what is evaluated: weights, settings, list. Lines under another header are ignored.

    Attributes:
        folder: of the results.
        found: names of the images that are done.
    """

    def __init__(self, folder: Path, rank: int, header: Mapping[str, Any]) -> None:
        self.folder, self._header = folder, dict(header)
        self._path = folder / PARTIAL.format(rank)
        self.found = {line["name"] for line in self.lines() if "error" not in line}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Read what all processes have written."""
        for path in sorted(self.folder.glob(PARTIAL.format("*"))):
            yield from self._read(path)

    def failed(self) -> dict[str, str]:
        """Return why images failed, by name; they are tried again, since the cause may be fixed by now."""
        lines = list(self.lines())
        done = {line["name"] for line in lines if "error" not in line}
        return {line["name"]: line["error"] for line in lines if "error" in line and line["name"] not in done}

    def open(self) -> None:
        """Begin to write; drop a line that an interruption cut short."""
        kept = [line for line in self._read(self._path) if "error" not in line] if self._path.is_file() else []
        write_text(self._path, "".join(map(_text, [self._header, *kept])))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Add the line of an image."""
        with naming(self._path):
            self._file.write(_text(line))
            self._file.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        with naming(self._path), self._file:
            os.fsync(self._file.fileno())

    def join(self) -> Path:
        """Join all parts into one file, once every process has closed its own; to be called by one of them."""
        path = self.folder / FILE
        with atomic_file(path) as file:
            file.write(_text(self._header).encode())
            for line in self.lines():
                if "error" not in line:
                    file.write(_text(line).encode())
            for name, message in self.failed().items():
                file.write(_text({"name": name, "error": message}).encode())
        for part in self.folder.glob(PARTIAL.format("*")):
            part.unlink()
        return path

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8", errors="replace") as file:
            if _parse(file.readline()) != json.loads(_text(self._header)):
                return
            for text in file:
                line = _parse(text)
                if line is not None:
                    yield line


def read_journal(folder: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Read a finished evaluation.

    Returns:
        The line that says what was evaluated, and the lines of the images.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(
            f"{path}: no finished evaluation; give the folder that `fsr-fast evaluate --output FOLDER` wrote"
        ) from None
    lines = [_parse(text) for text in texts]
    header, *images = lines or [None]
    if header is None or "classes" not in header or None in images:
        raise UserError(f"{path}: not the journal of an evaluation, or damaged; evaluate again")
    return header, (line for line in images if line is not None)


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":")) + "\n"


def _parse(text: str) -> dict[str, Any] | None:
    """Read a line; None if it was cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
