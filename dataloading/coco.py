"""MS COCO's own annotations: `instances_*.json` holds the list, the image labels and the masks.

    ROOT/annotations/instances_train2014.json, instances_val2014.json
    ROOT/train2014/*.jpg, ROOT/val2014/*.jpg      also below ROOT/images or ROOT/JPEGImages

The list `train` holds all images with an object: 82,081 of the official file, 40,137 for `val`; with
`data.negatives` all other images of the file are also trained on, as images that show no class. An image shows the
classes of its objects, crowds included. Category ids have gaps (1 to 90); classes are matched by name and have the mask
values 1 to 80. In a mask, small objects cover large ones. Source: official code's lists; coco2voc for the order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.images import MAX_PIXELS, DamagedFileError
from fsr_fast.dataloading.layout import FolderFiles, Split, bare_name, find_list, read_list
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError, nearest

FORM = "expected MS COCO's instances file with images, annotations and categories"


class Instances:
    """Content of an instances file, in compact arrays.

    Args:
        path: the JSON file.
        classes: names of the foreground classes, in the order of the mask values 1, 2, ….
        with_masks: keep the outlines, too.
        max_pixels: largest mask that is drawn.

    Raises:
        UserError: the file is not an instances file, or a category is not among the classes.
    """

    def __init__(self, path: Path, classes: Sequence[str], *, with_masks: bool, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self._max_pixels = path, max_pixels
        try:
            content = _parse(path)
            numbers = _class_numbers(path, content.categories, classes)
            images = sorted(content.images, key=lambda image: image.file_name)
            self._files = Names(str(image.file_name).replace("\\", "/") for image in images)
            self._sizes = np.array([(int(one.height), int(one.width)) for one in images], np.int64).reshape(-1, 2)
            rows = {image.id: row for row, image in enumerate(images)}
            objects = content.annotations
            row = np.array([rows[one.image_id] for one in objects], np.int64)
            area = np.array([float(one.area) for one in objects])
            order = np.lexsort((-area, row))  # large ones first, so that later ones cover them
            self._class = np.array([numbers[one.category_id] for one in objects], np.int64)[order]
            self._first = np.searchsorted(row[order], np.arange(len(images) + 1)).tolist()
            self._rows = _name_rows(self._files)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: {type(error).__name__}: {error}; {FORM}") from None
        self._outlines = [bytes(objects[number].segmentation) for number in order] if with_masks else None
        self.notes = Notes()
        if len(self._rows) < len(images):
            raise UserError(f"{path}: two images have the same name; expected unique names")

    def listed(self, *, negatives: bool = False) -> list[str]:
        """Return the names of all images with an object, in the order of their names; or, with negatives, of all."""
        shown = np.diff(self._first) > 0
        return [name for name, row in self._rows.items() if negatives or shown[row]]

    def file_name(self, name: str) -> str:
        """Return the file of an image as it is written in the instances file."""
        return self._files[self._row(name)]

    def labels(self, name: str) -> list[int]:
        """Return the classes of an image, as numbers from 0."""
        return sorted(set(self._class[self._objects(name)].tolist()))

    def mask(self, name: str) -> NDArray[np.uint8]:
        """Draw the mask of an image, (H, W) uint8: 0 background, 1… classes."""
        from pycocotools import mask as outlines

        if self._outlines is None:
            raise ValueError("the outlines were not kept")
        height, width = (int(side) for side in self._sizes[self._row(name)])
        if not 0 < height * width <= self._max_pixels:
            raise DamagedFileError(
                f"{self.path}: {name!r} has {width} x {height} pixels; at most {self._max_pixels:,} are drawn, unless "
                "--data.max_pixels is raised"
            )
        drawn = np.zeros((height, width), np.uint8)
        for item in range(len(self._outlines))[self._objects(name)]:
            where = f"{self.path}: an outline of {name!r}"
            try:
                shape = _check_outline(msgspec.json.decode(self._outlines[item]), height, width)
                if shape is None:
                    self.notes.add(
                        f"{self.path.name}: outlines without an area (none, or fewer than three points) are left out",
                        name,
                    )
                    continue
                parts = shape if isinstance(shape, list) else [shape]
                if not isinstance(shape, dict) or isinstance(shape["counts"], list):
                    parts = outlines.frPyObjects(parts, height, width)
                drawn[outlines.decode(outlines.merge(parts)).astype(bool)] = self._class[item] + 1
            except Exception as error:  # malformed numbers, and whatever pycocotools raises
                raise DamagedFileError(
                    f"{where} cannot be drawn: {error}; correct it, or take the image off the list"
                ) from None
        return drawn

    def _row(self, name: str) -> int:
        row = self._rows.get(name)
        if row is None:
            row = self._rows.get(bare_name(name))
        if row is None:
            raise UserError(f"{self.path}: no image {name!r}; take it off the list")
        return row

    def _objects(self, name: str) -> slice:
        row = self._row(name)
        return slice(self._first[row], self._first[row + 1])


@dataclass(frozen=True)
class CocoFiles:
    """Images in folders, masks drawn from an instances file.

    Args:
        images: finds the images.
        instances: source of the file names and the masks.
        with_masks: whether there are masks.
    """

    images: FolderFiles
    instances: Instances
    with_masks: bool

    def image_path(self, name: str) -> Path:
        """Return the file of an image."""
        return self.images.image_path(self.instances.file_name(name))

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Draw a mask."""
        return self.instances.mask(name) if self.with_masks else None

    def has_mask(self, name: str) -> bool:
        """Return whether masks can be drawn."""
        return self.with_masks

    def mask_place(self, name: str) -> str:
        """Describe where the mask comes from."""
        return f"{self.instances.path}: {name}"


def has_instances(root: Path) -> bool:
    """Return whether a folder holds MS COCO's own annotations."""
    return any(root.glob("annotations/instances_*.json"))


def open_coco(
    root: Path,
    list_name: str,
    key: str,
    classes: Sequence[str],
    *,
    with_masks: bool,
    negatives: bool = False,
    links: tuple[Path, ...] = (),
    max_pixels: int = MAX_PIXELS,
) -> Split:
    """Open a list of MS COCO.

    Args:
        root: folder of the data set.
        list_name: `train` or `val`; or the path of a text file of that name, with some of its images.
        key: of the configuration, for messages.
        classes: names of the foreground classes.
        with_masks: masks are needed.
        negatives: also list the images without an object.
        links: roots into which symbolic links may lead.
        max_pixels: largest mask that is drawn.

    Raises:
        UserError: there is no such list, or the annotations cannot be read.
    """
    stem = Path(list_name).stem
    folder = root / "annotations"
    candidates = (f"instances_{stem}", f"instances_{stem}2014")
    path = next((folder / f"{name}.json" for name in candidates if (folder / f"{name}.json").is_file()), None)
    if path is None:
        known = [file.stem.removeprefix("instances_") for file in folder.glob("instances_*.json")]
        hint = nearest(stem, [*known, *(part.removesuffix("2014") for part in known)])
        raise UserError(f"{key}: {folder} holds no {' or '.join(candidates)}.json{hint}")
    instances = Instances(path, classes, with_masks=with_masks, max_pixels=max_pixels)
    origin, ids = path, instances.listed(negatives=negatives)
    if list_name.endswith(".txt"):
        origin = find_list(root, list_name, key, (".txt",))
        ids = read_list(origin, key)
    part = path.stem.removeprefix("instances_")
    places = [place / part for place in (root, root / "images", root / "JPEGImages")]
    folders = [place for place in places if place.is_dir()]
    if not folders:
        raise UserError(f"data.root: {root} has no folder {part}; put the images of {path.name} there")
    images = FolderFiles(tuple(folders), (), len(classes), links, notes=instances.notes)
    files = CocoFiles(images, instances, with_masks)
    return Split(origin, Names(ids), tuple(classes), files, instances.labels, instances.notes)


def _name_rows(files: Names) -> dict[str, int]:
    """Name the images by their files without extensions, unless two files differ only in the extension."""
    bare = [bare_name(file) for file in files]
    count = Counter(bare)
    return {name if count[name] == 1 else file: row for row, (name, file) in enumerate(zip(bare, files, strict=True))}


def _check_outline(outline: Any, height: int, width: int) -> Any:
    """Return an outline that pycocotools can draw: polygons with an area, or a run-length code; None: no area.

    pycocotools trusts its input: coordinates far outside, or runs beyond the picture, crash it.

    Raises:
        ValueError: it does not belong to a picture of this size, or has another form.
    """
    if isinstance(outline, list):
        polygons = [np.asarray(polygon, np.float64) for polygon in outline]
        polygons = [polygon for polygon in polygons if polygon.size >= 6]
        side = max(height, width)
        for polygon in polygons:
            if polygon.ndim != 1 or polygon.size % 2:
                raise ValueError("a polygon of another form than [x1, y1, x2, y2, …]")
            if not ((polygon >= -side).all() and (polygon <= 2 * side).all()):
                raise ValueError(f"its points lie far outside the picture of {width} x {height} pixels")
        return [polygon.tolist() for polygon in polygons] or None
    if list(outline["size"]) != [height, width]:
        raise ValueError(f"its size is {outline['size']}, but the picture has [{height}, {width}]")
    counts = outline["counts"]
    runs = counts if isinstance(counts, list) else _run_lengths(counts.encode() if isinstance(counts, str) else counts)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        raise ValueError(f"its runs are {sum(runs)} pixels long, the picture is {height * width}")
    return outline


def _run_lengths(code: bytes) -> list[int]:
    """Read MS COCO's compressed run-length code: five bits per byte, the lengths from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for byte in code:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


class _Image(msgspec.Struct, gc=False):
    id: Any
    file_name: Any
    height: Any
    width: Any


class _Object(msgspec.Struct, gc=False):
    image_id: Any
    category_id: Any
    area: Any
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[dict[str, Any]]


def _parse(path: Path) -> _File:
    """Read what is needed of an instances file; its objects as a whole would take gigabytes, and most of the time."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}; {FORM}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; download it again") from None


def _class_numbers(path: Path, categories: Iterable[dict[str, Any]], classes: Sequence[str]) -> dict[int, int]:
    numbers = {}
    for category in categories:
        if category["name"] not in classes:
            raise UserError(f"{path}: unknown class {category['name']!r}{nearest(str(category['name']), classes)}")
        numbers[category["id"]] = classes.index(category["name"])
    return numbers
