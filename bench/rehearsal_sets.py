"""Data sets of the real size for the rehearsal: counts, names, picture sizes and annotations of PASCAL VOC and MS COCO.

Of every hundred pictures one is drawn and stored; the others are hard links to it. The pictures are enlarged scenes of
the embedded data set, with grain, so that a file has about the size of a photograph's.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.creatures import draw_scene

LINKED = 100
"""Number of names per stored picture."""


class Part(NamedTuple):
    """One list of a data set."""

    name: str
    images: int
    """Images of the list."""
    unlisted: int = 0
    """Images in the annotations without an object, which are on no list."""
    objects: int = 0
    """Objects of the annotations."""


class Layout(NamedTuple):
    """A data set to rehearse."""

    size: tuple[int, int]
    """Width and height of the pictures, in pixels."""
    parts: tuple[Part, Part]
    """Training and validation."""
    classes: tuple[str, ...]


LAYOUTS = {
    "voc": Layout((500, 375), (Part("train_aug", 10_582), Part("val", 1_449)), VOC_CLASSES),
    "coco": Layout(
        (640, 480),
        (Part("train2014", 82_081, 702, 604_907), Part("val2014", 40_137, 367, 291_875)),
        COCO_CLASSES,
    ),
}


def make_set(root: Path, name: str, divisor: int) -> Layout:
    """Write a data set, unless the folder already holds it.

    Args:
        root: folder; it is complete when `rehearsal.json` is there.
        name: `voc` or `coco`.
        divisor: all counts are divided by this.

    Returns:
        The layout with the counts that were written.
    """
    layout = LAYOUTS[name]
    train, val = (Part(part.name, *(-(-count // divisor) for count in part[1:])) for part in layout.parts)
    layout = layout._replace(parts=(train, val))
    marker, content = root / "rehearsal.json", json.dumps({"layout": name, "parts": layout.parts})
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        return layout
    for part in layout.parts:
        (_write_voc if name == "voc" else _write_coco)(root, layout, part)
    marker.write_text(content, encoding="utf-8")
    return layout


def _write_voc(root: Path, layout: Layout, part: Part) -> None:
    folders = [root / name for name in ("JPEGImages", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    images, masks, annotations, lists = folders
    names = [f"{part.name}_{number:06d}" for number in range(part.images)]
    for stored in range(0, len(names), LINKED):
        name, *linked = names[stored : stored + LINKED]
        image, mask = _draw(_first(layout, part) + stored // LINKED, layout)
        image.save(images / f"{name}.jpg", quality=92)
        mask.save(masks / f"{name}.png")
        shown = [layout.classes[value - 1] for value in np.unique(np.asarray(mask)) if value]
        objects = "".join(f"<object><name>{shown_class}</name></object>" for shown_class in shown)
        (annotations / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
        for file in (images / f"{name}.jpg", masks / f"{name}.png", annotations / f"{name}.xml"):
            _link(file, linked)
    (lists / f"{part.name}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def _write_coco(root: Path, layout: Layout, part: Part) -> None:
    folder = root / part.name
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    names = [f"COCO_{part.name}_{number:012d}" for number in range(part.images + part.unlisted)]
    for stored in range(0, len(names), LINKED):
        name, *linked = names[stored : stored + LINKED]
        _draw(_first(layout, part) + stored // LINKED, layout)[0].save(folder / f"{name}.jpg", quality=92)
        _link(folder / f"{name}.jpg", linked)
    with open(root / "annotations" / f"instances_{part.name}.json", "w", encoding="utf-8") as file:
        file.write('{"images": [')
        file.writelines(_joined(_images(names, layout.size)))
        file.write('], "annotations": [')
        file.writelines(_joined(_objects(part, layout)))
        categories = [{"id": number + 1, "name": name} for number, name in enumerate(layout.classes)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def _images(names: list[str], size: tuple[int, int]) -> Iterator[str]:
    for number, name in enumerate(names):
        entry = {"id": number, "file_name": f"{name}.jpg", "width": size[0], "height": size[1]}
        yield json.dumps(entry)


def _objects(part: Part, layout: Layout) -> Iterator[str]:
    """Describe the objects, spread evenly over the listed images; their outlines have as many corners as COCO's."""
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    for number in range(part.objects):
        radius = random.uniform(8, 90)
        centre = random.uniform(radius, np.array(layout.size) - radius)
        outline = centre + radius * circle * random.uniform(0.7, 1.0, (len(angles), 1))
        entry = {
            "id": number,
            "image_id": number % part.images,
            "category_id": int(random.integers(len(layout.classes))) + 1,
            "area": 2.2 * radius**2,
            "iscrowd": 0,
            "segmentation": [outline.round(2).ravel().tolist()],
        }
        yield json.dumps(entry)


def _joined(entries: Iterator[str]) -> Iterator[str]:
    for number, entry in enumerate(entries):
        yield f", {entry}" if number else entry


def _first(layout: Layout, part: Part) -> int:
    """Return the number of a part's first scene, since validation shows different scenes from training."""
    return 0 if part == layout.parts[0] else 10_000


def _draw(number: int, layout: Layout) -> tuple[Image.Image, Image.Image]:
    """Draw a picture and its mask; the creatures take turns representing the classes."""
    size, classes = layout.size, len(layout.classes)
    scene = draw_scene(0, number)
    pixels = np.asarray(Image.fromarray(scene.image).resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = np.random.default_rng(number).normal(0, 8, (*pixels.shape[:2], 1))
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    mask = np.asarray(Image.fromarray(scene.mask).resize(size, Image.Resampling.NEAREST))
    return image, Image.fromarray(np.where(mask, (mask.astype(int) + 7 * number) % classes + 1, 0).astype(np.uint8))


def _link(file: Path, names: list[str]) -> None:
    for name in names:
        copy = file.with_stem(name)
        copy.unlink(missing_ok=True)
        os.link(file, copy)
