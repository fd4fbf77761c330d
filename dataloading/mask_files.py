"""Read one mask file: map each of its values or colours to a class, background or ignored.

Masks of one 8-bit value per pixel are read as they are. Other kinds are read if their meaning is certain: equal
channels, 16 bits that hold small numbers, one bit per pixel. Colours and other numberings must be explained by
`data.mask_values`. A mask belongs to the upright image; its own orientation tag, if any, is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.images import IGNORE, MAX_PIXELS, DamagedFileError, Source, open_picture
from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError, nearest

COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # unused numbers in MS COCO's 1 to 90
COCO_IDS = tuple(number for number in range(1, 91) if number not in COCO_GAPS)
SHOWN = 8  # values or colours that a message lists
COLOURS = 300  # more of them in one mask are noise, not classes

Key = int | str
"""A value of a mask file, or a colour `#rrggbb`."""
Meaning = Mapping[Key, int]
"""Meaning of values and colours: 0 background, 1…C the classes, 255 ignored."""


def read_mask(
    source: Source,
    limit: int,
    name: str = "",
    meaning: Meaning | None = None,
    notes: Notes | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Read the classes of a mask, never the colours of its palette.

    Args:
        source: file, or its content.
        limit: number C of classes.
        name: its name in messages; by default the path.
        meaning: of each value or colour; None: values are classes, 255 is ignored.
        notes: records what was inferred.
        max_pixels: largest mask that is read.

    Returns:
        (H, W) uint8: 0 background, 1…C the classes, 255 ignored.

    Raises:
        DamagedFileError: it cannot be decoded, is ambiguous, or holds an unknown value.
    """
    where = name or str(source)
    with open_picture(source, name, max_pixels=max_pixels) as image:
        mode, kind, mask = image.mode, image.format, np.asarray(image)
    if meaning is not None and any(isinstance(key, str) for key in meaning):
        return _by_colour(mask, mode, meaning, where)
    values = _values(mode, mask)
    if values is None:
        raise DamagedFileError(f"{where}: {_colours(mode, mask, limit)}")
    if mode not in ("P", "L") and notes is not None:
        notes.add(f"masks of mode {mode} are read by their numbers", where)
    if meaning is not None:
        return _by_value(values, meaning, where)
    highest = int(values[values != IGNORE].max(initial=0))
    if highest > limit:
        raise DamagedFileError(f"{where}: {_unknown_value(values, highest, limit, kind or '')}")
    return values.astype(np.uint8, copy=False)


def parse_meaning(given: Mapping[Key, Key] | str, classes: Sequence[str]) -> Meaning | None:
    """Translate `data.mask_values`.

    Args:
        given: `auto`, `coco91`, or a class (name or number), `background` or `ignore` by value or colour.
        classes: names of the foreground classes.

    Raises:
        UserError: it names an unknown value, colour or class.
    """
    if given == "auto":
        return None
    if given == "coco91":
        if len(classes) != len(COCO_IDS):
            raise UserError(f"data.mask_values: coco91 needs MS COCO's {len(COCO_IDS)} classes, not {len(classes)}")
        pairs = [(number, label) for label, number in enumerate(COCO_IDS, 1)]
        return dict[Key, int]([(0, 0), (IGNORE, IGNORE), *pairs])
    assert not isinstance(given, str)
    known = {"background": 0, "ignore": IGNORE} | {name: number for number, name in enumerate(classes, 1)}
    meaning: dict[Key, int] = {}
    for key, word in given.items():
        text = str(key).strip().lower()
        if not re.fullmatch(r"#[0-9a-f]{6}|\d{1,5}", text):
            raise UserError(f"data.mask_values: {key!r}; expected a number 0 to 65535 or a colour such as '#ff8000'")
        label = known.get(str(word), int(word) if str(word).isdigit() else -1)
        if label != IGNORE and not 0 <= label <= len(classes):
            raise UserError(f"data.mask_values: {key}: unknown class {word!r}{nearest(str(word), known)}")
        meaning[text if text.startswith("#") else int(text)] = label
    if len({isinstance(key, str) for key in meaning}) != 1:
        raise UserError("data.mask_values: expected only numbers or only colours, at least one")
    return meaning


def drawn_in_black_and_white(masks: Iterable[NDArray[np.uint8]]) -> bool:
    """Return whether masks of one class are drawn as 0 and 255, so that 255 is the class and nothing is ignored.

    That is certain if no mask holds a 1 and some hold a 255: otherwise no pixel at all would show the class.

    Args:
        masks: of the whole list; they are read up to the first that holds a 1.
    """
    white = False
    for mask in masks:
        if (mask == 1).any():
            return False
        white = white or bool((mask == IGNORE).any())
    return white


def _values(mode: str, mask: NDArray[np.generic]) -> NDArray[np.integer] | None:
    """Return one number per pixel, if the kind of the file is unambiguous."""
    if mode in ("P", "L", "1"):
        return mask.astype(np.uint8, copy=False)
    if mode.startswith("I"):
        return mask  # type: ignore[return-value]
    if mode in ("RGB", "RGBA", "LA"):
        opaque = mode == "RGB" or (mask[..., -1] == 255).all()
        channels = mask[..., :1] if mode == "LA" else mask[..., :3]
        if opaque and (channels == channels[..., :1]).all():
            return channels[..., 0]  # type: ignore[return-value]
    return None


def _by_value(values: NDArray[np.integer], meaning: Meaning, where: str) -> NDArray[np.uint8]:
    table = np.full(65536, -1, np.int32)
    for value, label in meaning.items():
        table[int(value)] = label
    labels = table[values.clip(0, 65535)]
    if (labels < 0).any():
        found = np.unique(values[labels < 0])
        raise DamagedFileError(f"{where}: holds {_listed(found)}, which data.mask_values lacks; add it there")
    return labels.astype(np.uint8)


def _by_colour(mask: NDArray[np.generic], mode: str, meaning: Meaning, where: str) -> NDArray[np.uint8]:
    if mode not in ("RGB", "RGBA"):
        raise DamagedFileError(f"{where}: a mask of mode {mode}, but data.mask_values names colours; name its values")
    packed = _pack(mask)
    colours, inverse = np.unique(packed, return_inverse=True)
    labels = np.array([meaning.get(f"#{colour:06x}", -1) for colour in colours])
    if (labels < 0).any():
        missing = ", ".join(f"#{colour:06x}" for colour in colours[labels < 0][:SHOWN])
        raise DamagedFileError(f"{where}: holds the colour {missing}, which data.mask_values lacks; add it there")
    return labels[inverse].reshape(packed.shape).astype(np.uint8)


def _pack(mask: NDArray[np.generic]) -> NDArray[np.int64]:
    red, green, blue = (mask[..., channel].astype(np.int64) for channel in range(3))
    return red << 16 | green << 8 | blue


def _colours(mode: str, mask: NDArray[np.generic], limit: int) -> str:
    """Return the remedy for a mask in colours."""
    if mode not in ("RGB", "RGBA"):
        return (
            f"a mask of mode {mode}; expected one number per pixel (palette or greyscale PNG): 0 background, 1… the "
            "classes, 255 ignored; save it again, as 8-bit greyscale PNG"
        )
    colours, counts = np.unique(_pack(mask), return_counts=True)
    if len(colours) > COLOURS:
        return (
            f"a mask of {len(colours)} colours, as a photograph or a JPEG has; expected one colour or number for each "
            "class; write it again as PNG, without smoothing"
        )
    shown = [f"#{colour:06x}" for colour in colours[np.argsort(-counts)][:SHOWN]]
    more = f", … and {len(colours) - SHOWN} more" if len(colours) > SHOWN else ""
    words = ("background", *map(str, range(1, limit + 1)))
    example = ", ".join(f'"{colour}": {words[min(number, limit)]}' for number, colour in enumerate(shown[:3]))
    return (
        f"a mask in colours (mode {mode}): {', '.join(shown)}{more}; say what each means, for example "
        f"--data.mask_values '{{{example}}}', by number or name of a class, background or ignore"
    )


def _unknown_value(values: NDArray[np.integer], highest: int, limit: int, kind: str) -> str:
    found = np.unique(values)
    text = f"holds the value {highest}, but there are {limit} classes; expected 0 to {limit}, or 255 for ignored"
    if kind == "JPEG":
        return f"{text}; JPEG smears the values: write masks as PNG"
    if limit == len(COCO_IDS) and highest <= max(COCO_IDS):
        return f"{text}; if these are MS COCO's own numbers, 1 to 90, give --data.mask_values coco91"
    example = ", ".join(f'"{value}": CLASS' for value in found[found > 0][:2])
    return (
        f"{text}; its values are {_listed(found)}: fix the mask, name every class in data.classes, or say what they "
        f"mean: --data.mask_values '{{\"0\": background, {example}}}'"
    )


def _listed(values: NDArray[np.integer]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (", …" if len(values) > SHOWN else "")
