"""How a data set lies on disk: its lists, and the files that belong to a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.images import DamagedFileError, check_name, inside, read_mask
from fsr_fast.dataloading.names import Names
from fsr_fast.errors import UserError, nearest

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")
LIST_ENDINGS = (".txt", ".csv", ".json")


class Files(Protocol):
    """Return the image and the mask of a name."""

    def image_path(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DamagedFileError: there is none, or it leads out of the data set.
        """
        ...

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Read a mask, (H, W) uint8 as it is stored: 0 background, 1… classes, 255 ignored; none where there is none.

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
    """One list of a data set as it stands on disk. Nothing about its images is checked yet."""

    origin: Path
    """File of the list."""
    ids: Names
    classes: tuple[str, ...]
    """Names of all foreground classes, in the order of the mask values 1, 2, …."""
    files: Files
    labels: Callable[[str], list[int]]
    """Return the classes of an image, as numbers from 0; raises `UserError` where they cannot be read."""


@dataclass(frozen=True)
class FolderFiles:
    """Files in folders: `FOLDER/NAME.jpg` (or .jpeg, .png) and `FOLDER/NAME.png`.

    A name may also carry the ending of its image.

    Args:
        image_folders: where images are, in the order of preference.
        mask_folders: where masks are, in the order of preference.
        classes: number of foreground classes.
    """

    image_folders: tuple[Path, ...]
    mask_folders: tuple[Path, ...]
    classes: int

    def image_path(self, name: str) -> Path:
        """Return the file of an image."""
        bare = Path(name).suffix.lower() not in IMAGE_ENDINGS
        names = [name + ending for ending in IMAGE_ENDINGS] if bare else [name]
        path = _first(self.image_folders, names)
        if path is None:
            raise DamagedFileError(
                f"{' or '.join(map(str, self.image_folders))}: no image for the id {name!r} "
                f"(endings: {', '.join(IMAGE_ENDINGS)}); add the file, or take the id off the list"
            )
        return path

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Read a mask."""
        path = _first(self.mask_folders, [_mask_name(name)])
        return None if path is None else read_mask(path, self.classes)

    def has_mask(self, name: str) -> bool:
        """Return whether there is a mask."""
        return _first(self.mask_folders, [_mask_name(name)]) is not None

    def mask_place(self, name: str) -> str:
        """Describe where the mask is, or should be."""
        folder = next((folder for folder in self.mask_folders if folder.is_dir()), self.mask_folders[0])
        return str(_first(self.mask_folders, [_mask_name(name)]) or folder / _mask_name(name))


def no_mask(files: Files, name: str) -> DamagedFileError:
    """Return the error of an image without a mask."""
    return DamagedFileError(f"no mask for the id {name!r}; add {files.mask_place(name)}, or take the id off the list")


def find_list(folder: Path, name: str, key: str, endings: Sequence[str]) -> Path:
    """Return the file of a list.

    Args:
        folder: where lists are.
        name: of the list; or a path, recognised by its ending.
        key: of the configuration, for messages.
        endings: of list files, in the order of preference.

    Raises:
        UserError: there is no such file.
    """
    as_path = name.endswith(LIST_ENDINGS)
    paths = [Path(name)] if as_path else [folder / f"{name}{ending}" for ending in endings]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        lists = [file.stem for ending in endings for file in folder.glob(f"*{ending}")]
        hint = nearest(name, lists) if lists else f"; expected a list there ({', '.join(endings)})"
        raise UserError(f"{key}: {paths[0]} does not exist{hint}")
    return path


def list_stem(name: str) -> str:
    """Return the name of a list, which may be given as a path, without folder and ending."""
    return Path(name).stem if name.endswith(LIST_ENDINGS) else Path(name).name


def read_list(path: Path, key: str) -> list[str]:
    """Read a text file with one name a line.

    Raises:
        UserError: it is empty or not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not text in UTF-8: {error}; write it anew, one id a line") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"{key}: {path} is empty; expected one id a line")
    return ids


def check_names(names: Iterable[str], path: Path, key: str) -> None:
    """Refuse names that stand twice in a list or lead out of the data set.

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
            raise UserError(f"{key}: {path}: {name!r} stands there twice; keep one")
        seen.add(name)


def _mask_name(name: str) -> str:
    ending = Path(name).suffix
    return f"{name.removesuffix(ending) if ending.lower() in IMAGE_ENDINGS else name}.png"


def _first(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    for folder in folders:
        for name in names:
            check_name(name)
            if (folder / name).is_file():
                return inside(folder, name)
    return None
