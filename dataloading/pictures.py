"""The pictures named on a command line: files, folders with subfolders, patterns."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fsr_fast.dataloading.images import check_spelling
from fsr_fast.dataloading.layout import IMAGE_ENDINGS, bare_name, has_ending
from fsr_fast.errors import UserError


def find_pictures(arguments: Iterable[str | Path], without: Path | None = None) -> dict[str, Path]:
    """Return the pictures in files, folders and patterns, by the name of their results.

    That is the path below the given folder, or the name of the file, without extension. If two would be equal, both
    keep their extensions; if that is not enough, they begin with the name of the given folder.

    Args:
        arguments: files, folders, or patterns such as `trip/*.jpg`.
        without: folder to skip: that of the results, which may be inside.

    Raises:
        UserError: a URL, a missing path, a folder or pattern without picture, two pictures with the same name, or a
            name that result files cannot have.
    """
    files = dict.fromkeys(pair for argument in arguments for pair in _expand(str(argument), without))
    names = _unlike(files, (_plain, _with_ending, _with_folder, _with_both))
    found: dict[str, Path] = {}
    for (folder, file), name in names.items():
        check_spelling(name)
        if name in found and found[name] != folder / file:
            raise UserError(f"{folder / file}: its results would overwrite those of {found[name]}; rename one")
        found[name] = folder / file
    return found


Picture = tuple[Path, Path]
"""Given folder, and path below it."""


def _plain(picture: Picture) -> str:
    return bare_name(picture[1].as_posix())


def _with_ending(picture: Picture) -> str:
    return picture[1].as_posix()


def _with_folder(picture: Picture) -> str:
    return f"{picture[0].absolute().name}/{_plain(picture)}"


def _with_both(picture: Picture) -> str:
    return f"{picture[0].absolute().name}/{_with_ending(picture)}"


def _unlike(files: Iterable[Picture], forms: Sequence[Callable[[Picture], str]]) -> dict[Picture, str]:
    """Name each picture by the first form that makes it unique."""
    form, *others = forms
    names = {picture: form(picture) for picture in files}
    counts = Counter(names.values())
    if others:
        alike = [picture for picture, name in names.items() if counts[name] > 1]
        names |= _unlike(alike, others) if alike else {}
    return names


def _expand(argument: str, without: Path | None) -> Iterator[Picture]:
    if re.match(r"[a-z][a-z0-9+.-]*://", argument, re.IGNORECASE):
        raise UserError(f"{argument}: a URL, which is not fetched; download the picture and give its file")
    path = Path(argument)
    if path.is_dir():
        files = _pictures(sorted(path.rglob("*")), without)
        if not files and without is not None and without.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--output: {path} lies in {without}, where results go; give a new or empty folder")
        if not files:
            raise UserError(f"{path}: no picture in this folder; expected {', '.join(IMAGE_ENDINGS)}")
        yield from ((path, file.relative_to(path)) for file in files)
    elif path.exists():
        yield path.parent, Path(path.name)
    elif not glob.has_magic(argument):
        raise UserError(f"{path}: no such file or folder")
    else:
        files = _pictures(map(Path, sorted(glob.glob(argument, recursive=True))), without)
        if not files:
            raise UserError(f"{argument}: no picture matches this pattern; expected {', '.join(IMAGE_ENDINGS)}")
        yield from ((file.parent, Path(file.name)) for file in files)


def _pictures(files: Iterable[Path], without: Path | None) -> list[Path]:
    found = [file for file in files if has_ending(file.name) and file.is_file()]
    return [file for file in found if without is None or without.resolve() not in file.resolve().parents]
