"""Segmentation cross-entropy on logits resized to the label map on the fly (official code, segmentation loss).

Legend: B batch, C foreground classes, H W label pixels, h w logit grid. Band: consecutive rows of labels.
Kept for the backward pass: two gradients at the resolution of the logits, one for each entropy sum.
"""

import torch
from torch import Tensor

from .bilinear import resize_matrix
from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton
from .segmentation_kernels import launch_terms

BAND_ELEMENTS = 1 << 20  # full-resolution logits that the CPU path holds at once


# --- torch path


def _terms_torch(logits, labels, ignore_index, with_gradient) -> tuple[Tensor, Tensor]:
    """The CPU path: band by band, the gradient in place of the softmax; resize and adjoint are small products."""
    B, K, h, w = logits.shape
    H, W = labels.shape[1:]
    rows, columns = resize_matrix(logits, h, H), resize_matrix(logits, w, W)
    wide = logits.to(rows.dtype) @ columns
    sums, gradient = wide.new_zeros(2, 2), wide.new_zeros((2, *wide.shape) if with_gradient else 0)
    step = max(1, BAND_ELEMENTS // (B * K * W))
    for top in range(0, H, step):
        bottom = min(top + step, H)
        first, last = max(0, int((top + 0.5) * h / H - 1.5)), min(h, int((bottom - 0.5) * h / H + 1.5) + 1)
        weights = rows[first:last, top:bottom]
        band = weights.T @ wide[:, :, first:last]  # (B, C+1, band rows, W)
        label = labels[:, None, top:bottom].long()
        known = label != ignore_index
        sets = torch.stack((known & (label == 0), known & (label != 0)))
        label = label * known
        band -= band.amax(1, keepdim=True)
        picked = band.gather(1, label)
        total = band.exp_().sum(1, keepdim=True)
        entropy = torch.where(sets, total.log() - picked, 0)
        sums += torch.stack((entropy.flatten(1).sum(1), sets.flatten(1).sum(1)), dim=1)
        if with_gradient:
            band.div_(total).scatter_add_(1, label, band.new_full((), -1).expand_as(label))
            for part, chosen in zip(gradient, sets, strict=True):
                part[:, :, first:last] += weights @ (band * chosen.to(band.dtype))
    return sums.view(4), gradient @ columns.T if with_gradient else gradient


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --- registration


@torch.library.custom_op("fsr::segmentation_terms", mutates_args=())
def segmentation_terms_op(
    logits: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the four sums and, if asked, the gradients of the two entropy sums, (2, B, C+1, h, w), else empty."""
    if use_triton(logits):
        return launch_terms(logits, labels, ignore_index, with_gradient)
    with torch.autocast(logits.device.type, enabled=False):
        return _terms_torch(logits, labels, ignore_index, with_gradient)


@segmentation_terms_op.register_fake
def _(logits, labels, ignore_index, with_gradient):
    dtype = _dtype(logits)
    shape = (2, *logits.shape) if with_gradient else (0,)
    return logits.new_empty(4, dtype=dtype), logits.new_empty(shape, dtype=dtype)


# --- autograd


def _setup_context(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx, grad_sums, _grad_gradient):
    background, foreground = ctx.saved_tensors[0]
    return (background * grad_sums[0] + foreground * grad_sums[2]).to(ctx.dtype), None, None, None


segmentation_terms_op.register_autograd(_backward, setup_context=_setup_context)


# --- public function


def segmentation_sums(logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Sum the cross-entropy over background-labelled and over foreground-labelled pixels.

    The logits are resized bilinearly (align_corners=False) to the label map without being stored at that size.

    Args:
        logits: (B, C+1, h, w), floating point, channel 0 the background.
        labels: (B, H, W), uint8 or int64: 0 background, 1..C foreground, `ignore_index` in neither set. Any other value
            is an error: on the CPU it raises, on a GPU, where a check would wait, it makes the sum infinite.
        ignore_index: label of the pixels without a known class.

    Returns:
        (4,) float32 (float64 for float64 logits): background sum, background pixels, foreground sum, foreground pixels.
        The two sums are differentiable in `logits` (once), the counts are constants.

    Raises:
        ValueError: if the shapes or devices do not fit together.
        TypeError: if `logits` is not floating point or `labels` neither uint8 nor int64.

    Source: paper, Eq. 10 (L_seg); official code for its form.
    """
    _check(logits, labels)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    sums, _ = segmentation_terms_op(logits, labels, ignore_index, with_gradient)
    return sums


def _check(logits: Tensor, labels: Tensor) -> None:
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
    require_dtype("labels", labels, (torch.uint8, torch.int64))
    require_same_device(logits=logits, labels=labels)
