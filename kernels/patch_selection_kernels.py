"""Which patches are masked: the Triton kernels (paper, Eq. 2-4).

The activation of Eq. 2 needs a minimum and a maximum over all patches of an image, a barrier for the whole grid, so
two launches are the minimum: one multiplies features and classifier, storing present classes only; the other, one
program per image, does the rest. The soft mask is read there, or built in the same pass from a class activation map.
Its k-th largest value is found bit by bit on an order-preserving integer key (32 counts over registers); equal values
are taken in the order of their index, so that always exactly k are masked, and nothing is sorted.

Legend: B batch, N patches, D width, C classes, h w patch grid.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import FEATURE_DTYPES, CompileCase, device_guard, dot, next_power_of_2, require_dtype, tl, triton

MAX_PATCHES = 8192  # one program holds an image's soft mask in registers
TOKENS = 64  # patches of one program of the activation kernel


# --- kernels


@triton.jit
def _activation_kernel(
    features, weight, labels, cam, N, D, C,
    features_b, features_n, features_d, weight_c, weight_d, labels_b, labels_c,
    TOKENS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """cam[b, c, n] = relu(features[b, n] . weight[c]) for a tile of patches and the present classes."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    d = tl.arange(0, WIDTH)
    feature_rows = features + b * features_b + n[:, None].to(tl.int64) * features_n
    weight_rows = weight + c[None, :].to(tl.int64) * weight_c
    total = tl.zeros((TOKENS, CLASSES), tl.float32)
    for start in range(0, D, WIDTH):
        step = start + d
        f = tl.load(feature_rows + step[None, :] * features_d, mask=(n[:, None] < N) & (step[None, :] < D), other=0.0)
        w = tl.load(weight_rows + step[:, None] * weight_d, mask=(c[None, :] < C) & (step[:, None] < D), other=0.0)
        total = dot(f, w.to(f.dtype), total)
    present = tl.load(labels + b * labels_b + c * labels_c, mask=c < C, other=0).to(tl.float32) > 0
    out = cam + (b * C + c[None, :]) * N + n[:, None]
    tl.store(out, tl.maximum(total, 0.0), mask=present[None, :] & (n[:, None] < N))


@triton.jit
def _soft_values(
    cam, labels, uniform, b, index, valid, C, height, width, columns, scale_y, scale_x,
    cam_b, cam_c, cam_y, cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high,
    HAS_CAM: tl.constexpr, NORMALISE: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Soft mask (Eq. 3) of the blocks ``index``; the activation is sampled at its nearest pixel."""
    soft = tl.load(uniform + b * uniform_b + index * uniform_n, mask=valid, other=0.0)
    if HAS_CAM:
        if NORMALISE:  # (B, C, 1, N): a value for each patch
            offset = index * cam_x
        else:  # sampled as F.interpolate's "nearest" does, in fp32
            y = tl.minimum(tl.floor((index // columns).to(tl.float32) * scale_y).to(tl.int32), height - 1)
            x = tl.minimum(tl.floor((index % columns).to(tl.float32) * scale_x).to(tl.int32), width - 1)
            offset = y * cam_y + x * cam_x
        classes = tl.arange(0, CLASSES)
        present = tl.load(labels + b * labels_b + classes * labels_c, mask=classes < C, other=0).to(tl.float32) > 0
        value = tl.zeros_like(soft)
        c = tl.full((), -1, tl.int32)
        for _ in range(tl.sum(present.to(tl.int32), 0)):
            c = tl.min(tl.where(present & (classes > c), classes, CLASSES), 0)  # the next present class
            activation = tl.load(cam + b * cam_b + c.to(tl.int64) * cam_c + offset, mask=valid, other=0.0).to(
                tl.float32
            )
            if NORMALISE:
                activation -= tl.min(tl.where(valid, activation, float("inf")), 0)
                highest = tl.max(tl.where(valid, activation, float("-inf")), 0)
                activation = tl.div_rn(activation, tl.zeros_like(activation) + (highest + 1e-5))
            value = tl.maximum(value, activation)
        soft += ((value > low) & (value < high)).to(tl.float32)
    return soft


@triton.jit
def _ordered_key(soft):
    """Unsigned integer that orders like the float; no number maps to 0."""
    bits = tl.where(soft == 0, 0.0, soft).to(tl.uint32, bitcast=True)  # -0 equals +0
    return tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def _select_kernel(
    cam, labels, uniform, mask, masked, blocks, k, C, height, width, columns, scale_y, scale_x,
    cam_b, cam_c, cam_y, cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high,
    HAS_CAM: tl.constexpr, NORMALISE: tl.constexpr, CLASSES: tl.constexpr,
    BLOCKS: tl.constexpr, SIDE: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """One image: soft mask, its k highest blocks, and the patches that they cover."""
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    valid = index < blocks
    soft = _soft_values(
        cam, labels, uniform, b, index, valid, C, height, width, columns, scale_y, scale_x, cam_b, cam_c, cam_y, cam_x,
        labels_b, labels_c, uniform_b, uniform_n, low, high, HAS_CAM, NORMALISE, CLASSES,
    )  # fmt: skip
    key = tl.where(valid, _ordered_key(soft), 0)
    threshold = tl.zeros((), tl.uint32)  # becomes the k-th largest key, from the highest bit down
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((key >= (threshold | bit)).to(tl.int32), 0) >= k
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    equal = ((key == threshold) & valid).to(tl.int32)
    needed = k - tl.sum((key > threshold).to(tl.int32), 0)
    last = tl.max(tl.where((equal == 1) & (tl.cumsum(equal, 0) <= needed), index, -1), 0)
    patch = tl.arange(0, PATCHES)
    inside = patch < blocks * SIDE * SIDE
    if SIDE == 1:
        owner, owner_key = index, key
    else:
        owner = patch // (columns * SIDE) // SIDE * columns + patch % (columns * SIDE) // SIDE
        soft = _soft_values(
            cam, labels, uniform, b, owner, inside, C, height, width, columns, scale_y, scale_x, cam_b, cam_c, cam_y,
            cam_x, labels_b, labels_c, uniform_b, uniform_n, low, high, HAS_CAM, NORMALISE, CLASSES,
        )  # fmt: skip
        owner_key = _ordered_key(soft)
    chosen = inside & ((owner_key > threshold) | ((owner_key == threshold) & (owner <= last)))
    N = blocks * SIDE * SIDE
    total = k * SIDE * SIDE
    before = tl.cumsum(chosen.to(tl.int32), 0)  # masked patches up to and including this one
    tl.store(mask + b * N + patch, chosen, mask=inside)
    tl.store(masked + b * total + before - 1, patch.to(tl.int64), mask=chosen)


# --- launch


def launch_activation(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Activation (B, C, 1, N) fp32 of features (B, N, D) by a classifier (C, D), for the present classes only."""
    require_dtype("features (Triton)", features, FEATURE_DTYPES)
    (B, N, D), C = features.shape, weight.shape[0]
    constants = _activation_configuration(features.dtype, C)
    cam = features.new_empty(B, C, 1, N, dtype=torch.float32)
    with device_guard(features):
        _activation_kernel[(triton.cdiv(N, TOKENS), B, triton.cdiv(C, constants["CLASSES"]))](
            features, weight, labels, cam, N, D, C, *features.stride(), *weight.stride(), *labels.stride(),
            **constants, num_warps=4, num_stages=3,
        )  # fmt: skip
    return cam


def _activation_configuration(dtype: torch.dtype, classes: int) -> dict[str, Any]:
    """Constants of the activation kernel: 128 bytes of each row per step; matrix products need at least 16 classes."""
    padded = min(max(next_power_of_2(classes), 16), 64)
    return {"TOKENS": TOKENS, "CLASSES": padded, "WIDTH": 128 // dtype.itemsize}


def launch_selection(
    uniform: Tensor, k: int, rows: int, columns: int, block: int, cam: Tensor | None = None,
    labels: Tensor | None = None, low: float = 0.0, high: float = 0.0, normalise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the selection; without ``cam`` (B, C, h', w'), ``uniform`` is the soft mask itself."""
    require_dtype("uniform (Triton)", uniform, (torch.float32,))
    if rows * columns * block * block > MAX_PATCHES:
        raise ValueError(f"{rows * columns * block * block} patches; the kernel takes at most {MAX_PATCHES}")
    mask, masked = outputs = empty_selection(uniform, k, block)
    blocks = rows * columns
    has_cam = cam is not None
    cam, labels = (uniform[:, :, None, None], uniform) if cam is None or labels is None else (cam, labels)
    height, width = cam.shape[2:]
    patches, warps = _select_configuration(blocks * block * block)
    with device_guard(uniform):
        _select_kernel[(uniform.shape[0],)](
            cam, labels, uniform, mask, masked, blocks, k, cam.shape[1], height, width, columns,
            height / rows, width / columns, *cam.stride(), *labels.stride(), *uniform.stride(), low, high,
            HAS_CAM=has_cam, NORMALISE=normalise, CLASSES=next_power_of_2(cam.shape[1]) if has_cam else 1,
            BLOCKS=next_power_of_2(blocks), SIDE=block, PATCHES=patches, num_warps=warps,
        )  # fmt: skip
    return outputs


def _select_configuration(patches: int) -> tuple[int, int]:
    """(padded number of patches, warps): 8 values per thread, 16 for the largest."""
    padded = next_power_of_2(patches)
    return padded, min(max(padded // 256, 4), 16)


def empty_selection(uniform: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs of a selection."""
    B, patches, chosen = uniform.shape[0], uniform.shape[1] * block * block, k * block * block
    return (
        uniform.new_empty(B, patches, dtype=torch.bool),
        uniform.new_empty(B, chosen, dtype=torch.int64),
    )


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernel, for the ahead-of-time compile test."""
    bf16, fp16, fp32 = ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)
    for (kind, dtype), classes in ((bf16, 20), (bf16, 80), (fp16, 20), (fp32, 20), (fp32, 80)):
        yield CompileCase(
            f"activation {kind} C={classes}",
            _activation_kernel,
            {"features": f"*{kind}", "weight": "*fp32", "labels": "*fp32", "cam": "*fp32"}
            | dict.fromkeys(("N", "D", "features_b", "features_n", "weight_c"), "i32:16")
            | {"C": "i32", "labels_b": "i32"},
            {"features_d": 1, "weight_d": 1, "labels_c": 1, **_activation_configuration(dtype, classes)},
            num_warps=4,
            num_stages=3,
            main=kind == "fp32" and classes == 20,  # the normalised tokens, under autocast too
        )
    integers = ["blocks", "k", "C", "height", "width", "columns"]
    integers += ["cam_b", "cam_c", "cam_y", "labels_b", "uniform_b"]
    for name, patches, side, has_cam, normalise in (
        ("select N=784", 784, 1, True, True),
        ("select N=4096", 4096, 1, True, True),
        ("select N=8192", 8192, 1, True, True),
        ("select from CAM, blocks", 784, 4, True, False),
        ("select from CAM, N=4096", 4096, 1, True, False),
        ("select from soft mask", 784, 1, False, False),
    ):
        padded, warps = _select_configuration(patches)
        yield CompileCase(
            name,
            _select_kernel,
            {"cam": "*fp32", "labels": "*fp32", "uniform": "*fp32", "mask": "*i1", "masked": "*i64"}
            | dict.fromkeys(integers, "i32")
            | dict.fromkeys(("scale_y", "scale_x", "low", "high"), "fp32"),
            {"cam_x": 1, "labels_c": 1, "uniform_n": 1, "HAS_CAM": has_cam, "NORMALISE": normalise, "SIDE": side}
            | {"CLASSES": 128 if has_cam else 1, "BLOCKS": next_power_of_2(patches // side**2), "PATCHES": padded},
            num_warps=warps,
            main=patches == 784 and has_cam,
        )
