"""Multi-scale class activation maps of the present classes, merged and normalised (official code, multi-scale CAM).

Legend: B batch, C foreground classes, M class slots, S scales, H W full-resolution pixels, h w a CAM's own grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bilinear import resize_matrix
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device


class MergedCams(NamedTuple):
    """Merged CAMs of the classes present in each image.

    Attributes:
        values: (B, M, H', W') float32 in [0, 1), 0 in dead slots (float64 for float64 CAMs on the CPU).
        classes: (B, M) int64, 0-based foreground class of each slot; meaningless where `live` is False.
        live: (B, M) bool, True where the slot holds a present class.
    """

    values: Tensor
    classes: Tensor
    live: Tensor


def present_classes(labels: Tensor, *, slots: int) -> tuple[Tensor, Tensor]:
    """Lists the classes present in each image in a fixed number of slots, without waiting for the device.

    Args:
        labels: (B, C), any real dtype; a class is present where the label is above 0.
        slots: number M of class slots; classes beyond the first M present ones are dropped.

    Returns:
        index: (B, M) int64, present classes in ascending order, then classes that are absent (0 beyond C).
        live: (B, M) bool, True where the slot holds a present class.

    Raises:
        ValueError: if `labels` is not two-dimensional and non-empty or `slots` is below 1.
    """
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be (B, C) with B, C >= 1, got {tuple(labels.shape)}")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}; give the most classes an image may hold")
    absent = labels <= 0
    index = absent.to(torch.uint8).sort(dim=1, stable=True).indices[:, :slots]
    live = ~absent.gather(1, index)
    missing = slots - index.shape[1]
    if missing > 0:
        index, live = F.pad(index, (0, missing)), F.pad(live, (0, missing))
    return index, live


def merge_cams(
    cams: Sequence[Tensor],
    flipped: Sequence[Tensor],
    labels: Tensor,
    *,
    slots: int,
    size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
) -> MergedCams:
    """Merges the CAMs of all scales and flips, for the present classes only.

    Each scale passes ReLU at its own resolution and is resized bilinearly (align_corners=False) to `size`; the map of
    the image and the un-flipped map of the mirrored image are merged by maximum; the scales are summed; then, per
    image and class, m = m - min(m), m = m / (max(m) + 1e-5) over the H*W pixels.

    Args:
        cams: one (B, C, h_s, w_s) floating tensor a scale, raw (before ReLU).
        flipped: the same of the mirrored images, not un-flipped.
        labels: (B, C) image labels, present where above 0.
        slots: number M of class slots (see `present_classes`).
        size: (H, W) in pixels, where the maps are merged and their minimum and maximum are taken.
        output_size: (h', w'); if given, the result is then resized bilinearly (align_corners=False) to it.

    Returns:
        The merged maps at `output_size`, or `size`, with their classes. No gradient flows into them.

    Raises:
        ValueError: if the shapes, devices or sizes do not fit together.
        TypeError: if the CAMs are not all of one floating-point dtype.

    Source: paper, Sec. 3.1; official code (multi-scale CAM with flips).
    """
    _check(cams, flipped, labels, size, output_size)
    classes, live = present_classes(labels, slots=slots)
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        values = _merge_torch(cams, flipped, classes, live, size, output_size)
    return MergedCams(values, classes, live)


def _check(cams, flipped, labels, size, output_size) -> None:
    if not cams or len(cams) != len(flipped):
        raise ValueError(f"cams and flipped must hold one map a scale each, got {len(cams)} and {len(flipped)} maps")
    for scale, (cam, mirror) in enumerate(zip(cams, flipped, strict=True)):
        if cam.ndim != 4 or 0 in cam.shape or cam.shape != mirror.shape:
            raise ValueError(
                f"cams[{scale}] and flipped[{scale}] must be (B, C, h, w) of one shape, "
                f"got {tuple(cam.shape)} and {tuple(mirror.shape)}"
            )
        if cam.shape[:2] != labels.shape:
            raise ValueError(f"cams[{scale}] is {tuple(cam.shape)}; labels must be (B, C), got {tuple(labels.shape)}")
        require_dtype(f"cams[{scale}]", cam, (*FEATURE_DTYPES, torch.float64))
        require_dtype(f"flipped[{scale}]", mirror, (cams[0].dtype,))
        require_dtype(f"cams[{scale}]", cam, (cams[0].dtype,))
        require_same_device(labels=labels, **{f"cams[{scale}]": cam, f"flipped[{scale}]": mirror})
    for name, pixels in (("size", size), ("output_size", output_size or size)):
        if len(pixels) != 2 or min(pixels) < 1:
            raise ValueError(f"{name} must be two positive numbers of pixels (height, width), got {tuple(pixels)}")


def _merge_torch(cams, flipped, classes, live, size, output_size) -> Tensor:
    """The CPU path: gathers the present classes first, then resizes by small matrices (mirrored ones undo the flip)."""
    maps = []
    for cam, mirror in zip(cams, flipped, strict=True):
        slot = classes[:, :, None, None].expand(-1, -1, *cam.shape[2:])
        rows, columns = resize_matrix(cam, cam.shape[2], size[0]).T, resize_matrix(cam, cam.shape[3], size[1])
        upright, unflipped = (
            rows @ (m.gather(1, slot).to(rows.dtype).relu() @ c) for m, c in ((cam, columns), (mirror, columns.flip(1)))
        )
        maps.append(torch.maximum(upright, unflipped))
    merged = sum(maps[1:], maps[0])
    low, high = merged.amin(dim=(-2, -1), keepdim=True), merged.amax(dim=(-2, -1), keepdim=True)
    if output_size is not None:
        merged = F.interpolate(merged, size=output_size, mode="bilinear", align_corners=False)
    return merged.sub_(low).mul_(live[:, :, None, None] / (high - low + 1e-5))
