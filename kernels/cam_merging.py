"""Multi-scale class activation maps of the present classes, merged and normalised (official code, multi-scale CAM).

Legend: B batch, C foreground classes, M class slots, S scales, H W full-resolution pixels, h w a CAM's own grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bilinear import resize_matrix
from .cam_merging_kernels import launch_merge
from .class_slots import present_classes
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton

# --- torch path


def _merge_torch(cams, flipped, classes, live, size, output_size) -> Tensor:
    """The CPU path: gather the present classes first, then resize by small matrices (mirrored ones undo the flip)."""
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
    if output_size != size:
        merged = F.interpolate(merged, size=output_size, mode="bilinear", align_corners=False)
    return merged.sub_(low).mul_(live[:, :, None, None] / (high - low + 1e-5))


# --- registration


@torch.library.custom_op("fsr::merge_cams", mutates_args=())
def merge_cams_op(
    cams: list[Tensor], flipped: list[Tensor], classes: Tensor, live: Tensor, size: list[int], output_size: list[int]
) -> Tensor:
    """Registered form of :func:`merge_cams`; checked arguments, the slots' classes known."""
    if use_triton(classes):
        return launch_merge(cams, flipped, classes, live, size, output_size)
    with torch.autocast(classes.device.type, enabled=False):
        return _merge_torch(cams, flipped, classes, live, size, output_size)


@merge_cams_op.register_fake
def _(cams, flipped, classes, live, size, output_size):
    dtype = torch.promote_types(cams[0].dtype, torch.float32)
    return classes.new_empty((*classes.shape, *output_size), dtype=dtype)


# --- public function


class MergedCams(NamedTuple):
    """Merged CAMs of the classes present in each image.

    Attributes:
        values: (B, M, H', W') float32 in [0, 1), 0 in dead slots (float64 for float64 CAMs on the CPU).
        classes: (B, M) int64, 0-based foreground class of each slot, 0 in dead slots.
        live: (B, M) bool, True where the slot holds a present class.
    """

    values: Tensor
    classes: Tensor
    live: Tensor


def merge_cams(
    cams: Sequence[Tensor],
    flipped: Sequence[Tensor],
    labels: Tensor,
    *,
    max_classes: int,
    size: tuple[int, int],
    output_size: tuple[int, int] | None = None,
) -> MergedCams:
    """Merge the CAMs of all scales and flips, for the present classes only.

    Each scale passes ReLU at its own resolution and is resized bilinearly (align_corners=False) to `size`; the map of
    the image and the un-flipped map of the mirrored image are merged by maximum; the scales are summed; then, per
    image and class, m = m - min(m), m = m / (max(m) + 1e-5) over the H*W pixels.

    Args:
        cams: one (B, C, h_s, w_s) floating tensor per scale, raw (before ReLU).
        flipped: the same for the mirrored images, not flipped back.
        labels: (B, C) image labels, present where above 0.
        max_classes: number M of class slots (see `present_classes`).
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
    classes, live = present_classes(labels, max_classes=max_classes)
    plain, mirrored = ([cam.detach() for cam in maps] for maps in (cams, flipped))
    values = merge_cams_op(plain, mirrored, classes, live, list(size), list(output_size or size))
    return MergedCams(values, classes, live)


def _check(cams, flipped, labels, size, output_size) -> None:
    if not cams or len(cams) != len(flipped):
        raise ValueError(f"cams and flipped must hold one map per scale each, got {len(cams)} and {len(flipped)} maps")
    for scale, (cam, mirror) in enumerate(zip(cams, flipped, strict=True)):
        if cam.ndim != 4 or 0 in cam.shape or cam.shape != mirror.shape:
            raise ValueError(
                f"cams[{scale}] and flipped[{scale}] must be (B, C, h, w) of one shape, "
                f"got {tuple(cam.shape)} and {tuple(mirror.shape)}"
            )
        if cam.shape[:2] != labels.shape:
            raise ValueError(f"cams[{scale}] is {tuple(cam.shape)}; labels must be (B, C), got {tuple(labels.shape)}")
        require_dtype(f"cams[{scale}]", cam, (*FEATURE_DTYPES, torch.float64))
        require_dtype(f"cams[{scale}]", cam, (cams[0].dtype,))
        require_dtype(f"flipped[{scale}]", mirror, (cams[0].dtype,))
        require_same_device(labels=labels, **{f"cams[{scale}]": cam, f"flipped[{scale}]": mirror})
    for name, pixels in (("size", size), ("output_size", output_size or size)):
        if len(pixels) != 2 or min(pixels) < 1:
            raise ValueError(f"{name} must be two positive numbers of pixels (height, width), got {tuple(pixels)}")
