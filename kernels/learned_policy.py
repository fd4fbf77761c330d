"""Operations of AutoAugment on uint8 pictures, bit for bit as Pillow computes them.

Each picture has a step of its own, which is one of:

* a new level for each level of a channel: posterize, solarize, invert, contrast, autocontrast, equalize. All that the
  last three need to know of the picture follows from n(i), the number of its pixels that are at most as bright as
  level i; contrast looks at grey levels, the others at each channel;
* a blend x <- trunc(clamp(y + a (x - y), 0, 255)), where y is the grey level of the pixel (color) or the rounded mean
  of its 3 x 3 neighbourhood, in which it counts five times (sharpness; the margin of the picture stays);
* an affine map: x <- trunc(clamp(the cubic interpolation at the pixel's source)), or a fill outside the picture.

The arithmetic has the precision of Pillow's C code, fp64 in the interpolation, and products are not fused with sums. A
step takes two launches, whatever the pictures: one counts n where it is needed, one changes the pixels.

There is no torch path: on a CPU, Pillow itself is called.

Legend: S steps, V views, B batch, H W pixels. Source: Pillow (ImageOps, ImageEnhance, Geometry.c), torchvision.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .colour_jitter import blend, grey
from .dispatch import CompileCase, device_guard, require_dtype, require_shape, tl, triton, use_triton

OPERATIONS = (
    "", "posterize", "solarize", "invert", "contrast", "autocontrast", "equalize", "color", "sharpness", "affine"
)  # fmt: skip
"""Kinds of steps by their number; 0 is no step."""
POSTERIZE, SOLARIZE, INVERT, CONTRAST, AUTOCONTRAST, EQUALIZE, COLOR, SHARPNESS, AFFINE = (
    tl.constexpr(number) for number in range(1, len(OPERATIONS))
)
NUMBERS = 7
"""Of a step: its kind, then up to six."""
WIDTH = tl.constexpr(NUMBERS)
COUNT_BLOCK, APPLY_BLOCK = 2048, 256  # a program's pixels, of one channel


# --- kernels


@triton.jit
def _pixels(pixels, B, H, W, stride_v, stride_b, BLOCK: tl.constexpr):
    """Return the address of this program's picture, its pixels, which of them are inside, and its channel."""
    picture = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) // 3 * BLOCK + tl.arange(0, BLOCK)
    return pixels + picture // B * stride_v + picture % B * stride_b, place, place < H * W, tl.program_id(0) % 3


@triton.jit
def _levels(pixels, inside):
    return tl.load(pixels, mask=inside, other=0).to(tl.int32)


@triton.jit
def _grey_levels(pixels, inside):
    return grey(_levels(pixels, inside), _levels(pixels + 1, inside), _levels(pixels + 2, inside))


@triton.jit
def _count_kernel(pixels, steps, counts, B, H, W, stride_v, stride_b, BLOCK: tl.constexpr):
    """counts (V*B, 3, 256): n(i) of each channel, or of the grey levels in each; untouched if not needed."""
    kind = tl.load(steps + tl.program_id(1) * WIDTH).to(tl.int32)
    if (kind < CONTRAST) | (kind > EQUALIZE):
        return
    picture, place, inside, channel = _pixels(pixels, B, H, W, stride_v, stride_b, BLOCK)
    if kind == CONTRAST:
        x = _grey_levels(picture + 3 * place, inside)
    else:
        x = _levels(picture + 3 * place + channel, inside)
    target = counts + (tl.program_id(1) * 3 + channel) * 256 + tl.arange(0, 256)
    tl.atomic_add(target, tl.cumsum(tl.histogram(x, 256, mask=inside)))


@triton.jit
def _remap(x, kind, amount, counts, area):
    """New levels of the levels x of a channel."""
    if kind == POSTERIZE:
        x = x & -(1 << (8 - amount.to(tl.int32)))
    elif kind == SOLARIZE:
        x = tl.where(x.to(tl.float64) < amount, x, 255 - x)
    elif kind == INVERT:
        x = 255 - x
    else:
        n = tl.load(counts + tl.arange(0, 256))
        if kind == CONTRAST:
            total = tl.sum((area - n).to(tl.int64))
            x = blend(((2 * total + area) // (2 * area)).to(tl.int32), x, amount.to(tl.float32))
        elif kind == AUTOCONTRAST:
            least, most = tl.sum((n == 0).to(tl.int32)), tl.sum((n < area).to(tl.int32))
            if most > least:
                scale = 255.0 / (most - least).to(tl.float64)
                x = (x.to(tl.float64) * scale - least.to(tl.float64) * scale).to(tl.int32)
                x = tl.minimum(tl.maximum(x, 0), 255)
        else:
            step = tl.max(tl.where(n < area, n, 0)) // 255
            if step > 0:
                darker = tl.load(counts + x - 1, mask=x > 0, other=0)
                x = tl.minimum((step // 2 + darker) // step, 255)
    return x


@triton.jit
def _cubic(a, b, c, d, part):
    return b + part * ((c - a) + part * ((2 * (a - b) + c - d) + part * (b - a - c + d)))


@triton.jit
def _cubic_row(channel, x, y, part, H, W):
    row = channel + tl.minimum(tl.maximum(y, 0), H - 1) * W * 3
    a = tl.load(row + tl.minimum(tl.maximum(x - 1, 0), W - 1) * 3).to(tl.float64)
    b = tl.load(row + tl.minimum(tl.maximum(x, 0), W - 1) * 3).to(tl.float64)
    c = tl.load(row + tl.minimum(tl.maximum(x + 1, 0), W - 1) * 3).to(tl.float64)
    d = tl.load(row + tl.minimum(tl.maximum(x + 2, 0), W - 1) * 3).to(tl.float64)
    return _cubic(a, b, c, d, part)


@triton.jit
def _find(channel, u, v, H, W):
    """Levels of a channel (H, W) at the positions (u, v), in pixels."""
    left, top = tl.floor(u - 0.5), tl.floor(v - 0.5)
    x, y, part = left.to(tl.int32), top.to(tl.int32), u - 0.5 - left
    a = _cubic_row(channel, x, y - 1, part, H, W)
    b = _cubic_row(channel, x, y, part, H, W)
    c = _cubic_row(channel, x, y + 1, part, H, W)
    d = _cubic_row(channel, x, y + 2, part, H, W)
    return tl.minimum(tl.maximum(_cubic(a, b, c, d, v - 0.5 - top), 0.0), 255.0).to(tl.int32)


@triton.jit
def _apply_kernel(pixels, steps, counts, fill, changed, B, H, W, stride_v, stride_b, BLOCK: tl.constexpr):
    """changed (V*B, H, W, 3): each picture after its step."""
    picture, place, inside, channel = _pixels(pixels, B, H, W, stride_v, stride_b, BLOCK)
    source = picture + 3 * place + channel
    x, column, row = _levels(source, inside), place % W, place // W
    own = steps + tl.program_id(1) * WIDTH
    kind, amount = tl.load(own).to(tl.int32), tl.load(own + 1)
    if kind == AFFINE:
        right, down = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        u = amount * right + tl.load(own + 2) * down + tl.load(own + 3)
        v = tl.load(own + 4) * right + tl.load(own + 5) * down + tl.load(own + 6)
        found = _find(picture + channel, u, v, H, W)
        x = tl.where((u >= 0) & (u < W) & (v >= 0) & (v < H), found, (fill >> 8 * channel) & 255)
    elif kind == SHARPNESS:
        inner = (column > 0) & (column < W - 1) & (row > 0) & (row < H - 1)
        total = 4 * x
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                total += _levels(source + 3 * (down * W + right), inner)
        x = tl.where(inner, blend((2 * total + 13) // 26, x, amount.to(tl.float32)), x)
    elif kind == COLOR:
        x = blend(_grey_levels(picture + 3 * place, inside), x, amount.to(tl.float32))
    elif kind > 0:
        x = _remap(x, kind, amount, counts + (tl.program_id(1) * 3 + channel) * 256, H * W)
    target = changed + 3 * (tl.program_id(1).to(tl.int64) * H * W + place) + channel
    tl.store(target, x.to(tl.uint8), mask=inside)


# --- launch


def _launch(pixels: Tensor, steps: Tensor, fill: list[int]) -> Tensor:
    V, B, H, W, _ = pixels.shape
    counts = pixels.new_zeros((len(steps), V * B, 3, 256), dtype=torch.int32)
    if pixels.is_cuda:
        steps = steps.pin_memory().to(pixels.device, non_blocking=True)
    if not pixels[0, 0].is_contiguous():
        pixels = pixels.contiguous()
    colour = fill[0] | fill[1] << 8 | fill[2] << 16
    grids = [(3 * triton.cdiv(H * W, block), V * B) for block in (COUNT_BLOCK, APPLY_BLOCK)]
    for step, count in zip(steps, counts, strict=True):
        changed = pixels.new_empty((V, B, H, W, 3))
        shape = (B, H, W, pixels.stride(0), pixels.stride(1))
        with device_guard(pixels):
            _count_kernel[grids[0]](pixels, step, count, *shape, COUNT_BLOCK)
            _apply_kernel[grids[1]](pixels, step, count, colour, changed, *shape, APPLY_BLOCK, enable_fp_fusion=False)
        pixels = changed
    return pixels


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernels, for the ahead-of-time compile test."""
    signature = {"pixels": "*u8", "steps": "*fp64", "counts": "*i32"}
    signature |= dict.fromkeys(("B", "H", "W", "stride_v", "stride_b"), "i32")
    yield CompileCase("counts", _count_kernel, signature, {"BLOCK": COUNT_BLOCK}, main=True)
    signature |= {"fill": "i32", "changed": "*u8"}
    yield CompileCase("apply", _apply_kernel, signature, {"BLOCK": APPLY_BLOCK}, main=True)


# --- registration


@torch.library.custom_op("fsr::apply_policy", mutates_args=())
def apply_policy_op(pixels: Tensor, steps: Tensor, fill: list[int]) -> Tensor:
    """Registered form of :func:`apply_policy`; checked arguments."""
    if not use_triton(pixels):
        raise NotImplementedError("apply_policy has no torch path: on a CPU, use Pillow's own operations")
    return _launch(pixels, steps, fill)


@apply_policy_op.register_fake
def _(pixels, steps, fill):
    return pixels.new_empty(pixels.shape)


# --- public function


def apply_policy(pixels: Tensor, steps: Tensor, fill: Sequence[int]) -> Tensor:
    """Apply the operations that AutoAugment drew to pictures, one after the other, each picture its own.

    Args:
        pixels: (V, B, H, W, 3) uint8.
        steps: (S, V, B, 7) float64 on the CPU, S > 0, the steps of each picture: index in `OPERATIONS`, then Pillow's
            numbers. posterize: bits kept; solarize: first level that is inverted; contrast, color, sharpness: factor;
            affine: a, ..., f, where the pixel at (x, y) comes from (a x + b y + c, d x + e y + f).
        fill: the colour outside the picture, three levels.

    Returns:
        (V, B, H, W, 3) uint8, contiguous. There is no gradient.

    Raises:
        ValueError: if shapes do not fit together, or steps are not on the CPU.
        TypeError: if a dtype is another.
        NotImplementedError: on a CPU, without Triton's interpreter.

    Source: paper, Table 5; Cubuk et al., AutoAugment; torchvision's `AutoAugment` on Pillow images.
    """
    V, B = ("V", "B") if pixels.dim() != 5 else pixels.shape[:2]
    require_shape("pixels", pixels, (V, B, "H", "W", 3))
    require_shape("steps", steps, ("S", V, B, NUMBERS))
    require_dtype("pixels", pixels, (torch.uint8,))
    require_dtype("steps", steps, (torch.float64,))
    if steps.device.type != "cpu":
        raise ValueError(f"steps are on {steps.device}; expected the CPU")
    return apply_policy_op(pixels, steps.contiguous(), list(fill))
