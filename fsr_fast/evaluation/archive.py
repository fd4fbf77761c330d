"""Results for the PASCAL VOC test server: one tar of palette PNGs, read back and checked."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fsr_fast.dataloading.images import DamagedFileError, open_picture
from fsr_fast.dataloading.palette import voc_palette
from fsr_fast.errors import UserError
from fsr_fast.runtime.files import atomic_file

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def write_archive(path: Path, labels: Path, names: Iterable[str]) -> None:
    """Write the archive, whole or not at all.

    Args:
        path: .tar, or .tgz / .tar.gz, which is compressed.
        labels: folder of the palette PNGs.
        names: of the images.
    """
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name in names:
            content = (labels / f"{name}.png").read_bytes()
            entry = tarfile.TarInfo(f"{FOLDER}/{name}.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def check_archive(path: Path, sizes: Mapping[str, tuple[int, int]], classes: int) -> None:
    """Read an archive back and check what the server would refuse.

    Args:
        path: the archive.
        sizes: width and height of each image of the list.
        classes: highest label; 255 is not allowed.

    Raises:
        UserError: a file is missing, one too many, damaged, of another size than its image, without VOC's palette, or
            holds a label out of range.
    """
    missing = dict(sizes)
    with tarfile.open(path) as archive:
        for entry in archive:
            name = entry.name.removeprefix(f"{FOLDER}/").removesuffix(".png")
            size = missing.pop(name, None)
            file = archive.extractfile(entry)
            if size is None or file is None or entry.name != f"{FOLDER}/{name}.png":
                raise UserError(f"{path}: {entry.name} does not belong to an image of the list, or stands there twice")
            fault = _fault(file.read(), size, classes)
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
