"""Columns, extremes, values: the Triton kernels that merge class activation maps.

They resize in two steps. First the columns, of the present classes only: for each scale and flip h rows of W
pixels, ReLU and un-flip included. Then the rows, on the fly: one pass over the pixels reduces the sum of all scales to
a minimum and a maximum per tile, a second recomputes, normalises and writes it; no map of H*W pixels in between.

Legend: B batch, C foreground classes, M class slots, S scales, H W full-resolution pixels, h w a CAM's own grid.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .bilinear import samples
from .dispatch import FEATURE_DTYPES, CompileCase, device_guard, require_dtype, tl, triton

TILE = {"BLOCK_Y": 16, "BLOCK_X": 64}  # a program's pixels: 8 per thread at 4 warps
RESIZED_TILE = {"BLOCK_Y": 4, "BLOCK_X": 32}  # each of these pixels needs four at H, W


# --- kernels


@triton.jit
def _tile(W, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """Rows (BLOCK_Y, 1) and columns (1, BLOCK_X) of this program's tile; may reach beyond the map."""
    across = tl.cdiv(W, BLOCK_X)
    y = tl.program_id(0) // across * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.program_id(0) % across * BLOCK_X + tl.arange(0, BLOCK_X)
    return y[:, None], x[None, :]


@triton.jit
def _columns_kernel(
    cams, mirrors, classes, live, wide, heights, scale, top, rows, M, h, w, W, cam_b, cam_c, cam_h, cam_w,
    mirror_b, mirror_c, mirror_h, mirror_w, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One scale: ReLU and columns of the slots' classes into wide (B*M, image or un-flipped mirror, rows, W)."""
    slot = tl.program_id(1).to(tl.int64)
    tl.store(heights + scale, h)
    if tl.load(live + slot) == 0:
        return
    c = tl.load(classes + slot)
    y, x = _tile(W, BLOCK_Y, BLOCK_X)
    inside = (y < h) & (x < W)
    target = wide + (slot * 2 * rows + top + y) * W + x
    lower, upper, part = samples(x, W, w)
    row = cams + slot // M * cam_b + c * cam_c + y * cam_h
    left = tl.load(row + lower * cam_w, mask=inside, other=0).to(tl.float32)
    right = tl.load(row + upper * cam_w, mask=inside, other=0).to(tl.float32)
    tl.store(target, tl.maximum(left, 0) * (1 - part) + tl.maximum(right, 0) * part, mask=inside)
    lower, upper, part = samples(W - 1 - x, W, w)
    row = mirrors + slot // M * mirror_b + c * mirror_c + y * mirror_h
    left = tl.load(row + lower * mirror_w, mask=inside, other=0).to(tl.float32)
    right = tl.load(row + upper * mirror_w, mask=inside, other=0).to(tl.float32)
    tl.store(target + rows * W, tl.maximum(left, 0) * (1 - part) + tl.maximum(right, 0) * part, mask=inside)


@triton.jit
def _merged(wide, heights, slot, y, x, S, rows, H, W):
    """Sum over the scales of max(image, un-flipped mirror) at the pixels (y, x), which must lie within H and W."""
    column = wide + slot * 2 * rows * W + x
    mirror = column + rows * W
    total = x * 0.0 + y * 0.0
    top = 0
    for scale in range(S):
        h = tl.load(heights + scale)
        lower, upper, part = samples(y, H, h)
        lower, upper = (top + lower) * W, (top + upper) * W
        upright = tl.load(column + lower) * (1 - part) + tl.load(column + upper) * part
        unflipped = tl.load(mirror + lower) * (1 - part) + tl.load(mirror + upper) * part
        total += tl.maximum(upright, unflipped)
        top += h
    return total


@triton.jit
def _extremes_kernel(wide, heights, live, extremes, S, rows, H, W, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """extremes (B*M, 2, tiles): minimum and maximum of the merged map over each tile."""
    slot = tl.program_id(1).to(tl.int64)
    if tl.load(live + slot) == 0:
        return
    y, x = _tile(W, BLOCK_Y, BLOCK_X)
    merged = _merged(wide, heights, slot, tl.minimum(y, H - 1), tl.minimum(x, W - 1), S, rows, H, W)
    target = extremes + slot * 2 * tl.num_programs(0) + tl.program_id(0)
    tl.store(target, tl.min(merged))
    tl.store(target + tl.num_programs(0), tl.max(merged))


@triton.jit
def _values_kernel(
    wide, heights, live, extremes, values, S, rows, H, W, h, w, tiles,
    RESIZE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """values (B*M, h, w): the merged map normalised by its extremes, resized from (H, W) if asked; 0 in dead slots."""
    slot = tl.program_id(1).to(tl.int64)
    y, x = _tile(w, BLOCK_Y, BLOCK_X)
    target = values + (slot * h + y) * w + x
    inside = (y < h) & (x < w)
    if tl.load(live + slot) == 0:
        tl.store(target, x * 0.0 + y * 0.0, mask=inside)
        return
    low, high = float("inf"), -float("inf")
    for start in range(0, tiles, 256):
        tile = start + tl.arange(0, 256)
        extreme = extremes + slot * 2 * tiles + tile
        low = tl.minimum(low, tl.min(tl.load(extreme, mask=tile < tiles, other=float("inf"))))
        high = tl.maximum(high, tl.max(tl.load(extreme + tiles, mask=tile < tiles, other=-float("inf"))))
    y, x = tl.minimum(y, h - 1), tl.minimum(x, w - 1)
    if RESIZE:
        upper, lower, down = samples(y, h, H)
        left, right, part = samples(x, w, W)
        upper_left = _merged(wide, heights, slot, upper, left, S, rows, H, W)
        upper_right = _merged(wide, heights, slot, upper, right, S, rows, H, W)
        lower_left = _merged(wide, heights, slot, lower, left, S, rows, H, W)
        lower_right = _merged(wide, heights, slot, lower, right, S, rows, H, W)
        upper_side = upper_left * (1 - part) + upper_right * part
        merged = upper_side * (1 - down) + (lower_left * (1 - part) + lower_right * part) * down
    else:
        merged = _merged(wide, heights, slot, y, x, S, rows, H, W)
    tl.store(target, (merged - low) / (high - low + 1e-5), mask=inside)


# --- launch


def launch_merge(
    cams: Sequence[Tensor],
    flipped: Sequence[Tensor],
    classes: Tensor,
    live: Tensor,
    size: Sequence[int],
    output_size: Sequence[int],
) -> Tensor:
    """Launch the kernels of `merge_cams`: columns of each scale, then extremes, then values."""
    require_dtype("cams[0]", cams[0], FEATURE_DTYPES)
    (B, M), (H, W), (h, w) = classes.shape, size, output_size
    resize = (h, w) != (H, W)
    rows = sum(cam.shape[2] for cam in cams)
    wide = cams[0].new_empty((B * M, 2, rows, W), dtype=torch.float32)
    heights = classes.new_empty(len(cams), dtype=torch.int32)
    tiles = triton.cdiv(H, TILE["BLOCK_Y"]), triton.cdiv(W, TILE["BLOCK_X"])
    extremes = wide.new_empty((B * M, 2, tiles[0] * tiles[1]))
    values = wide.new_empty((B, M, h, w))
    classes, live = classes.contiguous(), live.contiguous().view(torch.uint8)
    with device_guard(wide):
        top = 0
        for scale, (cam, mirror) in enumerate(zip(cams, flipped, strict=True)):
            blocks = triton.cdiv(cam.shape[2], TILE["BLOCK_Y"]) * tiles[1]
            _columns_kernel[(blocks, B * M)](
                cam, mirror, classes, live, wide, heights, scale, top, rows, M, *cam.shape[2:], W,
                *cam.stride(), *mirror.stride(), **TILE,
            )  # fmt: skip
            top += cam.shape[2]
        _extremes_kernel[(tiles[0] * tiles[1], B * M)](
            wide, heights, live, extremes, len(cams), rows, H, W, **TILE
        )  # fmt: skip
        tile = RESIZED_TILE if resize else TILE
        blocks = triton.cdiv(h, tile["BLOCK_Y"]) * triton.cdiv(w, tile["BLOCK_X"])
        _values_kernel[(blocks, B * M)](
            wide, heights, live, extremes, values, len(cams), rows, H, W, h, w, tiles[0] * tiles[1],
            RESIZE=resize, **tile,
        )  # fmt: skip
    return values


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernels, for the ahead-of-time compile test."""
    pointers = {"wide": "*fp32", "heights": "*i32", "live": "*u8"}
    strides = [f"{name}_{side}" for name in ("cam", "mirror") for side in "bchw"]
    integers = dict.fromkeys(["scale", "top", "rows", "M", "h", "w", "W", *strides], "i32")
    for kind in ("bf16", "fp16", "fp32"):
        signature = {"cams": f"*{kind}", "mirrors": f"*{kind}", "classes": "*i64"} | pointers | integers
        yield CompileCase(f"columns {kind}", _columns_kernel, signature, dict(TILE), main=kind == "bf16")
    signature = pointers | {"extremes": "*fp32"} | dict.fromkeys(("S", "rows", "H", "W"), "i32")
    yield CompileCase("extremes", _extremes_kernel, signature, dict(TILE), main=True)
    signature |= {"values": "*fp32"} | dict.fromkeys(("h", "w", "tiles"), "i32")
    for resize in (False, True):
        name = "values resized" if resize else "values"
        constants = (RESIZED_TILE if resize else TILE) | {"RESIZE": resize}
        yield CompileCase(name, _values_kernel, signature, constants, main=True)
