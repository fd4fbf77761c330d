"""The operators of NVIDIA DALI that decode an image once and make its views.

Every operator does what its counterpart in `augment.py` does to a picture, and all random values come in as
arguments, drawn on the host. Remaining differences: the resampling and the blur are computed in floating point and
rounded once, and the hue is not rounded to 256 steps; a learned policy moves pixels by linear interpolation, Pillow
by cubic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug import augmentations as policies

from fsr_fast.dataloading.augment import SOLARISE_THRESHOLD

POLICY_STEPS = 2  # operations of a learned policy
OPERATIONS = (  # of AutoAugment; a step that does nothing is 0, these are 1, 2, …
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "ShearX",
    "Color",
    "Contrast",
    "Sharpness",
)
BEFORE, AFTER = range(3), range(3, 6)  # slots of the jitter, before and after the turn of the hue
TRUNCATE = 0.4999  # Pillow truncates fractions, where DALI rounds
Node = Any


def parameter_names(view: int, *, policy: bool, colours: bool = True) -> list[str]:
    """Return the names of a view's arguments, in the order in which they are fed."""
    jitter = [f"{part}{slot}" for slot in (*BEFORE, *AFTER) for part in ("kind", "amount")]
    chosen = [f"{part}{step}" for step in range(POLICY_STEPS) for part in ("operation", "magnitude")] if policy else []
    turns = ["turns"] if colours else []
    names = ["start", "shape", "left", "right", *chosen, *jitter, *turns, "blur", "solarise"]
    return [f"{name}@{view}" for name in names]


def build_graph(
    source: Callable[[], Sequence[Any]],
    *,
    views: int,
    size: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    policy: bool,
    colours: bool = True,
) -> Pipeline:
    """Build the pipeline; its outputs are the views.

    Args:
        source: returns the inputs of a batch: encoded images, then the arguments of each view.
        views: number of views.
        size: side of the views, in pixels.
        batch_size: images per batch.
        threads: of the CPU.
        device_id: number of the GPU; None: everything runs on the CPU.
        mean: of the normalisation, three values in the range 0 to 1.
        std: of the normalisation, three values > 0.
        policy: whether AutoAugment is applied.
        colours: images are files of three colours; else they come decoded, (H, W, C) uint8, with other channels.
    """
    parameters = [parameter_names(view, policy=policy, colours=colours) for view in range(views)]
    names = ["encoded", *(name for part in parameters for name in part)]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Node, ...]:
        nodes = fn.external_source(source, num_outputs=len(names))
        inputs = {name: nodes[number] for number, name in enumerate(names)}
        if colours:
            image = fn.decoders.image(
                inputs["encoded"], device="cpu" if device_id is None else "mixed", output_type=types.RGB
            )
        else:
            image = fn.reshape(inputs["encoded"], layout="HWC")
            image = image if device_id is None else image.gpu()
        fill = types.Constant(np.array([[[round(255 * value) for value in mean]]], np.float32)) if policy else None
        outputs = []
        for view in range(views):
            arguments = {name.partition("@")[0]: inputs[name] for name in parameters[view]}
            picture = _view(image, arguments, size, fill, colours)
            outputs.append(
                fn.crop_mirror_normalize(
                    picture,
                    dtype=types.FLOAT,
                    output_layout="CHW",
                    mean=[255 * value for value in mean],
                    std=[255 * value for value in std],
                )
            )
        return tuple(outputs)

    return graph(batch_size=batch_size, num_threads=threads, device_id=device_id)


def build_decoder(data: bytes, device_id: int | None = None) -> Pipeline:
    """Build a pipeline that decodes one image, to find out whether DALI can.

    Args:
        data: content of the file.
        device_id: number of the GPU; None: the CPU.
    """

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    def graph() -> Node:
        encoded = fn.external_source(lambda: [np.frombuffer(data, np.uint8)])
        return fn.decoders.image(encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB)

    return graph()


def _view(image: Node, arguments: dict[str, Node], size: int, fill: Node | None, colours: bool) -> Node:
    """Crop, resize, flip, learned policy, colour jitter, blur, solarisation."""
    picture = fn.slice(image, start=arguments["start"], shape=arguments["shape"], axes=[0, 1])
    picture = fn.resize(
        picture,
        size=[size, size],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        roi_start=arguments["left"],  # a flip: from right to left
        roi_end=arguments["right"],
        roi_relative=True,
    )
    if fill is not None:
        for step in range(POLICY_STEPS):
            picture = _operate(picture, arguments[f"operation{step}"], arguments[f"magnitude{step}"], fill)
    picture = _jitter(picture, arguments, BEFORE, colours)
    if colours:  # noqa: SIM102 known here; the turn is known where the graph runs
        if arguments["turns"] != 0.0:
            picture = _turn_hue(picture, arguments["turns"])
    picture = _jitter(picture, arguments, AFTER, colours)
    if arguments["blur"] > 0.0:
        picture = fn.gaussian_blur(picture, sigma=arguments["blur"])
    if arguments["solarise"] != 0:
        picture = fn.lookup_table(picture, keys=list(range(256)), values=SOLARISED, dtype=types.UINT8)
    return picture


SOLARISED = [value if value < SOLARISE_THRESHOLD else 255 - value for value in range(256)]


def _jitter(picture: Node, arguments: dict[str, Node], slots: Iterable[int], colours: bool) -> Node:
    for slot in slots:
        kind, amount = arguments[f"kind{slot}"], arguments[f"amount{slot}"]
        if kind == 1:
            picture = fn.brightness(picture, brightness=amount, brightness_shift=-TRUNCATE / 255)
        elif kind == 2:
            picture = _blend(picture, _mean_grey(picture) if colours else _mean(picture), amount)
        elif kind == 3:
            picture = _blend(picture, _grey(picture), amount) if colours else picture
    return picture


def _grey(picture: Node) -> Node:
    return fn.color_space_conversion(picture, image_type=types.RGB, output_type=types.GRAY)


def _mean_grey(picture: Node) -> Node:
    return dali_math.floor(fn.reductions.mean(_grey(picture)) + 0.5)


def _mean(picture: Node) -> Node:
    return dali_math.floor(fn.reductions.mean(picture) + 0.5)


def _blend(picture: Node, other: Node, share: Node) -> Node:
    return fn.cast(picture * share + other * (1.0 - share) - TRUNCATE, dtype=types.UINT8)


def _turn_hue(picture: Node, turns: Node) -> Node:
    """Turn the hue of HSV; value and chroma stay. Distances are counted in sixths of a turn."""
    planes = fn.transpose(picture, perm=[2, 0, 1])
    red, green, blue = (fn.cast(planes[channel], dtype=types.FLOAT) for channel in range(3))
    value = dali_math.max(dali_math.max(red, green), blue)
    chroma = value - dali_math.min(dali_math.min(red, green), blue)
    is_red = fn.cast(red == value, dtype=types.FLOAT)
    is_green = fn.cast(green == value, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    spread = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = spread / dali_math.max(chroma, 1.0) + 2.0 * is_green + 4.0 * is_blue
    turned = []
    for channel in range(3):
        # each channel is lowest around the hue opposite its own, by two sixths to either side
        away = dali_math.abs(hue + (6.0 * turns + (3.0 - 2.0 * channel)))
        away = dali_math.min(away, dali_math.abs(away - 6.0))
        turned.append(fn.cast(value - chroma * dali_math.clamp(2.0 - away, 0.0, 1.0), dtype=types.UINT8))
    return fn.stack(*turned, axis=2, axis_name="C")


def _operate(picture: Node, operation: Node, magnitude: Node, fill: Node) -> Node:
    """One operation of AutoAugment, with torchvision's meaning of its magnitude."""
    if operation == 1:
        step = dali_math.floor(dali_math.pow(2.0, 8.0 - magnitude) + 0.5)
        picture = fn.cast(dali_math.floor(picture / step) * step, dtype=types.UINT8)
    elif operation == 2:
        kept = fn.cast(picture < 255.0 * magnitude, dtype=types.FLOAT)
        picture = fn.cast(kept * picture + (1.0 - kept) * (255.0 - picture), dtype=types.UINT8)
    elif operation == 3:
        picture = policies.auto_contrast.op(picture, None)
    elif operation == 4:
        picture = fn.equalize(picture)
    elif operation == 5:
        picture = policies.invert.op(picture, None)
    elif operation == 6:
        moved = policies.rotate.op(picture - fill, magnitude, fill_value=0, interp_type=types.INTERP_LINEAR)
        picture = fn.cast(moved + fill, dtype=types.UINT8)
    elif operation == 7:
        shear = fn.stack(-magnitude, magnitude * 0.0)
        moved = policies.shear_x.op(picture - fill, shear, fill_value=0, interp_type=types.INTERP_LINEAR)
        picture = fn.cast(moved + fill, dtype=types.UINT8)
    elif operation == 8:
        picture = _blend(picture, _grey(picture), 1.0 + magnitude)
    elif operation == 9:
        picture = _blend(picture, _mean_grey(picture), 1.0 + magnitude)
    elif operation == 10:
        picture = _blend(picture, fn.filter(picture, SMOOTH), 1.0 + magnitude)
    return picture


SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
