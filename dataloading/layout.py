"""The layout of a data set on disk: its lists, and the files that belong to a name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.images import MAX_PIXELS, DamagedFileError, check_name, inside
from fsr_fast.dataloading.mask_files import Meaning, read_mask
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.tables import clean_name, read_lines
from fsr_fast.errors import UserError, nearest

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".dcm")
MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp")
LIST_ENDINGS = (".txt", ".csv", ".json", ".xlsx")


class Files(Protocol):
    """Finds the image and the mask of a name."""

    def image_path(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DamagedFileError: there is none, or it leads out of the data set.
        """
        ...

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Read a mask, (H, W) uint8 as stored: 0 background, 1… classes, 255 ignored; None if there is none.

        Raises:
            DamagedFileError: it cannot be read, or leads out of the data set.
        """
        ...

    def has_mask(self, name: str) -> bool:
        """Return whether there is a mask, without reading it."""
        ...

    def mask_place(self, name: str) -> str:
        """Describe where the mask is, or should be."""
        ...


class Split(NamedTuple):
    """One list of a data set as it is on disk. Its images are not checked yet."""

    origin: Path
    """File of the list."""
    ids: Names
    classes: tuple[str, ...]
    """Names of all foreground classes, in the order of the mask values 1, 2, …."""
    files: Files
    labels: Callable[[str], list[int]]
    """Return the classes of an image, as numbers from 0; raises `UserError` if they cannot be read."""
    notes: Notes
    """What was inferred in reading it."""


@dataclass(frozen=True)
class FolderFiles:
    """Files in folders: `FOLDER/NAME.jpg` (or another known extension, in any capitals) and `FOLDER/NAME.png`.

    A name may include the extension of its image.

    Args:
        image_folders: where images are, in the order of preference.
        mask_folders: where masks are, in the order of preference.
        classes: number of foreground classes.
        links: roots into which symbolic links may lead.
        meaning: of the values or colours of the masks; None: values are classes.
        notes: records what was inferred.
        max_pixels: largest mask that is read.
    """

    image_folders: tuple[Path, ...]
    mask_folders: tuple[Path, ...]
    classes: int
    links: tuple[Path, ...] = ()
    meaning: Meaning | None = None
    notes: Notes = field(default_factory=Notes)
    max_pixels: int = MAX_PIXELS

    def image_path(self, name: str) -> Path:
        """Return the file of an image."""
        path = self._find(self.image_folders, name, IMAGE_ENDINGS)
        if path is None:
            raise DamagedFileError(
                f"{' or '.join(map(str, self.image_folders))}: no image for the id {name!r} "
                f"(extensions: {', '.join(IMAGE_ENDINGS)}){_alike(self.image_folders, name)}; add the file, or take "
                "the id off the list"
            )
        return path

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Read a mask."""
        path = self._mask_path(name)
        return None if path is None else read_mask(path, self.classes, "", self.meaning, self.notes, self.max_pixels)

    def has_mask(self, name: str) -> bool:
        """Return whether there is a mask."""
        return self._mask_path(name) is not None

    def mask_place(self, name: str) -> str:
        """Describe where the mask is, or should be."""
        folder = next((folder for folder in self.mask_folders if folder.is_dir()), self.mask_folders[0])
        return str(self._mask_path(name) or folder / f"{bare_name(name)}.png")

    def _mask_path(self, name: str) -> Path | None:
        path = self._find(self.mask_folders, f"{bare_name(name)}.png", MASK_ENDINGS)
        return path or (self._find(self.mask_folders, f"{name}.png", MASK_ENDINGS) if has_ending(name) else None)

    def _find(self, folders: Iterable[Path], name: str, endings: Sequence[str]) -> Path | None:
        check_name(name)
        for folder in folders:
            for candidate in _spellings(name, endings):
                if os.path.isfile(f"{folder}/{candidate}"):
                    if has_ending(name) and candidate != name and endings is IMAGE_ENDINGS:
                        self.notes.add("names are spelt differently in the list and on disk", f"{name}: {candidate}")
                    return inside(folder, candidate, self.links)
        return None


def has_ending(name: str) -> bool:
    """Return whether a name ends with an image's extension."""
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


def bare_name(name: str) -> str:
    """Return a name without its image's extension, if it has one."""
    return os.path.splitext(name)[0] if has_ending(name) else name


def check_one_file_each(split: Split) -> Iterator[tuple[str, str]]:
    """Return the names without an extension that fit several files, with the remedy.

    Args:
        split: whose images lie in folders; other layouts have no such names.
    """
    if not isinstance(split.files, FolderFiles) or all(map(has_ending, split.ids)):
        return
    kinds: dict[str, list[str]] = {}
    for folder in split.files.image_folders:
        for place, _, files in os.walk(folder):
            inner = os.path.relpath(place, folder)
            for file in filter(has_ending, files):
                name = file if inner == "." else f"{inner}/{file}"
                kinds.setdefault(bare_name(name), []).append(name)
    for name in split.ids:
        found = sorted(set(kinds.get(name, ())))
        if len(found) > 1:
            yield (
                name,
                f"{split.origin}: {name!r} can mean {' or '.join(found)}; write the extension in the list, too",
            )


def _spellings(name: str, endings: Sequence[str]) -> Iterator[str]:
    """Return the possible file names of a name, likeliest first: as it is, then with extensions in any capitals."""
    forms = [name] if name.isascii() else list(dict.fromkeys([name, *_composed(name)]))
    yield from forms
    for form in forms:
        stem, ending = os.path.splitext(form)
        own = ending.lower() in (*endings, *IMAGE_ENDINGS)
        kept = endings if endings is MASK_ENDINGS else [ending.lower()] if own else endings
        for change in (str.lower, str.upper, str.title):
            yield from ((stem if own else form) + change(one) for one in kept)


def _composed(name: str) -> Iterator[str]:
    """Spell accented letters as one character or as two: macOS and spreadsheets differ."""
    return (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))


def _alike(folders: Iterable[Path], name: str) -> str:
    """Suggest a file that may have been meant."""
    for folder in folders:
        place = folder / os.path.dirname(name)
        files = _listing(str(place))
        wanted = bare_name(os.path.basename(name)).lower()
        found = next((file for file in files if bare_name(file).lower() == wanted), None)
        if found:
            return f"; there is {place / found}: spell its name like that in the list"
    return ""


@lru_cache(maxsize=8)
def _listing(folder: str) -> list[str]:
    try:
        return sorted(filter(has_ending, os.listdir(folder)))
    except OSError:
        return []


def no_mask(files: Files, name: str) -> DamagedFileError:
    """Return the error of an image without a mask."""
    return DamagedFileError(f"no mask for the id {name!r}; add {files.mask_place(name)}, or take the id off the list")


def find_list(folder: Path, name: str, key: str, endings: Sequence[str]) -> Path:
    """Return the file of a list.

    Args:
        folder: where lists are.
        name: of the list; or a path, recognised by its extension.
        key: of the configuration, for messages.
        endings: extensions of list files, in the order of preference.

    Raises:
        UserError: there is no such file.
    """
    as_path = name.endswith(LIST_ENDINGS)
    paths = [Path(name)] if as_path else [folder / f"{name}{ending}" for ending in endings]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        lists = [file.stem for ending in endings for file in folder.glob(f"*{ending}")]
        hint = nearest(name, lists) if lists else f"; expected a list there ({', '.join(endings)})"
        if key == "data.val_list":
            hint += "; or train without masks and their scores by --data.val_list none"
        raise UserError(f"{key}: {paths[0]} does not exist{hint}")
    return path


def list_stem(name: str) -> str:
    """Return the name of a list, which may be given as a path, without folder and extension."""
    return Path(name).stem if name.endswith(LIST_ENDINGS) else Path(name).name


def read_list(path: Path, key: str, *, encoding: str | None = None, notes: Notes | None = None) -> list[str]:
    """Read a text file with one name per line.

    Raises:
        UserError: it is empty or not text.
    """
    notes = notes or Notes()
    ids = [clean_name(line, notes, where) for where, line in read_lines(path, encoding=encoding, notes=notes)]
    if not ids:
        raise UserError(f"{key}: {path} is empty; expected one id per line")
    return ids


def check_names(names: Iterable[str], path: Path, key: str) -> None:
    """Refuse names that are duplicates in a list or lead out of the data set.

    Args:
        names: of the list.
        path: file of the list.
        key: of the configuration, for messages.

    Raises:
        UserError: names the first of them.
    """
    seen: set[str] = set()
    for name in names:
        try:
            check_name(name)
        except DamagedFileError as error:
            raise UserError(f"{key}: {path}: {error}") from None
        if name in seen:
            raise UserError(f"{key}: {path}: {name!r} is listed twice; keep one")
        seen.add(name)
