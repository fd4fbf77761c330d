"""Segmentation cross-entropy on logits resized to the label map on the fly (official code, segmentation loss).

Legend: B batch, C foreground classes, H W label pixels, h w logit grid. Band: consecutive rows of labels.
The pixels of both sets are counted first, from the labels alone; one pass over the logits then computes the weighted
loss and its gradient, which is kept for the backward pass at the resolution of the logits.
"""

import torch
from torch import Tensor

from .bilinear import resize_matrix
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, require_shape, use_triton
from .segmentation_kernels import launch_counts, launch_loss

LABEL_DTYPES = (torch.uint8, torch.int64)
BAND_ELEMENTS = 1 << 20  # full-resolution logits that the CPU path holds at once


# --- torch path


def _counts_torch(labels, ignore_index) -> Tensor:
    known = labels != ignore_index
    background, both = (known & (labels == 0)).sum(), known.sum()
    return torch.stack((background, both - background)).float()


def _loss_torch(logits, labels, weights, ignore_index, with_gradient) -> tuple[Tensor, Tensor]:
    """The CPU path: band by band, the gradient in place of the softmax; resize and adjoint are small products."""
    B, K, h, w = logits.shape
    H, W = labels.shape[1:]
    rows, columns = resize_matrix(logits, h, H), resize_matrix(logits, w, W)
    wide = logits.to(rows.dtype) @ columns
    loss, gradient = wide.new_zeros(()), wide.new_zeros(wide.shape if with_gradient else 0)
    background, foreground = weights.to(wide.dtype)
    step = max(1, BAND_ELEMENTS // (B * K * W))
    for top in range(0, H, step):
        bottom = min(top + step, H)
        first, last = max(0, int((top + 0.5) * h / H - 1.5)), min(h, int((bottom - 0.5) * h / H + 1.5) + 1)
        resize = rows[first:last, top:bottom]
        band = resize.T @ wide[:, :, first:last]  # (B, C+1, band rows, W)
        label = labels[:, None, top:bottom].long()
        known = label != ignore_index
        weight = torch.where(label == 0, background, foreground) * known
        label = label * known
        band -= band.amax(1, keepdim=True)
        picked = band.gather(1, label)
        total = band.exp_().sum(1, keepdim=True)
        loss += torch.sum((total.log() - picked) * weight)
        if with_gradient:
            band.div_(total).scatter_add_(1, label, band.new_full((), -1).expand_as(label))
            gradient[:, :, first:last] += resize @ band.mul_(weight)
    return loss, gradient @ columns.T if with_gradient else gradient


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --- registration


@torch.library.custom_op("fsr::segmentation_counts", mutates_args=())
def segmentation_counts_op(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the numbers of background and of foreground pixels, (2,) float32."""
    return launch_counts(labels, ignore_index) if use_triton(labels) else _counts_torch(labels, ignore_index)


@segmentation_counts_op.register_fake
def _(labels, ignore_index):
    return labels.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("fsr::segmentation_loss", mutates_args=())
def segmentation_loss_op(
    logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross-entropy and, if asked, its gradient (B, C+1, h, w), else empty."""
    if use_triton(logits):
        return launch_loss(logits, labels, weights, ignore_index, with_gradient)
    with torch.autocast(logits.device.type, enabled=False):
        return _loss_torch(logits, labels, weights, ignore_index, with_gradient)


@segmentation_loss_op.register_fake
def _(logits, labels, weights, ignore_index, with_gradient):
    dtype = _dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape if with_gradient else 0, dtype=dtype)


# --- autograd


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # for those outputs it would fill tensors with zeros


def _backward(ctx, grad_loss, _grad_gradient):
    if grad_loss is None:
        return (None,) * 5
    return (ctx.saved_tensors[0] * grad_loss).to(ctx.dtype), None, None, None, None


segmentation_loss_op.register_autograd(_backward, setup_context=_setup_context)


# --- public function


def segmentation_counts(labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Count the pixels labelled background and those labelled foreground.

    Args:
        labels: (B, H, W), uint8 or int64: 0 background, `ignore_index` in neither set, all others foreground.
        ignore_index: label of the pixels without a known class.

    Returns:
        (2,) float32, background and foreground pixels.

    Raises:
        TypeError: if `labels` is neither uint8 nor int64.

    Source: paper, Eq. 10 (L_seg); official code for its form.
    """
    require_dtype("labels", labels, LABEL_DTYPES)
    return segmentation_counts_op(labels, ignore_index)


def segmentation_sum(logits: Tensor, labels: Tensor, weights: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum the cross-entropy over all pixels, those of background and of foreground each times their weight.

    The logits are resized bilinearly (align_corners=False) to the label map without being stored at that size.

    Args:
        logits: (B, C+1, h, w), floating point, channel 0 the background.
        labels: (B, H, W), uint8 or int64: 0 background, 1..C foreground, `ignore_index` in neither set. Any other value
            is an error: on the CPU it raises, on a GPU, where a check would wait, it makes the sum infinite.
        weights: (2,), floating point, constants above 0: of a background and of a foreground pixel.
        ignore_index: label of the pixels without a known class.

    Returns:
        Scalar, float32 (float64 for float64 logits), differentiable in `logits` (once).

    Raises:
        ValueError: if the shapes or devices do not fit together.
        TypeError: if `logits` or `weights` is not floating point or `labels` neither uint8 nor int64.

    Source: paper, Eq. 10 (L_seg); official code for its form.
    """
    _check(logits, labels, weights)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    return segmentation_loss_op(logits, labels, weights, ignore_index, with_gradient)[0]


def _check(logits: Tensor, labels: Tensor, weights: Tensor) -> None:
    if (
        logits.ndim != 4
        or labels.ndim != 3
        or logits.shape[0] != labels.shape[0]
        or 0 in (*logits.shape, *labels.shape)
    ):
        raise ValueError(
            f"logits must be (B, C+1, h, w) and labels (B, H, W), none of them 0, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    require_dtype("logits", logits, (*FEATURE_DTYPES, torch.float64))
    require_dtype("labels", labels, LABEL_DTYPES)
    require_dtype("weights", weights, (torch.float32, torch.float64))
    require_shape("weights", weights, (2,))
    require_same_device(logits=logits, labels=labels, weights=weights)
