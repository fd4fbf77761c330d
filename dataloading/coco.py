"""MS COCO's own annotations: `instances_*.json` gives the list, the image labels and the masks.

    ROOT/annotations/instances_train2014.json, instances_val2014.json
    ROOT/train2014/*.jpg, ROOT/val2014/*.jpg      also below ROOT/images or ROOT/JPEGImages

The list `train` is that of all images with an object: 82,081 of the official file, 40,137 for `val`. An image shows the
classes of its objects, crowds included. Category ids have gaps (1 to 90); classes go by their names and take the mask
values 1 to 80. In a mask, small objects cover large ones. Source: official code's lists; coco2voc for the order.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.images import MAX_PIXELS, DamagedFileError
from fsr_fast.dataloading.layout import FolderFiles, Split, find_list, read_list
from fsr_fast.dataloading.names import Names
from fsr_fast.errors import UserError, nearest

FORM = "expected MS COCO's instances file with images, annotations and categories"


class Instances:
    """What an instances file says, in compact arrays.

    Args:
        path: the JSON file.
        classes: names of the foreground classes, in the order of the mask values 1, 2, ….
        with_masks: keep the outlines, too.

    Raises:
        UserError: the file is no instances file, or a category is not among the classes.
    """

    def __init__(self, path: Path, classes: Sequence[str], *, with_masks: bool) -> None:
        self.path = path
        try:
            images, objects, categories = _parse(path, with_masks)
            numbers = _class_numbers(path, categories, classes)
            images = sorted(images, key=lambda image: image[1])
            rows = {image[0]: row for row, image in enumerate(images)}
            objects = sorted(
                objects, key=lambda item: (rows[item[0]], -item[2])
            )  # large ones first: later ones cover them
            self._image = np.array([rows[item[0]] for item in objects], np.int64)
            self._class = np.array([numbers[item[1]] for item in objects], np.int64)
            self._sizes = np.array([image[2:] for image in images], np.int64).reshape(-1, 2)
            self._rows = {Path(image[1]).with_suffix("").as_posix(): row for row, image in enumerate(images)}
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: {type(error).__name__}: {error}; {FORM}") from None
        self._outlines = [item[3] for item in objects] if with_masks else None
        if len(self._rows) < len(images):
            raise UserError(f"{path}: two images have one name; expected a name each")

    def listed(self) -> list[str]:
        """Return the names of all images with an object, in the order of their names."""
        shown = np.zeros(len(self._rows), bool)
        shown[self._image] = True
        return [name for name, row in self._rows.items() if shown[row]]

    def labels(self, name: str) -> list[int]:
        """Return the classes of an image, as numbers from 0."""
        return np.unique(self._class[self._objects(name)]).tolist()

    def mask(self, name: str) -> NDArray[np.uint8]:
        """Draw the mask of an image, (H, W) uint8: 0 background, 1… classes."""
        from pycocotools import mask as outlines

        if self._outlines is None:
            raise ValueError("the outlines were not kept")
        height, width = (int(side) for side in self._sizes[self._row(name)])
        if not 0 < height * width <= MAX_PIXELS:
            raise DamagedFileError(
                f"{self.path}: {name!r} has {width} x {height} pixels; at most {MAX_PIXELS:,} are drawn"
            )
        drawn = np.zeros((height, width), np.uint8)
        for item in range(*self._objects(name).indices(len(self._image))):
            outline = marshal.loads(self._outlines[item])
            try:
                if isinstance(outline, list):
                    outline = outlines.merge(outlines.frPyObjects(outline, height, width))
                elif isinstance(outline["counts"], list):
                    outline = outlines.frPyObjects(outline, height, width)
                drawn[outlines.decode(outline).astype(bool)] = self._class[item] + 1
            except Exception as error:  # pycocotools raises all kinds of errors on other forms
                raise DamagedFileError(f"{self.path}: an outline of {name!r} cannot be drawn: {error}") from None
        return drawn

    def _row(self, name: str) -> int:
        if name not in self._rows:
            raise UserError(f"{self.path}: no image {name!r}; take it off the list")
        return self._rows[name]

    def _objects(self, name: str) -> slice:
        first, last = np.searchsorted(self._image, [self._row(name), self._row(name) + 1])
        return slice(int(first), int(last))


@dataclass(frozen=True)
class CocoFiles:
    """Images in folders, masks drawn from an instances file.

    Args:
        images: gives the images.
        instances: gives the masks; none: there are no masks.
    """

    images: FolderFiles
    instances: Instances | None

    def image_path(self, name: str) -> Path:
        """Return the file of an image."""
        return self.images.image_path(name)

    def mask(self, name: str) -> NDArray[np.uint8] | None:
        """Draw a mask."""
        return self.instances.mask(name) if self.instances else None

    def has_mask(self, name: str) -> bool:
        """Return whether masks can be drawn."""
        return self.instances is not None

    def mask_place(self, name: str) -> str:
        """Describe where the mask comes from."""
        return f"{self.instances.path if self.instances else 'annotations'}: {name}"


def has_instances(root: Path) -> bool:
    """Return whether a folder holds MS COCO's own annotations."""
    return any(root.glob("annotations/instances_*.json"))


def open_coco(root: Path, list_name: str, key: str, classes: Sequence[str], *, with_masks: bool) -> Split:
    """Open a list of MS COCO.

    Args:
        root: folder of the data set.
        list_name: `train` or `val`; or the path of a text file of that name, with some of its images.
        key: of the configuration, for messages.
        classes: names of the foreground classes.
        with_masks: masks are wanted.

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
    instances = Instances(path, classes, with_masks=with_masks)
    origin, ids = path, instances.listed()
    if list_name.endswith(".txt"):
        origin = find_list(root, list_name, key, (".txt",))
        ids = read_list(origin, key)
    part = path.stem.removeprefix("instances_")
    places = [place / part for place in (root, root / "images", root / "JPEGImages")]
    folders = [place for place in places if place.is_dir()]
    if not folders:
        raise UserError(f"data.root: {root} has no folder {part}; put the images of {path.name} there")
    files = CocoFiles(FolderFiles(tuple(folders), (), len(classes)), instances if with_masks else None)
    return Split(origin, Names(ids), tuple(classes), files, instances.labels)


def _parse(path: Path, with_masks: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """Return images (id, file, height, width), objects (image, category, area, outline) and categories.

    Each entry is made compact as soon as it is parsed: the objects of a whole file would take gigabytes.
    """

    def compact(entry: dict[str, Any]) -> Any:
        if "category_id" in entry:
            outline = marshal.dumps(entry["segmentation"]) if with_masks else b""
            return entry["image_id"], entry["category_id"], float(entry["area"]), outline
        if "file_name" in entry:
            return entry["id"], entry["file_name"], int(entry["height"]), int(entry["width"])
        return entry

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=compact)
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; fetch it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {FORM}")
    return content["images"], content["annotations"], content["categories"]


def _class_numbers(path: Path, categories: Iterable[dict[str, Any]], classes: Sequence[str]) -> dict[int, int]:
    numbers = {}
    for category in categories:
        if category["name"] not in classes:
            raise UserError(f"{path}: unknown class {category['name']!r}{nearest(category['name'], classes)}")
        numbers[category["id"]] = classes.index(category["name"])
    return numbers
