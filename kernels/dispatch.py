"""Which path an operation takes, and what every kernel module shares.

Path: CUDA tensors take the Triton kernels, CPU tensors take vectorised torch. ``FSR_KERNELS=torch`` or
``FSR_KERNELS=triton`` overrides; Triton on CPU tensors needs its interpreter (``TRITON_INTERPRET=1``, set before the
first import). A caller never asks which path was taken; that of `apply_policy`, which has no torch path, has Pillow.

Every file has one order: purpose and maths, kernels, launch, registration, autograd, public function; the torch path
comes before the registration. A public function checks its arguments and calls operators of the ``fsr`` library, which
are opaque to ``torch.compile`` and all registered the same way::

    @torch.library.custom_op("fsr::name", mutates_args=())
    def name_op(...): ...  # use_triton(tensor): launch the kernels; else the torch path
    @name_op.register_fake
    def _(...): ...  # shapes and dtypes of the outputs, nothing else
    @torch.library.custom_op("fsr::name_backward", mutates_args=())
    def name_backward_op(...): ...  # and its fake
    name_op.register_autograd(_backward, setup_context=_setup_context)  # _backward calls name_backward_op

Where autograd differentiates the torch path well (cross-attention), or where the CPU computes the gradient in the
forward pass (distillation), :func:`use_triton` is called before the operator.

``triton_op`` with ``wrap_triton`` would stay visible to Inductor, but tracing runs the kernels on fake tensors, which
the interpreter cannot do, so the same test would not hold with and without a GPU; the kernels fuse all they need
themselves. The backward must be an operator of its own, because AOTAutograd traces it too. Rules that ``opcheck``
enforces: outputs never alias inputs, and every layout is allowed, so kernels take strides or the operator calls
``contiguous()``; gradients arrive expanded (stride 0) after a ``sum``.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton: Python can still parse the kernels, and only the torch path runs

    class _NoTriton:
        def __getattr__(self, name: str) -> "_NoTriton":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if args else self

    triton = tl = _NoTriton()

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FEATURE_DTYPES = tuple(TRITON_DTYPES)  # what the kernels take; the torch path adds float64


class CompileCase(NamedTuple):
    """One shipped configuration of one kernel, for the ahead-of-time compile test.

    Attributes:
        name: unique within the module, e.g. ``"forward bf16 D=768"``.
        kernel: the ``@triton.jit`` function.
        signature: type of each run-time argument by name, e.g. ``{"x": "*bf16", "stride": "i32:16", "n": "i32"}``;
            pointers are taken as divisible by 16, integers only with the suffix ``:16``. Constants are left out.
        constants: value of each ``tl.constexpr`` argument by name (also arguments that are None).
        num_warps: as launched.
        num_stages: as launched.
        main: compile for every target, not only for sm_90.
        least: lowest compute capability whose shared memory suffices.
        spill_reason: why register spills are accepted here; empty if they are not.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    main: bool = False
    least: int = 80
    spill_reason: str = ""


def use_triton(tensor: Tensor) -> bool:
    """Choose the path of an operation from the device of one of its tensors.

    Args:
        tensor: any tensor argument of the operation.

    Returns:
        True for the Triton kernels, False for torch.

    Raises:
        ValueError: ``FSR_KERNELS`` holds something other than ``torch``, ``triton`` or nothing.
        RuntimeError: Triton was requested for a CPU tensor without the interpreter.
    """
    choice = os.environ.get("FSR_KERNELS", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"FSR_KERNELS is {choice!r}; expected 'torch', 'triton' or nothing (choose by device)")
    if choice != "triton":
        return tensor.is_cuda and choice == ""
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError(
            f"FSR_KERNELS=triton with a tensor on {tensor.device}: Triton needs CUDA tensors; "
            "unset FSR_KERNELS, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels (slow)"
        )
    return True


def require_shape(name: str, tensor: Tensor, shape: Iterable[int | str]) -> None:
    """Refuse a tensor whose shape is not the expected one.

    Args:
        name: the argument as the operation calls it.
        tensor: its value.
        shape: one entry per dimension: the exact size, or a letter of the legend if any size is allowed.

    Raises:
        ValueError: the number of dimensions or an exact size differs.
    """
    expected = tuple(shape)
    fits = tensor.dim() == len(expected) and all(
        isinstance(size, str) or size == actual for size, actual in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected ({', '.join(map(str, expected))}), to fit the others"
        )


def require_dtype(name: str, tensor: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a tensor of a dtype that the operation does not support.

    Args:
        name: the argument as the operation calls it.
        tensor: its value.
        dtypes: the accepted ones.

    Raises:
        TypeError: the dtype is none of them.
    """
    accepted = tuple(dtypes)
    if tensor.dtype not in accepted:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; expected {expected}")


def require_same_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that do not all live on one device.

    Args:
        tensors: the arguments by name; None is skipped.

    Raises:
        ValueError: two devices differ.
    """
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(f"{name} is on {tensor.device}, {first[0]} on {first[1]}; move them to one device")


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number`` (and at least 1).

    Args:
        number: any integer.

    Returns:
        The power of two.
    """
    return 1 << max(0, number - 1).bit_length()


def device_guard(tensor: Tensor) -> Any:
    """Make the tensor's GPU current while kernels are launched; nothing for a CPU tensor.

    Args:
        tensor: a tensor on the device where the kernels are to run.

    Returns:
        A context manager.
    """
    return torch.cuda.device_of(tensor)


@triton.jit
def dot(a, b, total):
    """Matrix product added to ``total`` (fp32), in three tf32 passes for fp32 factors.

    The interpreter keeps bfloat16 as bits in an integer and would multiply those, so it gets the values in fp32,
    whose products are the same.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to a narrower dtype, to nearest even as the hardware does; the interpreter would truncate bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)
