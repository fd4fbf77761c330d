"""Uncertain-patch selection from features or from a ready class activation map (paper, Eq. 2-4).

The activation needs a minimum and a maximum over all patches of an image, a barrier for the whole grid, so two launches
are the fewest: one multiplies features and classifier, storing present classes only; the other, one program an image,
does the rest (see :mod:`patch_selection`).

Legend: B batch, N patches, D width, C classes, h w patch grid.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    FEATURE_DTYPES,
    CompileCase,
    device_guard,
    dot,
    next_power_of_2,
    require_dtype,
    require_same_device,
    require_shape,
    tl,
    triton,
    use_triton,
)
from .patch_selection import (
    PatchSelection,
    block_grid,
    empty_selection,
    require_k,
    select_torch,
    select_triton,
    top_k_mask,
)

__all__ = ["PatchSelection", "top_k_mask", "uncertain_mask", "uncertain_mask_from_cam"]

TOKENS = 64  # patches of one program of the activation kernel


def uncertain_mask(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, *, k: int, low: float = 0.2, high: float = 0.7
) -> PatchSelection:
    """Mask the k patches of the highest soft mask, the patches of uncertain activation first.

    Args:
        features: (B, N, D) fp32, bf16 or fp16 (fp64 on the torch path): patch features of the view to be masked.
        weight: (C, D) floating: the classifier's weight; used in the dtype of ``features``.
        labels: (B, C) any dtype: a class is present where it is > 0.
        uniform: (B, N) fp32 in [0, 1): the random draw u of Eq. 3.
        k: number of patches to mask in each image, 0 <= k <= N.
        low: lower threshold of Eq. 3, exclusive.
        high: upper threshold of Eq. 3, exclusive.

    Returns:
        The selection over the N patches. No gradient.

    Raises:
        ValueError: a shape does not fit, ``k`` is out of range, or the tensors live on several devices.
        TypeError: a dtype is not supported.

    Source: Eq. 2-4, activation of a single scale at patch granularity.
    """
    require_shape("features", features, ("B", "N", "D"))
    B, N, D = features.shape
    require_shape("weight", weight, ("C", D))
    require_shape("labels", labels, (B, weight.shape[0]))
    require_shape("uniform", uniform, (B, N))
    require_k(k, N)
    require_dtype("features", features, (*FEATURE_DTYPES, torch.float64))
    require_dtype("weight", weight, (*FEATURE_DTYPES, torch.float64))
    require_dtype("uniform", uniform, (torch.float32, torch.float64))
    require_same_device(features=features, weight=weight, labels=labels, uniform=uniform)
    return PatchSelection(
        *uncertain_mask_op(features.detach(), weight.detach(), labels.detach(), uniform.detach(), k, low, high)
    )


def uncertain_mask_from_cam(
    cam: Tensor,
    labels: Tensor,
    uniform: Tensor,
    *,
    grid: tuple[int, int],
    k: int,
    low: float = 0.2,
    high: float = 0.7,
    block: int = 1,
) -> PatchSelection:
    """Mask by a class activation map that is already normalised, at patch or block granularity.

    Args:
        cam: (B, C, h', w') fp32, bf16 or fp16 in [0, 1], any resolution, sampled at its nearest pixel.
        labels: (B, C) any dtype: a class is present where it is > 0.
        uniform: (B, (h / block) * (w / block)) fp32 in [0, 1): one draw a block.
        grid: (h, w) patches; both are multiples of ``block``.
        k: number of blocks to mask in each image.
        low: lower threshold of Eq. 3, exclusive.
        high: upper threshold of Eq. 3, exclusive.
        block: patches along a block's side; 1 is patch granularity.

    Returns:
        The selection over the N = h * w patches, k * block² of them masked. No gradient.

    Raises:
        ValueError: a shape does not fit, ``k`` is out of range, or the tensors live on several devices.
        TypeError: a dtype is not supported.

    Source: Eq. 3-4; official code for blocks and for nearest sampling.
    """
    require_shape("cam", cam, ("B", "C", "h'", "w'"))
    rows, columns = block_grid(grid, block)
    require_shape("labels", labels, tuple(cam.shape[:2]))
    require_shape("uniform", uniform, (cam.shape[0], rows * columns))
    require_k(k, rows * columns)
    require_dtype("cam", cam, (*FEATURE_DTYPES, torch.float64))
    require_dtype("uniform", uniform, (torch.float32, torch.float64))
    require_same_device(cam=cam, labels=labels, uniform=uniform)
    arguments = (cam.detach(), labels.detach(), uniform.detach())
    return PatchSelection(*uncertain_mask_from_cam_op(*arguments, rows, columns, block, k, low, high))


# The torch path: present classes only, one product an image.


def _soft_torch(value: Tensor, uniform: Tensor, low: float, high: float) -> Tensor:
    return uniform + ((value > low) & (value < high)).to(uniform.dtype)


def _value_from_features(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    exact = torch.promote_types(features.dtype, torch.float32)
    value = features.new_zeros(features.shape[:2], dtype=exact)
    for b in range(features.shape[0]):
        present = weight[labels[b] > 0].to(features.dtype)
        if present.shape[0]:
            cam = torch.relu(features[b].to(exact) @ present.to(exact).T)  # (N, present classes)
            cam -= cam.amin(0)
            value[b] = (cam / (cam.amax(0) + 1e-5)).amax(1)
    return value


def _value_from_cam(cam: Tensor, labels: Tensor, rows: int, columns: int) -> Tensor:
    sampled = F.interpolate(cam, size=(rows, columns), mode="nearest").flatten(2)
    return torch.where(labels[:, :, None] > 0, sampled, 0).clamp(min=0).amax(1)


# The Triton path.


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


def _activation_configuration(dtype: torch.dtype, classes: int) -> dict[str, Any]:
    """Constants of the activation kernel: 128 bytes of each row a step; a matrix product takes at least 16 classes."""
    padded = min(max(next_power_of_2(classes), 16), 64)
    return {"TOKENS": TOKENS, "CLASSES": padded, "WIDTH": 128 // dtype.itemsize}


@torch.library.custom_op("fsr::uncertain_mask", mutates_args=())
def uncertain_mask_op(
    features: Tensor, weight: Tensor, labels: Tensor, uniform: Tensor, k: int, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered form of :func:`uncertain_mask`; checked arguments."""
    B, N, D = features.shape
    if not use_triton(features):
        value = _value_from_features(features, weight, labels)
        return select_torch(_soft_torch(value, uniform, low, high), 1, N, 1, k)
    require_dtype("features (Triton)", features, FEATURE_DTYPES)
    C = weight.shape[0]
    constants = _activation_configuration(features.dtype, C)
    cam = features.new_empty(B, C, 1, N, dtype=torch.float32)
    with device_guard(features):
        _activation_kernel[(triton.cdiv(N, TOKENS), B, triton.cdiv(C, constants["CLASSES"]))](
            features, weight, labels, cam, N, D, C, *features.stride(), *weight.stride(), *labels.stride(),
            **constants, num_warps=4, num_stages=3,
        )  # fmt: skip
    return select_triton(uniform, k, 1, N, 1, cam, labels, low, high, normalise=True)


@torch.library.custom_op("fsr::uncertain_mask_from_cam", mutates_args=())
def uncertain_mask_from_cam_op(
    cam: Tensor, labels: Tensor, uniform: Tensor, rows: int, columns: int, block: int, k: int, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Registered form of :func:`uncertain_mask_from_cam`; checked arguments."""
    if not use_triton(cam):
        soft = _soft_torch(_value_from_cam(cam, labels, rows, columns), uniform, low, high)
        return select_torch(soft, rows, columns, block, k)
    require_dtype("cam (Triton)", cam, FEATURE_DTYPES)
    return select_triton(uniform, k, rows, columns, block, cam, labels, low, high)


@uncertain_mask_op.register_fake
def _(features, weight, labels, uniform, k, low, high):
    return empty_selection(uniform, k, 1)


@uncertain_mask_from_cam_op.register_fake
def _(cam, labels, uniform, rows, columns, block, k, low, high):
    return empty_selection(uniform, k, block)


def compile_cases() -> Iterator[CompileCase]:
    """Shipped configurations of the kernels, for the ahead-of-time compile test."""
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
            main=kind == "bf16" and classes == 20,
        )
