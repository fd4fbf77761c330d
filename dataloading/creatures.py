"""The pictures of the embedded data set: six invented creatures in clutter.

Every creature is a head and a body. The head is small, saturated and unmistakable; the body is large and muted, of a
shape that two classes share, in a paler tone of the head's colour. No body has the hue of another kind's head: a
classifier on each feature's maximum over the picture would only see that head, and could not learn the body.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Window = tuple[slice, slice]
Colour = tuple[float, float, float]

SIZE = 96  # pixels, of the square pictures
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
HIDDEN_SHARE = 0.25  # creatures whose head is covered or cut
HEAD_CENTRE, HEAD_RADIUS = 0.90, 0.44  # along the axis, in half body lengths
WHITE, BLACK, GOLD = (0.97, 0.97, 0.93), (0.10, 0.09, 0.12), (1.0, 0.88, 0.25)


class Family(NamedTuple):
    """A body that two classes share."""

    positions: tuple[float, ...]  # along the axis, -1 (tail) to 1 (neck)
    widths: tuple[float, ...]  # half widths there
    shade: tuple[float, float]  # saturation, value
    texture: Callable[[Array, Array], Any]  # of the coordinates along and across the axis


class Kind(NamedTuple):
    """A class: its head, and what distinguishes its body from that of the other class in its family."""

    name: str
    family: int
    head: Colour  # hue, saturation, value
    marking: Colour  # RGB of the pattern on it
    pattern: Callable[[Array, Array], Any]  # > 0 on the marking; coordinates in head radii
    tint: float  # hue of the body
    frequency: float


class Creature(NamedTuple):
    """One object of a scene; lengths in pixels, angles in radians."""

    kind: int
    x: float
    y: float
    angle: float
    scale: float  # half the length of the body
    bend: float
    hidden: str  # "", "covered" or "cut"


class Scene(NamedTuple):
    """A finished picture."""

    image: NDArray[np.uint8]  # (96, 96, 3) RGB
    mask: NDArray[np.uint8]  # (96, 96), 0 background, class number + 1
    creatures: tuple[Creature, ...]  # back to front
    head_seen: tuple[float, ...]  # share of each creature's head that is seen


FAMILIES = (
    Family(  # a drop with feathers
        (-1.0, -0.9, -0.55, -0.1, 0.4, 0.8, 1.0),
        (0.10, 0.30, 0.62, 0.85, 0.80, 0.52, 0.30),
        (0.32, 0.56),
        lambda u, v: np.sin(2.0 * np.pi * (u + 0.45 * v * v)),
    ),
    Family(  # an oval in segments
        (-1.0, -0.92, -0.6, 0.0, 0.6, 0.92, 1.0),
        (0.12, 0.40, 0.72, 0.84, 0.72, 0.42, 0.20),
        (0.34, 0.64),
        lambda u, v: 2.0 * np.sqrt(np.abs(np.sin(np.pi * u))) - 1.3,
    ),
    Family(  # a spindle with scales and a tail fin
        (-1.15, -1.05, -0.72, -0.5, 0.1, 0.6, 1.0),
        (0.55, 0.62, 0.24, 0.50, 0.86, 0.74, 0.35),
        (0.29, 0.58),
        lambda u, v: 1.3 * np.sin(1.4 * np.pi * (u + v)) * np.sin(1.4 * np.pi * (u - v)),
    ),
)
KINDS = (
    Kind("fizz", 0, (0.995, 0.88, 0.90), WHITE, lambda x, y: np.cos(4.6 * x) * np.cos(4.6 * y) - 0.35, 0.02, 3.0),
    Kind("luma", 0, (0.150, 0.92, 0.97), BLACK, lambda x, y: np.cos(8.5 * np.hypot(x, y)) - 0.1, 0.14, 3.8),
    Kind("miko", 1, (0.500, 0.90, 0.86), BLACK, lambda x, y: np.sin(7.5 * x) - 0.6, 0.455, 2.6),
    Kind("pogo", 1, (0.630, 0.88, 0.92), WHITE, lambda x, y: np.sin(5.2 * x) * np.sin(5.2 * y) - 0.12, 0.70, 3.3),
    Kind(
        "taro", 2, (0.28, 0.88, 0.82), GOLD, lambda x, y: np.sin(3 * np.arctan2(y, x) + 7 * np.hypot(x, y)), 0.325, 2.1
    ),
    Kind("zuzu", 2, (0.895, 0.82, 0.95), WHITE, lambda x, y: np.cos(6 * np.arctan2(y, x)) - 0.2, 0.81, 2.8),
)


def draw_scene(seed: int, index: int) -> Scene:
    """Draw one picture, a pure function of its arguments.

    Args:
        seed: seed of the data set.
        index: number of the picture.
    """
    random = np.random.default_rng((seed, index))
    creatures = _arrange(random)
    image = _background(random)
    owner = np.full((SIZE, SIZE), -1)
    heads = []
    for number, creature in enumerate(creatures):
        heads.append(_paint(random, image, owner, number, creature))
        if creature.hidden == "covered":
            radius = 1.12 * HEAD_RADIUS * creature.scale
            _obstacle(random, image, owner, *_polygon(random, _head(creature), radius, int(random.integers(5, 8))))
    for _ in range(random.integers(0, 2)):
        place = random.uniform(0, SIZE), random.uniform(0, SIZE)
        _obstacle(random, image, owner, *_polygon(random, place, random.uniform(3, 6), int(random.integers(3, 6))))
    light = 1 + random.uniform(-0.3, 0.3) * (X / SIZE - 0.5) + random.uniform(-0.3, 0.3) * (Y / SIZE - 0.5)
    image = image * light + 0.012 * random.standard_normal(image.shape, np.float32)
    kinds = np.array([0, *(creature.kind + 1 for creature in creatures)], np.uint8)
    seen = [
        float((head & (owner == number)).sum() / (math.pi * (HEAD_RADIUS * creature.scale) ** 2))
        for number, (creature, head) in enumerate(zip(creatures, heads, strict=True))
    ]
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return Scene(np.ascontiguousarray(pixels), kinds[owner + 1], creatures, tuple(seen))


def _arrange(random: np.random.Generator) -> tuple[Creature, ...]:
    """Place one to three creatures so that each is clearly visible, and so is its head unless it is to be hidden."""
    step = 3
    x, y = X[::step, ::step], Y[::step, ::step]
    while True:
        count = int(random.choice((1, 2, 3), p=(0.25, 0.45, 0.30)))
        kinds = random.permutation(len(KINDS))[:count]
        hidden = [str(random.choice(("covered", "cut"))) if random.random() < HIDDEN_SHARE else "" for _ in kinds]
        creatures: list[Creature] = []
        heads: list[NDArray[np.bool_]] = []
        owner = np.full(x.shape, -1)
        for _ in range(40):
            number = len(creatures)
            new = _place(random, int(kinds[number]), hidden[number], count)
            body, head, *_ = _outline(new, x, y)
            tried = np.where(np.maximum(body, head) > 0.5, number, owner)
            placed = zip([*creatures, new], [*heads, head > 0.5], strict=True)
            if all(_is_clear(tried == n, seen, creature, step) for n, (creature, seen) in enumerate(placed)):
                creatures.append(new)
                heads.append(head > 0.5)
                owner = tried
            if len(creatures) == count:
                return tuple(creatures)


def _is_clear(mine: NDArray[np.bool_], head: NDArray[np.bool_], creature: Creature, step: int) -> bool:
    area = (creature.scale / step) ** 2
    seen = (head & mine).sum() / (math.pi * HEAD_RADIUS**2 * area)
    return bool((mine & ~head).sum() > 1.2 * area and (seen < 0.12 if creature.hidden == "cut" else seen > 0.8))


def _place(random: np.random.Generator, kind: int, hidden: str, count: int) -> Creature:
    scale = random.uniform(25, 31) if count == 1 else random.uniform(18, 27)
    bend = random.uniform(-0.25, 0.25)
    angle = random.uniform(0, 2 * math.pi)
    x, y = random.uniform(0.15 * SIZE, 0.85 * SIZE), random.uniform(0.15 * SIZE, 0.85 * SIZE)
    if hidden == "cut":  # the head points out of the picture and lies beyond its edge
        side = int(random.integers(4))
        angle = side * math.pi / 2 + random.uniform(-0.5, 0.5)
        reach = (HEAD_CENTRE - 0.6 * HEAD_RADIUS) * scale
        if side % 2 == 0:
            x = (SIZE if side == 0 else 0) - reach * math.cos(angle)
        else:
            y = (SIZE if side == 1 else 0) - reach * math.sin(angle)
    return Creature(kind, x, y, angle, scale, bend, hidden)


def _head(creature: Creature) -> tuple[float, float]:
    reach = HEAD_CENTRE * creature.scale
    return creature.x + reach * math.cos(creature.angle), creature.y + reach * math.sin(creature.angle)


def _outline(creature: Creature, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Opacity of body and head, and the coordinates along and across the axis, in half body lengths."""
    family = FAMILIES[KINDS[creature.kind].family]
    u, v = _turned((x - creature.x) / creature.scale, (y - creature.y) / creature.scale, creature.angle)
    v = v - creature.bend * (u * u - HEAD_CENTRE**2)
    widths = np.interp(u, family.positions, family.widths, left=-1, right=-1).astype(np.float32)
    body = _soft((widths - np.abs(v)) * creature.scale, 2.2)
    head = _soft((HEAD_RADIUS - np.hypot(u - HEAD_CENTRE, v)) * creature.scale, 1.4)
    return body, head, u, v


def _paint(
    random: np.random.Generator, image: Array, owner: NDArray[np.int64], number: int, creature: Creature
) -> NDArray[np.bool_]:
    """Draw a creature onto the picture; return the pixels of its head."""
    window = _window(creature.x, creature.y, 1.7 * creature.scale)
    kind = KINDS[creature.kind]
    body, head, u, v = _outline(creature, X[window], Y[window])
    alpha = np.maximum(body, head)
    _shadow(image, window, alpha)
    _blend(image, window, body, _body_colours(random, kind, u, v))
    _blend(image, window, head, _head_colours(kind, u, v))
    owner[window][alpha > 0.5] = number
    pixels = np.zeros(owner.shape, np.bool_)
    pixels[window] = head > 0.5
    return pixels


def _body_colours(random: np.random.Generator, kind: Kind, u: Array, v: Array) -> Array:
    family = FAMILIES[kind.family]
    saturation, value = family.shade
    hue = kind.tint + random.uniform(-0.02, 0.02)
    base = _rgb((hue, saturation * random.uniform(0.8, 1.2), value * random.uniform(0.85, 1.15)))
    texture = family.texture(kind.frequency * u, kind.frequency * v)
    return base * (1 + 0.15 * texture - 0.35 * v * v)  # rounder: darker towards the borders


def _head_colours(kind: Kind, u: Array, v: Array) -> Array:
    x, y = (u - HEAD_CENTRE) / HEAD_RADIUS, v / HEAD_RADIUS
    colours = np.broadcast_to(_rgb(kind.head), (3, *u.shape)).copy()
    whole = (slice(None), slice(None))
    _blend(colours, whole, _soft(kind.pattern(x, y), 0.35), _column(kind.marking))
    colours *= 1.08 - 0.22 * (x * x + y * y)
    for side in (-0.42, 0.42):  # two eyes
        _blend(colours, whole, _soft(0.27 - np.hypot(x - 0.38, y - side), 0.12), _column(WHITE))
        _blend(colours, whole, _soft(0.14 - np.hypot(x - 0.45, y - side), 0.12), _column(BLACK))
    return colours


def _background(random: np.random.Generator) -> Array:
    image = np.empty((3, SIZE, SIZE), np.float32)
    image[:] = _dull(random)
    for cells, strength in ((3, 0.24), (8, 0.13), (32, 0.11)):
        noise = strength * random.standard_normal((cells, cells), np.float32)
        resized = Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image += np.asarray(resized) * _dull(random)
    for _ in range(random.integers(4, 9)):
        window, alpha = _clutter(random)
        _shadow(image, window, alpha)
        _blend(image, window, alpha * random.uniform(0.6, 1.0), _grain(random, window))
    return image


def _obstacle(
    random: np.random.Generator, image: Array, owner: NDArray[np.int64], window: Window, alpha: Array
) -> None:
    """Draw something that is not a creature onto the picture."""
    _shadow(image, window, alpha)
    _blend(image, window, alpha, _grain(random, window))
    owner[window][alpha > 0.5] = -1


def _clutter(random: np.random.Generator) -> tuple[Window, Array]:
    """Window and opacity of one angular shape: polygon, bar, cross or frame."""
    x, y, size = random.uniform(0, SIZE), random.uniform(0, SIZE), random.uniform(6, 18)
    form = random.integers(4)
    if form == 0:
        return _polygon(random, (x, y), 0.7 * size, int(random.integers(3, 6)))
    window = _window(x, y, 1.5 * size)
    u, v = _turned(X[window] - x, Y[window] - y, random.uniform(0, math.pi))
    u, v = np.abs(u), np.abs(v)
    inside = np.minimum(1.4 * size - u, 0.22 * size + 1 - v)
    if form == 2:
        inside = np.maximum(inside, np.minimum(1.4 * size - v, 0.22 * size + 1 - u))
    if form == 3:
        inside = 0.15 * size + 1 - np.abs(np.maximum(u, v) - 0.8 * size)
    return window, _soft(inside, 1.2)


def _polygon(
    random: np.random.Generator, centre: tuple[float, float], radius: float, corners: int
) -> tuple[Window, Array]:
    """Window and opacity of a convex polygon around a circle."""
    window = _window(*centre, 2.2 * radius)
    dx, dy = X[window] - centre[0], Y[window] - centre[1]
    angles = 2 * np.pi * (np.arange(corners) + random.uniform(-0.15, 0.15, corners) + random.random()) / corners
    along = [dx * math.cos(angle) + dy * math.sin(angle) for angle in angles]
    return window, _soft(radius - np.maximum.reduce(along), 1.2)


def _grain(random: np.random.Generator, window: Window) -> Array:
    """A dull colour with stripes."""
    along, _ = _turned(X[window], Y[window], random.uniform(0, math.pi))
    return _dull(random) * (1 + random.uniform(0, 0.14) * np.sin(along * (2 * math.pi / random.uniform(3, 9))))


def _dull(random: np.random.Generator) -> Array:
    """A grey with a tinge of any colour, (3, 1, 1)."""
    return _rgb((random.random(), random.uniform(0.0, 0.05), random.uniform(0.3, 0.75)))


def _rgb(colour: Colour) -> Array:
    hue, saturation, value = colour
    return _column(colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


def _column(rgb: Colour) -> Array:
    return np.array(rgb, np.float32)[:, None, None]


def _turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _soft(inside: Array, width: float) -> Array:
    """Opacity of a border that is `width` pixels wide, from the distance inside it in pixels."""
    return (inside / width + 0.5).clip(0, 1)


def _window(x: float, y: float, radius: float) -> Window:
    """Return the part of the picture around a point, with room for a shadow."""
    rows, columns = (
        slice(min(max(int(c - radius) - 4, 0), SIZE), min(max(int(c + radius) + 5, 0), SIZE)) for c in (y, x)
    )
    return rows, columns


def _shadow(image: Array, window: Window, alpha: Array) -> None:
    """Darken what lies three pixels below and two to the right of a shape."""
    moved = np.zeros_like(alpha)
    moved[3:, 2:] = alpha[:-3, :-2]
    image[:, *window] *= 1 - 0.35 * moved


def _blend(image: Array, window: Window, alpha: Array, colours: Array) -> None:
    part = image[:, *window]
    part += alpha * (colours - part)
