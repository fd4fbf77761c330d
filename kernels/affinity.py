"""Sums over all pairs of patches, without a matrix of them: the affinity loss (paper, L_aff of Eq. 10; official code).

The maths and the kernels are in :mod:`affinity_kernels`; the torch path does the same in bands of rows.

Legend: B batch, N patches, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .affinity_kernels import EPS, NO_NORM, launch_backward, launch_sums
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, require_shape, use_triton

BAND = 512  # rows of S that the torch path holds at a time


# --- torch path: known patches only, a band of rows of S at a time


class _Band(NamedTuple):
    """Rows of S of one image on the torch path; only patches of known label."""

    image: int
    rows: slice
    patches: Tensor
    unit: Tensor
    similarity: Tensor
    same: Tensor


def _prepare_torch(features: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    unknown, order = torch.sort((labels == ignore_index).contiguous(), dim=1, stable=True)
    norm = torch.linalg.vector_norm(features.contiguous(), dim=2, dtype=_sum_dtype(features)).clamp(min=EPS)
    return order.to(torch.int32), torch.where(unknown, NO_NORM, 1 / norm.gather(1, order))


def _bands(features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor) -> Iterator[_Band]:
    for b in range(features.shape[0]):
        known = order[b, : int((inverse[b] != NO_NORM).sum())]
        unit = features[b, known].to(inverse.dtype) * inverse[b, : len(known), None]
        for start in range(0, len(known), BAND):
            rows = slice(start, min(start + BAND, len(known)))
            similarity = unit[rows] @ unit.T
            similarity[:, start:].fill_diagonal_(0)  # a patch is no pair with itself
            same = labels[b, known[rows], None] == labels[b, known]
            yield _Band(b, rows, known[rows], unit, similarity, same)


def _sums_torch(features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    sums = features.new_zeros(4, dtype=torch.float64)
    for band in _bands(features, labels, order, inverse):
        size = len(band.patches)
        same_count = band.same.sum() - size
        similarity = band.similarity.abs_()
        sums[0] += similarity.masked_fill(~band.same, 0).sum()
        sums[1] += same_count
        sums[2] += similarity.masked_fill_(band.same, 0).sum()
        sums[3] += size * (len(band.unit) - 1) - same_count
    return sums.to(inverse.dtype)


def _backward_torch(gradient: Tensor, features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    result = torch.zeros_like(features, memory_format=torch.contiguous_format)
    for band in _bands(features, labels, order, inverse):
        weight = 2 * band.similarity.sign() * torch.where(band.same, gradient[0], gradient[2])
        scale = inverse[band.image, band.rows, None]
        along = (weight * band.similarity).sum(1, keepdim=True).masked_fill(scale >= 1 / EPS, 0)
        change = (weight @ band.unit - along * band.unit[band.rows]) * scale
        result[band.image, band.patches] = change.to(result.dtype)
    return result


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# --- registration


@torch.library.custom_op("fsr::affinity_sums", mutates_args=())
def affinity_sums_op(features: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Registered form of :func:`affinity_sums`: the sums, the list of patches (known first), 1 / norm in its order."""
    if use_triton(features):
        return launch_sums(features, labels, ignore_index)
    order, inverse = _prepare_torch(features, labels, ignore_index)
    return _sums_torch(features, labels, order, inverse), order, inverse


@affinity_sums_op.register_fake
def _(features, labels, ignore_index):
    exact = _sum_dtype(features)
    return (
        features.new_empty(4, dtype=exact),
        labels.new_empty(labels.shape, dtype=torch.int32),
        features.new_empty(labels.shape, dtype=exact),
    )


@torch.library.custom_op("fsr::affinity_sums_backward", mutates_args=())
def affinity_sums_backward_op(
    gradient: Tensor, features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor
) -> Tensor:
    """Gradient of the features from that of the four sums."""
    backward = launch_backward if use_triton(features) else _backward_torch
    return backward(gradient, features, labels, order, inverse)


@affinity_sums_backward_op.register_fake
def _(gradient, features, labels, order, inverse):
    return features.new_empty(features.shape)


# --- autograd


def _setup_context(ctx, inputs, output):
    features, labels, _ = inputs
    ctx.save_for_backward(features, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, gradient, *_):
    return affinity_sums_backward_op(gradient, *ctx.saved_tensors), None, None


affinity_sums_op.register_autograd(_backward, setup_context=_setup_context)


# --- public function


def affinity_sums(features: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum |cosine similarity| over all pairs of patches with equal and with different labels.

    Args:
        features: (B, N, D) fp32, bf16 or fp16 (fp64 on the torch path).
        labels: (B, N) integer: 0 background, 1..C classes, ``ignore_index`` unknown.
        ignore_index: label of the patches that take no part.

    Returns:
        (4,) fp32 (fp64 for fp64 input): same_sum, same_count, different_sum, different_count over ordered pairs i != j
        of the same image. Differentiable in the sums; the counts carry no gradient.

    Raises:
        ValueError: a shape does not fit, or the tensors live on two devices.
        TypeError: a dtype is not supported.

    Source: official code, patch token contrast.
    """
    require_shape("features", features, ("B", "N", "D"))
    require_shape("labels", labels, features.shape[:2])
    require_dtype("features", features, (*FEATURE_DTYPES, torch.float64))
    require_dtype("labels", labels, (torch.int64, torch.int32, torch.uint8))
    require_same_device(features=features, labels=labels)
    return affinity_sums_op(features, labels, ignore_index)[0]
