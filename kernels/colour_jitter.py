"""Colour jitter and normalisation of uint8 pictures, bit for bit as Pillow and torchvision compute the jitter.

Each picture has its own order of steps, and each step ends in whole levels. With x a channel of a pixel:

* brightness, contrast, saturation: x <- trunc(clamp(y + a (x - y), 0, 255)), where y is 0, the rounded mean grey level
  of the picture, or the grey level of the pixel, (19595 r + 38470 g + 7471 b + 2^15) >> 16;
* hue: convert to HSV of 256 levels each, add trunc(255 a) to H modulo 256, and convert back.

Finally x <- x / (255 std) - mean / std. Only the mean needs a separate pass over the picture; it sums whole numbers, so
the order of the sum does not matter. The arithmetic has the precision of Pillow's C code, fp64 in places, and products
are not fused with sums.

Legend: B batch, V views, S steps, H W pixels, C channels. Source: Pillow (blend, conversion to L and HSV), torchvision.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import (
    CompileCase,
    device_guard,
    require_dtype,
    require_same_device,
    require_shape,
    tl,
    triton,
    use_triton,
)

STEPS = ("", "brightness", "contrast", "saturation", "hue")
"""Kinds of steps by their number; 0 is no step."""
CONTRAST, SATURATION, HUE = (tl.constexpr(STEPS.index(name)) for name in ("contrast", "saturation", "hue"))
BLOCK = 1024  # a program's pixels: 8 per thread at 4 warps


# --- kernels


@triton.jit
def grey(r, g, b):
    """Grey level of a colour."""
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@triton.jit
def blend(base, x, amount):
    """Move from base to x and, with an amount above 1, beyond."""
    mixed = base.to(tl.float32) + amount * (x - base).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _turn_hue(r, g, b, levels):
    """RGB to HSV, levels added to the hue, and back; in Pillow's mixture of single and double precision."""
    value, least = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(value - least, 1).to(tl.float32)
    red = tl.div_rn((value - r).to(tl.float32), chroma)
    green = tl.div_rn((value - g).to(tl.float32), chroma)
    blue = tl.div_rn((value - b).to(tl.float32), chroma)
    after_green = (red.to(tl.float64) + 2.0 - blue.to(tl.float64)).to(tl.float32)
    after_blue = (green.to(tl.float64) + 4.0 - red.to(tl.float64)).to(tl.float32)
    sixths = tl.where(r == value, blue - green, tl.where(g == value, after_green, after_blue))
    turns = sixths.to(tl.float64) / 6.0 + 1.0
    turns = tl.where(turns >= 1.0, turns - 1.0, turns).to(tl.float32)
    hue = ((turns.to(tl.float64) * 255.0).to(tl.int32) + levels) & 255
    saturation = tl.div_rn((value - least).to(tl.float32), tl.maximum(value, 1).to(tl.float32))
    saturation = tl.div_rn((saturation.to(tl.float64) * 255.0).to(tl.int32).to(tl.float32), 255.0)

    place = hue.to(tl.float64) * 6.0 / 255.0
    sector = place.to(tl.int32)
    part = (place - sector.to(tl.float64)).to(tl.float32)
    whole, share = value.to(tl.float64), saturation.to(tl.float64)
    low = (whole * (1.0 - share) + 0.5).to(tl.int32)
    falling = (whole * (1.0 - (saturation * part).to(tl.float64)) + 0.5).to(tl.int32)
    rising = (whole * (1.0 - share * (1.0 - part.to(tl.float64))) + 0.5).to(tl.int32)
    r = _channel(sector, value, falling, low, rising)
    g = _channel(sector + 4, value, falling, low, rising)
    b = _channel(sector + 2, value, falling, low, rising)
    return r, g, b


@triton.jit
def _channel(sector, value, falling, low, rising):
    """Red over the sixths of the colour wheel; green and blue are the same two and four sixths later."""
    sector = sector % 6
    slope = tl.where(sector == 1, falling, tl.where(sector == 4, rising, low))
    return tl.where((sector == 0) | (sector == 5), value, slope)


@triton.jit
def _load(pixels, B, H, W, stride_v, stride_b, BLOCK: tl.constexpr):
    """Return the colours of this program's pixels, their positions in the picture, and which are inside it."""
    picture = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < H * W
    source = pixels + picture // B * stride_v + picture % B * stride_b + 3 * place
    r = tl.load(source, mask=inside, other=0).to(tl.int32)
    g = tl.load(source + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(source + 2, mask=inside, other=0).to(tl.int32)
    return r, g, b, place, inside


@triton.jit
def _steps(steps, count, mean, r, g, b):
    """Apply the first steps of a picture, in order."""
    for number in range(count):
        kind, amount = tl.load(steps + 2 * number).to(tl.int32), tl.load(steps + 2 * number + 1)
        if kind == HUE:
            r, g, b = _turn_hue(r, g, b, (amount * 255.0).to(tl.int32))
        elif kind > 0:
            level = grey(r, g, b)
            base = tl.where(kind == SATURATION, level, tl.where(kind == CONTRAST, mean, 0))
            part = amount.to(tl.float32)
            r, g, b = blend(base, r, part), blend(base, g, part), blend(base, b, part)
    return r, g, b


@triton.jit
def _sum_kernel(pixels, steps, sums, B, H, W, stride_v, stride_b, S: tl.constexpr, BLOCK: tl.constexpr):
    """sums (V*B,): sum of a picture's grey levels just before its contrast changes; untouched if it does not."""
    own = steps + tl.program_id(1) * S * 2
    before = -1
    for number in range(S):
        if tl.load(own + 2 * number).to(tl.int32) == CONTRAST:
            before = number
    if before < 0:
        return
    r, g, b, _, inside = _load(pixels, B, H, W, stride_v, stride_b, BLOCK)
    r, g, b = _steps(own, before, 0, r, g, b)
    tl.atomic_add(sums + tl.program_id(1), tl.sum(tl.where(inside, grey(r, g, b), 0)).to(tl.int64))


@triton.jit
def _views_kernel(
    pixels, steps, sums, mean, std, views, B, H, W, stride_v, stride_b, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """views (V*B, 3, H, W): all steps, then the normalisation."""
    r, g, b, place, inside = _load(pixels, B, H, W, stride_v, stride_b, BLOCK)
    area = tl.cast(H * W, tl.int64)
    level = (2 * tl.load(sums + tl.program_id(1)) + area) // (2 * area)
    r, g, b = _steps(steps + tl.program_id(1) * S * 2, S, level.to(tl.int32), r, g, b)
    target = views + tl.program_id(1) * 3 * area + place
    _store(target, r, mean, std, inside)
    _store(target + area, g, mean + 1, std + 1, inside)
    _store(target + 2 * area, b, mean + 2, std + 2, inside)


@triton.jit
def _store(target, x, mean, std, inside):
    mean, std = tl.load(mean), tl.load(std)
    tl.store(target, x.to(tl.float32) * tl.div_rn(1.0, 255.0 * std) - tl.div_rn(mean, std), mask=inside)


# --- launch


def _launch(pixels: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    V, B, H, W, _ = pixels.shape
    if not pixels[0, 0].is_contiguous():
        pixels = pixels.contiguous()
    views = pixels.new_empty((V, B, 3, H, W), dtype=torch.float32)
    sums = pixels.new_zeros(V * B, dtype=torch.int64)
    if pixels.is_cuda:
        steps = steps.pin_memory().to(pixels.device, non_blocking=True)
    shape = (B, H, W, pixels.stride(0), pixels.stride(1), steps.shape[2])
    grid = (triton.cdiv(H * W, BLOCK), V * B)
    with device_guard(pixels):
        _sum_kernel[grid](pixels, steps, sums, *shape, BLOCK=BLOCK, enable_fp_fusion=False)
        _views_kernel[grid](pixels, steps, sums, mean, std, views, *shape, BLOCK=BLOCK, enable_fp_fusion=False)
    return views


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernels, for the ahead-of-time compile test."""
    signature = {"pixels": "*u8", "steps": "*fp64", "sums": "*i64"}
    signature |= dict.fromkeys(("B", "H", "W", "stride_v", "stride_b"), "i32")
    constants = {"S": 4, "BLOCK": BLOCK}
    yield CompileCase("sums", _sum_kernel, signature, constants, main=True)
    signature |= {"mean": "*fp32", "std": "*fp32", "views": "*fp32"}
    yield CompileCase("views", _views_kernel, signature, constants, main=True)


# --- torch path


def _grey_torch(picture: Tensor) -> Tensor:
    """Grey levels (H, W) of colours (3, H, W) in whole-numbered float32; every sum is below 2^24, so exact."""
    weights = picture.new_tensor([19595, 38470, 7471])[:, None, None]
    return (picture * weights).sum(0).add_(32768).div_(65536).floor_()


def _turn_hue_torch(picture: Tensor, levels: int) -> Tensor:
    """The same as `_turn_hue`, on (3, H, W) in whole-numbered float32."""
    value, least = picture.amax(0), picture.amin(0)
    chroma = value - least
    red, green, blue = (value - picture) / chroma.clamp(min=1)
    after_green, after_blue = (red.double() + 2 - blue).float(), (green.double() + 4 - red).float()
    is_red, is_green = picture[:2] == value
    sixths = torch.where(is_red, blue - green, torch.where(is_green, after_green, after_blue))
    turns = (sixths.double() / 6 + 1).fmod_(1).float()
    hue = ((turns.double() * 255).to(torch.int32) + levels) & 255
    saturation = ((chroma / value.clamp(min=1)).double() * 255).floor_().float() / 255

    place = hue.double() * 6 / 255
    sector = place.to(torch.int64)
    part, share = (place - sector).float(), saturation.double()
    low = value * (1 - share)
    falling = value * (1 - (saturation * part).double())
    rising = value * (1 - share * (1 - part.double()))
    found = torch.stack([value, low, falling, rising]).add_(0.5).floor_().float()
    red = torch.tensor([0, 2, 1, 1, 3, 0])  # which of them is red in each sixth, see `_channel`
    return found.gather(0, torch.stack([red, red.roll(2), red.roll(4)])[:, sector % 6])


def _step_torch(picture: Tensor, name: str, amount: float) -> None:
    """Apply a step to a picture (C, H, W) in place; only three colours have saturation and hue."""
    colours = len(picture) == 3
    if name in ("saturation", "hue") and not colours:
        return
    if name == "hue":
        picture.copy_(_turn_hue_torch(picture, int(amount * 255)))
        return
    base = picture.new_zeros(())
    if name != "brightness":
        base = _grey_torch(picture) if colours else picture
    if name == "contrast":
        base = base.mean(dtype=torch.float64).add_(0.5).floor_()
    picture.sub_(base).mul_(amount).add_(base).clamp_(0, 255).trunc_()


def _jitter_torch(pixels: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    views = pixels.movedim(4, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for picture, own in zip(views.flatten(0, 1), steps.flatten(0, 1).tolist(), strict=True):
        for kind, amount in own:
            if kind:
                _step_torch(picture, STEPS[int(kind)], amount)
    mean, std = mean[:, None, None], std[:, None, None]
    return views.mul_(1 / (255 * std)).sub_(mean / std)


# --- registration


@torch.library.custom_op("fsr::jitter_colours", mutates_args=())
def jitter_colours_op(pixels: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Registered form of :func:`jitter_colours`; checked arguments."""
    if use_triton(pixels) and pixels.shape[4] == 3:
        return _launch(pixels, steps, mean.contiguous(), std.contiguous())
    return _jitter_torch(pixels, steps, mean, std)


@jitter_colours_op.register_fake
def _(pixels, steps, mean, std):
    V, B, H, W, C = pixels.shape
    return pixels.new_empty((V, B, C, H, W), dtype=torch.float32)


# --- public function


def jitter_colours(pixels: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Jitter the colours of pictures, each in its own order of steps, and normalise them.

    With any number of channels other than three, contrast uses the mean of all channels, and saturation and hue are
    left out.

    Args:
        pixels: (V, B, H, W, C) uint8.
        steps: (V, B, S, 2) float64 on the CPU, the steps of each picture, each kind at most once: its index in
            `STEPS`, then its factor; for the hue, a fraction of a turn in -0.5 ... 0.5.
        mean: (C,) float32 in the range 0 to 1.
        std: (C,) float32 > 0.

    Returns:
        (V, B, C, H, W) float32, contiguous. There is no gradient.

    Raises:
        ValueError: if shapes or devices do not fit together.
        TypeError: if a dtype is another.

    Source: paper, implementation details; torchvision's `ColorJitter` on Pillow images.
    """
    V, B, H, W, C = ("V", "B", "H", "W", "C") if pixels.dim() != 5 else pixels.shape
    require_shape("pixels", pixels, (V, B, H, W, C))
    require_shape("steps", steps, (V, B, "S", 2))
    require_shape("mean", mean, (C,))
    require_shape("std", std, (C,))
    require_dtype("pixels", pixels, (torch.uint8,))
    require_dtype("steps", steps, (torch.float64,))
    require_dtype("mean", mean, (torch.float32,))
    require_dtype("std", std, (torch.float32,))
    require_same_device(pixels=pixels, mean=mean, std=std)
    if steps.device.type != "cpu":
        raise ValueError(f"steps are on {steps.device}; expected the CPU")
    return jitter_colours_op(pixels, steps.contiguous(), mean, std)
