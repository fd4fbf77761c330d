"""The operators of NVIDIA DALI that decode an image once and cut its views out of it.

Crop, resize, flip and a learned policy do what their counterparts in `augment.py` do to a picture, and all random
values come in as arguments, drawn on the host. Remaining differences: the resampling is computed in floating point and
rounded once; a learned policy moves pixels by linear interpolation, Pillow by cubic. The later steps do not run in
DALI, whose pixel arithmetic needs an operator for each sum: see `dali_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug import augmentations as policies

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
TRUNCATE = 0.4999  # Pillow truncates fractions, where DALI rounds
Node = Any


def parameter_names(view: int, *, policy: bool) -> list[str]:
    """Return the names of a view's arguments, in the order in which they are fed."""
    chosen = [f"{part}{step}" for step in range(POLICY_STEPS) for part in ("operation", "magnitude")] if policy else []
    return [f"{name}@{view}" for name in ("start", "shape", "left", "right", *chosen)]


def build_graph(
    source: Callable[[], Sequence[Any]],
    *,
    views: int,
    size: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
    mean: Sequence[float],
    policy: bool,
    colours: bool = True,
) -> Pipeline:
    """Build the pipeline; its output is (B, views, size, size, C) uint8.

    Args:
        source: returns the inputs of a batch: encoded images, then the arguments of each view.
        views: number of views.
        size: side of the views, in pixels.
        batch_size: images per batch.
        threads: of the CPU.
        device_id: number of the GPU; None: everything runs on the CPU.
        mean: of the normalisation, three values in the range 0 to 1; fills the area that a policy moves in.
        policy: whether AutoAugment is applied.
        colours: images are files of three colours; else they come decoded, (H, W, C) uint8, with other channels.
    """
    parameters = [parameter_names(view, policy=policy) for view in range(views)]
    names = ["encoded", *(name for part in parameters for name in part)]

    @pipeline_def(enable_conditionals=True)
    def graph() -> Node:
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
        pictures = []
        for view in range(views):
            arguments = {name.partition("@")[0]: inputs[name] for name in parameters[view]}
            pictures.append(_view(image, arguments, size, fill))
        return fn.stack(*pictures)

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


def _view(image: Node, arguments: dict[str, Node], size: int, fill: Node | None) -> Node:
    """Crop, resize, flip, learned policy."""
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
    return picture


def _grey(picture: Node) -> Node:
    return fn.color_space_conversion(picture, image_type=types.RGB, output_type=types.GRAY)


def _mean_grey(picture: Node) -> Node:
    return dali_math.floor(fn.reductions.mean(_grey(picture)) + 0.5)


def _blend(picture: Node, other: Node, share: Node) -> Node:
    return fn.cast(picture * share + other * (1.0 - share) - TRUNCATE, dtype=types.UINT8)


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
