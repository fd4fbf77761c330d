"""Pictures: colours of the classes, overlays, CAM heat maps, and grids with titles and a legend."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fsr_fast.dataloading.palette import check_mask, voc_palette

IGNORE_INDEX = 255
INK, PAPER, OUTLINE, EMPTY = (30, 30, 30), (255, 255, 255), (120, 120, 120), (225, 225, 225)
MARGIN = 12
FONT_SIZE = 17
TEMPLATES = Path(__file__).parent / "templates"
SIDE = 320
"""Longer side of a page's pictures, in pixels."""


def colourise(mask: np.ndarray) -> np.ndarray:
    """Paint labels in VOC's colours.

    Args:
        mask: (H,W) integer labels, 0 to 255.

    Returns:
        (H,W,3) uint8, RGB.

    Raises:
        TypeError: labels that are not integers.
        ValueError: not two-dimensional, or labels outside 0 to 255.
    """
    return voc_palette()[check_mask(mask)]


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Lay the colours of a mask over a picture; the background stays as it is.

    Args:
        image: (H,W,3) uint8, RGB.
        mask: (H,W) integer labels.
        opacity: 0 (picture only) to 1 (colour only).

    Returns:
        (H,W,3) uint8, RGB.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, or the mask is of another size than the picture.
    """
    _check_image(image)
    colours = colourise(mask)
    if colours.shape != image.shape:
        raise ValueError(f"mask is {mask.shape} but the picture is {image.shape[:2]}; resize one")
    return np.where((mask == 0)[..., None], image, _blend(image, colours, opacity))


def outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the borders between the labels of a mask in white: some of VOC's colours are dark on photographs and black.

    Args:
        picture: (H,W,3) uint8, RGB.
        mask: (H,W) integer labels.

    Returns:
        (H,W,3) uint8, RGB; lines are one pixel wide per 400 of the longer side, at least one.
    """
    return np.where(borders(mask)[..., None], np.uint8(255), _check_image(picture))


def borders(mask: np.ndarray) -> np.ndarray:
    """Return where `outline` draws: (H,W), bool."""
    edge = np.zeros(mask.shape, bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    for _ in range(max(mask.shape) // 400):
        edge[:, :-1] |= edge[:, 1:]
        edge[:-1] |= edge[1:]
    return edge


def heatmap(image: np.ndarray, cam: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Overlay a class activation map on a picture, from blue (0) to red (1).

    Args:
        image: (H,W,3) uint8, RGB.
        cam: (h,w) float, 0 to 1, any size; resized bilinearly to the picture. Values outside are clipped.
        opacity: 0 (picture only) to 1 (map only).

    Returns:
        (H,W,3) uint8, RGB.

    Raises:
        TypeError: the picture is not uint8.
        ValueError: wrong shape.
    """
    _check_image(image)
    if cam.ndim != 2:
        raise ValueError(f"cam is {cam.shape}; expected (h,w): choose a class, or take the maximum over them")
    size = (image.shape[1], image.shape[0])
    values = np.asarray(Image.fromarray(cam.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colours = matplotlib.colormaps["turbo"](np.clip(values, 0, 1), bytes=True)[..., :3]
    return _blend(image, colours, opacity)


def with_legend(picture: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> Image.Image:
    """Put a legend above a picture.

    Args:
        picture: (H,W,3) uint8, RGB.
        labels: in the legend, e.g. those of the mask on the picture.
        class_names: names of the foreground classes 1, 2, …, without the background.

    Returns:
        The picture, RGB; no narrower than it was, and wide enough for the longest name.
    """
    font, line = _font(), FONT_SIZE + 9
    longest = max((round(font.getlength(_name(label, class_names))) for label in labels), default=0)
    width = max(_check_image(picture).shape[1], longest + FONT_SIZE + 8 + 22 + 2 * MARGIN)
    legend = _legend_lines(labels, class_names, width - 2 * MARGIN, font)
    shown = Image.new("RGB", (width, picture.shape[0] + MARGIN + len(legend) * line), PAPER)
    above = MARGIN + len(legend) * line
    shown.paste(Image.fromarray(picture), ((width - picture.shape[1]) // 2, above))
    draw = ImageDraw.Draw(shown)
    for number, entries in enumerate(legend):
        for left, label, name in entries:
            _draw_entry(draw, (MARGIN + left, MARGIN // 2 + number * line), label, name, font)
    return shown


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]], titles: Sequence[str], class_names: Sequence[str], *, cell: int = 224
) -> Image.Image:
    """Arrange pictures and label maps in a titled grid, under a legend of the labels that occur.

    Args:
        rows: one sequence per sample; each entry is a picture (H,W,3) uint8, scaled smoothly, or a label map
            (H,W) of integers, painted in VOC's colours with white borders and scaled without smoothing; or None,
            shown as empty. All entries of a row are shown in the size of its first.
        titles: one per column.
        class_names: names of the foreground classes 1, 2, …, without the background.
        cell: longer side of every picture in the grid, pixels; at least 160.

    Returns:
        The picture, RGB.

    Raises:
        TypeError: an entry of another dtype.
        ValueError: no row, a row of another length than `titles`, an entry of another shape, a cell that is too small.
    """
    if cell < 160:
        raise ValueError(f"cell: {cell} pixels is too small to read; give 160 or more")
    if not rows:
        raise ValueError("rows: empty; give at least one sample")
    for number, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"rows[{number}] has {len(row)} pictures for {len(titles)} titles")

    font = _font()
    line = FONT_SIZE + 9
    cells = [[_resized(entry, _fit(row[0], cell), font) for entry in row] for row in rows]
    width = MARGIN + len(titles) * (cell + MARGIN)
    masks = [entry for row in rows for entry in row if entry is not None and entry.ndim == 2]
    labels = sorted({int(label) for mask in masks for label in np.unique(mask)})
    legend = _legend_lines(labels, class_names, width - 2 * MARGIN, font)
    height = (
        MARGIN + line + sum(row[0].height + MARGIN for row in cells) + len(legend) * line + (MARGIN if legend else 0)
    )

    grid = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(grid)
    top = MARGIN
    for entries in legend:
        for left, label, name in entries:
            _draw_entry(draw, (MARGIN + left, top), label, name, font)
        top += line
    top += MARGIN if legend else 0
    for column, title in enumerate(titles):
        centre = MARGIN + column * (cell + MARGIN) + cell // 2
        draw.text((centre, top + line // 2), _shortened(title, cell, font), INK, font, anchor="mm")
    top += line
    for row_cells in cells:
        for column, picture in enumerate(row_cells):
            grid.paste(picture, (MARGIN + column * (cell + MARGIN) + (cell - picture.width) // 2, top))
        top += row_cells[0].height + MARGIN
    return grid


def _legend_lines(
    labels: Sequence[int], class_names: Sequence[str], width: int, font: ImageFont.FreeTypeFont
) -> list[list[tuple[int, int, str]]]:
    lines: list[list[tuple[int, int, str]]] = []
    left = width
    for label in labels:
        name = _name(label, class_names)
        needed = FONT_SIZE + 8 + round(font.getlength(name)) + 22
        if left + needed > width or not lines:
            lines.append([])
            left = 0
        lines[-1].append((left, label, name))
        left += needed
    return lines


def _draw_entry(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], label: int, name: str, font: ImageFont.FreeTypeFont
) -> None:
    left, top = corner
    red, green, blue = (int(value) for value in voc_palette()[label])
    draw.rectangle((left, top, left + FONT_SIZE, top + FONT_SIZE), (red, green, blue), OUTLINE)
    draw.text((left + FONT_SIZE + 8, top + FONT_SIZE // 2 + 1), name, INK, font, anchor="lm")


def _name(label: int, class_names: Sequence[str]) -> str:
    special = {0: "background", IGNORE_INDEX: "ignored"}
    if label in special:
        return special[label]
    return class_names[label - 1] if label <= len(class_names) else f"label {label}"


def _shortened(title: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(title) <= width:
        return title
    while title and font.getlength(title + "…") > width:
        title = title[:-1]
    return title + "…"


def _fit(entry: np.ndarray | None, cell: int) -> tuple[int, int]:
    height, width = (1, 1) if entry is None else entry.shape[:2]
    return max(round(cell * width / max(height, width)), 1), max(round(cell * height / max(height, width)), 1)


def _resized(entry: np.ndarray | None, size: tuple[int, int], font: ImageFont.FreeTypeFont) -> Image.Image:
    if entry is None:
        blank = Image.new("RGB", size, EMPTY)
        ImageDraw.Draw(blank).text((size[0] // 2, size[1] // 2), "empty", INK, font, anchor="mm")
        return blank
    if entry.ndim == 2:
        mask = np.asarray(Image.fromarray(check_mask(entry)).resize(size, Image.Resampling.NEAREST))
        return Image.fromarray(outline(colourise(mask), mask))
    return Image.fromarray(_check_image(entry)).resize(size, Image.Resampling.BICUBIC)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)


def _blend(image: np.ndarray, colours: np.ndarray, opacity: float) -> np.ndarray:
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: {opacity}; expected 0 to 1")
    mixed = image.astype(np.float32) * (1 - opacity) + colours.astype(np.float32) * opacity
    return np.rint(mixed).astype(np.uint8)


def _check_image(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8:
        raise TypeError(f"picture is {image.dtype}; expected uint8, 0 to 255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"picture is {image.shape}; expected (H,W,3)")
    return image


def data_uri(picture: Image.Image, side: int | None = SIDE, *, lossless: bool = False) -> str:
    """Return a picture as a `data:` URI, WebP, no side longer than `side` pixels."""
    if side is not None:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="WEBP", quality=82, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
