"""The operators of NVIDIA DALI that decode an image once and cut its views out of it.

Crop, resize and flip do what their counterparts in `augment.py` do to a picture, and all random values come in as
arguments, drawn on the host. The resampling is computed in floating point and rounded once; in Pillow, after each
direction. The later steps do not run in DALI, whose pixel arithmetic needs an operator for each sum: see
`dali_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

Node = Any


def parameter_names(view: int) -> list[str]:
    """Return the names of a view's arguments, in the order in which they are fed."""
    return [f"{name}@{view}" for name in ("start", "shape", "left", "right")]


def build_graph(
    source: Callable[[], Sequence[Any]],
    *,
    views: int,
    size: int,
    batch_size: int,
    threads: int,
    device_id: int | None,
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
        colours: images are files of three colours; else they come decoded, (H, W, C) uint8, with other channels.
    """
    parameters = [parameter_names(view) for view in range(views)]
    names = ["encoded", *(name for part in parameters for name in part)]

    @pipeline_def
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
        pictures = []
        for view in range(views):
            arguments = {name.partition("@")[0]: inputs[name] for name in parameters[view]}
            pictures.append(_view(image, arguments, size))
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


def _view(image: Node, arguments: dict[str, Node], size: int) -> Node:
    """Crop, resize, flip."""
    picture = fn.slice(image, start=arguments["start"], shape=arguments["shape"], axes=[0, 1])
    return fn.resize(
        picture,
        size=[size, size],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        roi_start=arguments["left"],  # a flip: from right to left
        roi_end=arguments["right"],
        roi_relative=True,
    )
