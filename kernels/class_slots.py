"""The classes present in each image, in a fixed number of slots.

Legend: B batch, C foreground classes, M class slots.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import CompileCase, device_guard, next_power_of_2, tl, triton, use_triton

# --- kernel


@triton.jit
def _present_kernel(labels, classes, live, C, max_classes, stride_b, stride_c, BLOCK: tl.constexpr):
    """One image: its present classes in the first slots, class 0 in the dead ones."""
    b = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    present = tl.load(labels + b * stride_b + index * stride_c, mask=index < C, other=0) > 0
    rank = tl.cumsum(present.to(tl.int32), 0) - 1
    total = tl.sum(present.to(tl.int32))
    tl.store(classes + b * max_classes + rank, index.to(tl.int64), mask=present & (rank < max_classes))
    tl.store(classes + b * max_classes + index, index.to(tl.int64) * 0, mask=(index >= total) & (index < max_classes))
    tl.store(live + b * max_classes + index, (index < total).to(tl.uint8), mask=index < max_classes)


# --- launch


def launch_present(labels: Tensor, max_classes: int) -> tuple[Tensor, Tensor]:
    """Results of ``fsr::present_classes`` for labels (B, C) of any strides."""
    B, C = labels.shape
    labels = labels.view(torch.uint8) if labels.dtype == torch.bool else labels
    classes = labels.new_empty((B, max_classes), dtype=torch.int64)
    live = labels.new_empty((B, max_classes), dtype=torch.bool)
    with device_guard(labels):
        _present_kernel[(B,)](
            labels, classes, live.view(torch.uint8), C, max_classes, *labels.stride(),
            BLOCK=next_power_of_2(max(C, max_classes)), num_warps=1,
        )  # fmt: skip
    return classes, live


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations of the kernel, for the ahead-of-time compile test."""
    for kind in ("fp32", "i64", "u8"):
        signature = {"labels": f"*{kind}", "classes": "*i64", "live": "*u8"}
        signature |= {"C": "i32", "max_classes": "i32", "stride_b": "i32"}
        constants = {"stride_c": 1, "BLOCK": 128}
        yield CompileCase(kind, _present_kernel, signature, constants, num_warps=1, main=kind == "fp32")


# --- torch path


def _present_torch(labels: Tensor, max_classes: int) -> tuple[Tensor, Tensor]:
    absent = labels <= 0
    index = absent.to(torch.uint8).sort(dim=1, stable=True).indices[:, :max_classes]
    live = ~absent.gather(1, index)
    missing = (0, max(0, max_classes - index.shape[1]))
    return F.pad(index * live, missing), F.pad(live, missing)


# --- registration


@torch.library.custom_op("fsr::present_classes", mutates_args=())
def present_classes_op(labels: Tensor, max_classes: int) -> tuple[Tensor, Tensor]:
    """Registered form of :func:`present_classes`; checked arguments."""
    return (launch_present if use_triton(labels) else _present_torch)(labels, max_classes)


@present_classes_op.register_fake
def _(labels, max_classes):
    shape = (labels.shape[0], max_classes)
    return labels.new_empty(shape, dtype=torch.int64), labels.new_empty(shape, dtype=torch.bool)


# --- public function


def present_classes(labels: Tensor, *, max_classes: int) -> tuple[Tensor, Tensor]:
    """List the classes present in each image in a fixed number of slots, without waiting for the device.

    Args:
        labels: (B, C), any real dtype; a class is present where the label is above 0.
        max_classes: number M of class slots; classes beyond the first M present ones are dropped.

    Returns:
        index: (B, M) int64, present classes in ascending order, then 0 in the dead slots.
        live: (B, M) bool, True where the slot holds a present class.

    Raises:
        ValueError: if `labels` is not two-dimensional and non-empty or `max_classes` is below 1.
    """
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be (B, C) with B, C >= 1, got {tuple(labels.shape)}")
    if max_classes < 1:
        raise ValueError(
            f"max_classes must be at least 1, got {max_classes}; give the largest number of classes in an image"
        )
    return present_classes_op(labels, max_classes)
