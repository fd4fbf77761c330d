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
    """Rows of pairs of one image, only patches of known label."""

    image: int
    rows: slice
    patches: Tensor
    unit: Tensor
    same: Tensor


def _prepare_torch(features: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    unknown, order = torch.sort((labels == ignore_index).contiguous(), dim=1, stable=True)
    norm = torch.linalg.vector_norm(features.contiguous(), dim=2, dtype=_sum_dtype(features)).clamp(min=EPS)
    return order.to(torch.int32), torch.where(unknown, NO_NORM, 1 / norm.gather(1, order))


def _bands(features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor) -> Iterator[_Band]:
    for b, size in enumerate((inverse != NO_NORM).sum(1).tolist()):
        known = order[b, :size].long()
        unit = features[b].index_select(0, known).to(inverse.dtype) * inverse[b, :size, None]
        label = labels[b].index_select(0, known)
        for start in range(0, size, BAND):
            rows = slice(start, min(start + BAND, size))
            yield _Band(b, rows, known[rows], unit, label[rows, None] == label)


def _sums_torch(
    features: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, inverse = _prepare_torch(features, labels, ignore_index)
    B, N = labels.shape
    rows = inverse.new_zeros((B, N, 2))
    signs = inverse.new_zeros((B, N, N) if with_gradient else 0, dtype=torch.int8)
    pairs = same_count = 0
    for band in _bands(features, labels, order, inverse):
        similarity = band.unit[band.rows] @ band.unit.T
        similarity.diagonal(band.rows.start).zero_()  # a patch does not pair with itself
        if with_gradient:
            signs[band.image, band.rows, : len(band.unit)] = similarity.sign()
        different = similarity.abs_().masked_fill(band.same, 0)
        same_sum, different_sum = rows[band.image, band.rows].unbind(1)
        torch.sum(different, 1, dtype=rows.dtype, out=different_sum)  # under autocast the products are bf16
        torch.sum(similarity.sub_(different), 1, dtype=rows.dtype, out=same_sum)  # exact: similarity, or 0
        pairs += len(band.patches) * (len(band.unit) - 1)
        same_count += int(band.same.count_nonzero()) - len(band.patches)
    same, other = rows.sum((0, 1), dtype=torch.float64).tolist()
    sums = inverse.new_tensor([same, same_count, other, pairs - same_count])
    return sums, order, inverse, rows if with_gradient else rows.new_empty((0, 0, 2)), signs


def _backward_torch(gradient: Tensor, features: Tensor, labels: Tensor, *found: Tensor) -> Tensor:
    order, inverse, rows, signs = found
    result = torch.zeros_like(features, memory_format=torch.contiguous_format)
    for band in _bands(features, labels, order, inverse):
        weight = torch.where(band.same, gradient[0], gradient[2]).mul_(signs[band.image, band.rows, : len(band.unit)])
        scale = inverse[band.image, band.rows, None]
        along = (rows[band.image, band.rows] @ gradient[::2])[:, None].masked_fill(scale >= 1 / EPS, 0)
        change = torch.addcmul(weight @ band.unit, along, band.unit[band.rows], value=-1).mul_(2 * scale)
        result[band.image].index_copy_(0, band.patches, change.to(result.dtype))
    return result


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# --- registration


@torch.library.custom_op("fsr::affinity_sums", mutates_args=())
def affinity_sums_op(
    features: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Registered form of :func:`affinity_sums`.

    Returns:
        The sums (4,); the list of patches (B,N) int32, known first; in its order 1 / norm (B,N), and, empty without
        gradient, sums of the rows (B,N,2) over patches of the same label and over the others, and the pairs' signs
        (B,N,N) int8.
    """
    return (launch_sums if use_triton(features) else _sums_torch)(features, labels, ignore_index, with_gradient)


@affinity_sums_op.register_fake
def _(features, labels, ignore_index, with_gradient):
    exact = _sum_dtype(features)
    (B, N), some = labels.shape, int(with_gradient)
    return (
        features.new_empty(4, dtype=exact),
        labels.new_empty((B, N), dtype=torch.int32),
        features.new_empty((B, N), dtype=exact),
        features.new_empty((some * B, some * N, 2), dtype=exact),
        features.new_empty((B, N, N) if with_gradient else 0, dtype=torch.int8),
    )


@torch.library.custom_op("fsr::affinity_sums_backward", mutates_args=())
def affinity_sums_backward_op(
    gradient: Tensor, features: Tensor, labels: Tensor, order: Tensor, inverse: Tensor, rows: Tensor, signs: Tensor
) -> Tensor:
    """Gradient of the features from that of the four sums and the results of the forward pass."""
    backward = launch_backward if use_triton(features) else _backward_torch
    return backward(gradient, features, labels, order, inverse, rows, signs)


@affinity_sums_backward_op.register_fake
def _(gradient, features, *_):
    return features.new_empty(features.shape)


# --- autograd


def _setup_context(ctx, inputs, output):
    features, labels, *_ = inputs
    ctx.save_for_backward(features, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for those outputs it would fill tensors with zeros


def _backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 4
    return affinity_sums_backward_op(gradient, *ctx.saved_tensors), None, None, None


affinity_sums_op.register_autograd(_backward, setup_context=_setup_context)


# --- public function


def affinity_sums(features: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum |cosine similarity| over all pairs of patches with equal and with different labels.

    Args:
        features: (B, N, D) fp32, bf16 or fp16 (fp64 on the torch path); the kernels take them in autocast's dtype.
        labels: (B, N) integer: 0 background, 1..C classes, ``ignore_index`` unknown.
        ignore_index: label of the patches that are left out.

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
    device = features.device.type
    if use_triton(features) and torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    with_gradient = torch.is_grad_enabled() and features.requires_grad
    return affinity_sums_op(features, labels, ignore_index, with_gradient)[0]
