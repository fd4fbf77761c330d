"""Results for the PASCAL VOC test server: one tar of palette PNGs, read back and checked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fsr_fast.dataloading.images import DamagedFileError, open_picture
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.errors import UserError
from fsr_fast.runtime.files import atomic_file

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def write_archive(path: Path, labels: Path, sizes: Mapping[str, tuple[int, int]], classes: int) -> None:
    """Write the archive and read it back as the server would; it gets its name only if it is valid.

    Args:
        path: .tar, or .tgz / .tar.gz, which is compressed.
        labels: folder of the palette PNGs.
        sizes: width and height of each image of the list, by name.
        classes: highest label; 255 is not allowed.

    Raises:
        UserError: a label map is missing, damaged, of another size than its image, without VOC's palette, or holds a
            label out of range.
    """
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with atomic_file(path) as file:
        with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
            for name in sizes:
                content = (labels / f"{name}.png").read_bytes()
                entry = tarfile.TarInfo(f"{FOLDER}/{name}.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        file.seek(0)
        check_archive(file, path, sizes, classes)


def check_archive(file: BinaryIO, path: Path, sizes: Mapping[str, tuple[int, int]], classes: int) -> None:
    """Read an archive back and check what the server would refuse.

    Args:
        file: the archive.
        path: its name in messages.
        sizes: width and height of each image of the list.
        classes: highest label; 255 is not allowed.

    Raises:
        UserError: a file is missing, surplus, damaged, of another size than its image, without VOC's palette, or holds
            a label out of range.
    """
    missing = dict(sizes)
    with tarfile.open(fileobj=file) as archive:
        for entry in archive:
            name = entry.name.removeprefix(f"{FOLDER}/").removesuffix(".png")
            size = missing.pop(name, None)
            content = archive.extractfile(entry)
            if size is None or content is None or entry.name != f"{FOLDER}/{name}.png":
                raise UserError(f"{path}: {entry.name} does not belong to an image of the list, or is a duplicate")
            fault = _fault(content.read(), size, classes)
            if fault:
                raise UserError(f"{path}: {entry.name}: {fault}; delete the folder of the labels and write them again")
    if missing:
        raise UserError(f"{path}: {len(missing)} images of the list are missing, the first is {next(iter(missing))!r}")


def _fault(content: bytes, size: tuple[int, int], classes: int) -> str | None:
    try:
        with open_picture(content, "the label map") as picture:
            mode, found, palette, labels = picture.mode, picture.size, picture.getpalette(), np.asarray(picture)
    except DamagedFileError as error:
        return str(error).partition(";")[0]
    if mode != "P" or palette is None:
        return f"a picture of mode {mode}, expected a palette"
    if palette != voc_palette().ravel().tolist()[: len(palette)]:
        return "its palette is not PASCAL VOC's"
    if found != size:
        return f"{found[0]} x {found[1]} pixels, but the image has {size[0]} x {size[1]}"
    if labels.max() > classes:
        return f"holds the label {labels.max()}, expected 0 to {classes}"
    return None
