"""Image labels from exports of labelling tools and from spreadsheets: picture → names of the classes it shows.

    tasks.json          Label Studio: choices, and the labels of regions (JSON and JSON-MIN)
    annotations.xml     CVAT for images: tags, and the labels of shapes
    FOLDER/labelmap.txt CVAT's segmentation masks: SegmentationClass/*.png in the colours of labelmap.txt
    x.json              MS COCO's format: images, annotations with a category, categories
    FOLDER/CLASS/*.jpg  folders named by class
    x.csv, x.xlsx       a column of pictures, and either a column of labels or one column of 0 and 1 per class

`match_pictures` then finds the files: tools write URLs, upload names or paths of another machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from fsr_fast.dataloading.labels import split_names
from fsr_fast.dataloading.layout import bare_name, has_ending
from fsr_fast.dataloading.notes import Notes
from fsr_fast.dataloading.tables import read_lines, read_table
from fsr_fast.errors import UserError

PICTURE_COLUMNS = ("image", "filename", "file_name", "file", "filepath", "path", "image_name", "img", "picture", "name")
LABEL_COLUMNS = ("labels", "label", "classes", "class", "tags", "tag", "categories", "category", "choice", "choices")
YES, NO = ("1", "1.0", "true", "yes", "x"), ("0", "0.0", "false", "no", "")
UPLOAD = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before the names of uploads
META = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")
LABELMAP = "labelmap.txt"
KNOWN = 'Label Studio\'s, MS COCO\'s, or [{"image": …, "labels": […]}, …]'


class Export(NamedTuple):
    """Labels of an export."""

    shown: dict[str, list[str]]
    """Classes of each picture, by the name that the tool wrote."""
    classes: list[str]
    """All classes, in the order of the tool, else by name."""
    silent: list[str]
    """Pictures about which the tool says nothing: not labelled yet, or only background."""


def read_export(
    source: Path, notes: Notes, *, encoding: str | None = None, separator: str | None = None, image: str | None = None
) -> Export:
    """Read the labels of an export, recognised by its extension and content.

    Args:
        source: file or folder.
        notes: records what was inferred.
        encoding: of a table, see `tables.read_table`.
        separator: likewise.
        image: name of the table's column of pictures; None: inferred from the header.

    Raises:
        UserError: it cannot be read, has no known format, or is ambiguous.
    """
    if source.is_dir():
        return _read_folders(source)
    if source.suffix.lower() == ".xml":
        return _read_cvat(source)
    if source.suffix.lower() == ".json":
        return _read_json(source, notes)
    return _read_table(source, notes, encoding, separator, image)


def match_pictures(names: Iterable[str], folder: Path, notes: Notes) -> dict[str, str]:
    """Find the pictures behind names, URLs or paths of another machine.

    Args:
        names: as the tool wrote them.
        folder: with the pictures, possibly in subfolders.
        notes: records what was inferred.

    Returns:
        The path below the folder for each name.

    Raises:
        UserError: a picture is missing, or two fit.
    """
    places: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if has_ending(path.name):
            parts = path.relative_to(folder).parts
            for start in range(len(parts)):
                tail = "/".join(parts[start:])
                for form in (tail, bare_name(tail)):
                    places.setdefault(form, []).append("/".join(parts))
    found, missing = {}, []
    for name in names:
        fitting = next((places[form] for form in _forms(name) if form in places), [])
        exact = [place for place in fitting if place == name] or fitting
        if len(exact) > 1:
            raise UserError(f"{name!r} can mean {' or '.join(exact)} in {folder}; rename one of the two")
        if not exact:
            missing.append(name)
            continue
        found[name] = exact[0]
        if exact[0] != name:
            notes.add(f"names of pictures are looked up in {folder}", f"{name}: {exact[0]}")
    if missing:
        raise UserError(
            f"{len(missing)} of {len(missing) + len(found)} pictures are not in {folder}, the first is {missing[0]!r}; "
            "put them there, in subfolders if you like"
        )
    return found


def _forms(name: str) -> Iterator[str]:
    """Return the paths that a name may mean, longest first."""
    address = urlsplit(name.replace("\\", "/"))
    inner = parse_qs(address.query).get("d", [address.path])[0]  # Label Studio: /data/local-files/?d=folder/x.jpg
    for path in (name.replace("\\", "/"), unquote(inner)):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        yield from ("/".join(parts[start:]) for start in range(len(parts)))
        if parts and UPLOAD.match(parts[-1]):
            yield UPLOAD.sub("", parts[-1], count=1)


def read_labelmap(path: Path) -> tuple[list[str], dict[int | str, int]]:
    """Read CVAT's labelmap.txt: lines `name:red,green,blue:parts:actions`.

    Returns:
        The classes in their order, and the meaning of each colour, for `mask_files.read_mask`.

    Raises:
        UserError: a line is malformed.
    """
    classes: list[str] = []
    meaning: dict[int | str, int] = {}
    for where, line in read_lines(path):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3}):.*", line)
        if match is None:
            raise UserError(f"{where}: {line!r}; expected name:red,green,blue:parts:actions, as CVAT writes it")
        if match[1].lower() != "background":
            classes.append(match[1])
        colour = "".join(f"{int(match[number]):02x}" for number in (2, 3, 4))
        meaning[f"#{colour}"] = 0 if match[1].lower() == "background" else len(classes)
    return classes, meaning


def _read_table(source: Path, notes: Notes, encoding: str | None, separator: str | None, image: str | None) -> Export:
    table = read_table(source, encoding=encoding, separator=separator, notes=notes, key="import")
    header = [name.lower() for name in table.header]
    place = _picture_column(source, table.header, image)
    labels = [number for number, name in enumerate(header) if name in LABEL_COLUMNS and number != place]
    if len(labels) > 1:
        both = " or ".join(repr(table.header[number]) for number in labels)
        raise UserError(f"{source}: the labels may be in {both}; rename the column that does not hold them")
    shown: dict[str, list[str]] = {}
    rows = [(where, cells + [""] * (len(header) - len(cells))) for where, cells in table.rows]
    for where, cells in rows:
        if not cells[place]:
            raise UserError(f"{where}: names no picture; fill in the column {table.header[place]!r}")
    if labels:
        for where, cells in rows:
            found = shown.setdefault(cells[place], [])
            found += [name for name in split_names(cells[labels[0]], where) if name not in found]
        return Export(shown, sorted({name for names in shown.values() for name in names}), [])
    columns = [
        number
        for number, name in enumerate(header)
        if name and number != place and all(cells[number].lower() in YES + NO for _, cells in rows)
    ]
    others = [name for number, name in enumerate(table.header) if name and number not in (*columns, place)]
    if not columns:
        raise UserError(
            f"{source}: no column of labels; expected one called {', '.join(LABEL_COLUMNS[:4])}, or a column of 0 and "
            f"1 for each class; the header is {table.header}"
        )
    notes.add(f"{source.name}: classes are the columns of 0 and 1: {', '.join(table.header[i] for i in columns)}")
    if others:
        notes.add(f"{source.name}: columns that hold anything else are left out: {', '.join(map(repr, others))}")
    for where, cells in rows:
        if cells[place] in shown:
            raise UserError(f"{where}: {cells[place]!r} has a row already; keep one")
        shown[cells[place]] = [table.header[number] for number in columns if cells[number].lower() in YES]
    return Export(shown, [table.header[number] for number in columns], [])


def _picture_column(source: Path, header: list[str], chosen: str | None) -> int:
    if chosen is not None:
        if chosen not in header:
            raise UserError(f"--image-column: {source} has no column {chosen!r}; it has {', '.join(map(repr, header))}")
        return header.index(chosen)
    known = [name for name in PICTURE_COLUMNS if name in map(str.lower, header)]
    if not known:
        raise UserError(f"{source}: no column of pictures; name it by --image-column; the header is {header}")
    if len(known) > 1 and known[0] != "image":
        raise UserError(f"{source}: the pictures may be in {' or '.join(known)}; choose by --image-column {known[0]}")
    return [name.lower() for name in header].index(known[0])


def _read_folders(source: Path) -> Export:
    shown: dict[str, list[str]] = {}
    classes: list[str] = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        pictures = [path for path in sorted(folder.rglob("*")) if has_ending(path.name)]
        nothing = folder.name.lower() in ("background", "none", "negative", "negatives")
        if pictures and not nothing:
            classes.append(folder.name)
        for path in pictures:
            shown[path.relative_to(source).as_posix()] = [] if nothing else [folder.name]
    if not classes:
        raise UserError(f"{source}: no folder with pictures in it; expected one per class, named after it")
    return Export(shown, classes, [])


def _read_cvat(source: Path) -> Export:
    try:
        root = ElementTree.parse(source).getroot()
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{source}: not valid XML: {error}; export it again") from None
    images = root.findall("image")
    if root.tag != "annotations" or not images:
        raise UserError(f"{source}: expected CVAT's XML: <annotations> with an <image> for each picture")
    shown = {image.get("name", ""): list(dict.fromkeys(item.get("label", "") for item in image)) for image in images}
    named = [name.text or "" for name in root.iterfind("meta//label/name")]
    used = sorted({name for names in shown.values() for name in names} - set(named))
    return Export(shown, [*named, *used], [name for name, names in shown.items() if not names])


def _read_json(source: Path, notes: Notes) -> Export:
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON: {error}; export it again") from None
    try:
        if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
            return _read_coco(content, notes)
        if isinstance(content, list) and content and all(isinstance(task, dict) for task in content):
            return _read_label_studio(content, notes)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: {type(error).__name__}: {error}; expected {KNOWN}") from None
    raise UserError(f"{source}: not a known format; expected {KNOWN}")


def _read_coco(content: dict[str, Any], notes: Notes) -> Export:
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    files = {image["id"]: str(image["file_name"]) for image in content["images"]}
    shown: dict[str, list[str]] = {file: [] for file in files.values()}
    for annotation in content["annotations"]:
        found = shown[files[annotation["image_id"]]]
        name = names[annotation["category_id"]]
        if name not in found:
            found.append(name)
    used = {name for found in shown.values() for name in found}
    unused = [name for name in names.values() if name not in used]
    if unused:
        notes.add(f"categories that no picture shows are left out: {', '.join(unused)}")
    classes = [name for name in names.values() if name in used]
    return Export(shown, classes, [file for file, found in shown.items() if not found])


def _read_label_studio(tasks: list[dict[str, Any]], notes: Notes) -> Export:
    shown: dict[str, list[str]] = {}
    silent = []
    for task in tasks:
        full = "annotations" in task
        data = task["data"] if full else task
        image = str(data.get("image") or next(value for value in data.values() if has_ending(str(value))))
        if full:
            found = [
                {name for result in annotation["result"] for name in _names(result.get("value", {}))}
                for annotation in task["annotations"]
                if not annotation.get("was_cancelled")
            ]
        else:
            found = [_names_of_plain_task(task, notes)]
        if any(names != found[0] for names in found):
            notes.add("annotators disagree: every class that one of them saw is used", image)
        shown[image] = sorted(set().union(*found))
        if not shown[image] and task.get("labels") != []:
            silent.append(image)
    return Export(shown, sorted({name for names in shown.values() for name in names}), silent)


def _names_of_plain_task(task: dict[str, Any], notes: Notes) -> set[str]:
    """Return the labels of a task in JSON-MIN, where data and results are side by side."""
    found = set()
    for key, value in task.items():
        if key in LABEL_COLUMNS:
            found |= {value} if isinstance(value, str) else set(_names({"labels": value}))
        elif isinstance(value, (dict, list)):
            found |= set(_names(value))
        elif isinstance(value, str) and key not in (*META, *PICTURE_COLUMNS):
            notes.add(f"the field {key!r} is not read; labels are in {', '.join(LABEL_COLUMNS)}, or in regions")
    return found


def _names(value: Any) -> Iterator[str]:
    """Return the labels in a value of Label Studio: choices, or labels of a region, whatever its kind."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        for key, names in value.items():
            if key == "choices" or key.endswith("labels"):
                for name in names if isinstance(names, list) else [names]:
                    yield from [name] if isinstance(name, str) else _names(name)
