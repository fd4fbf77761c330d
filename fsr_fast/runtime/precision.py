"""Where mixed precision applies, and how fast the device multiplies in it."""

import time

import torch

DENSE_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""bfloat16 operations a second without sparsity, by what a GPU's name holds. Source: NVIDIA's data sheets."""


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return a context in which matrix products run in bfloat16, if `run.amp` says so.

    Args:
        device: of the passes.
        amp: `auto` (bfloat16 on a GPU only), `off` or `bf16`.

    Enter it separately for passes with and without gradient: weights cast inside stay cached until it ends, and a cast
    made without gradient would detach the weight.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_half(device, amp))


def uses_half(device: torch.device, amp: str) -> bool:
    """Return whether `autocast` runs matrix products in bfloat16."""
    return amp == "bf16" or (amp == "auto" and device.type == "cuda")


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 products are faster than float32: on GPUs, and on CPUs with instructions for them."""
    if device.type == "cuda":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()


def dense_peak(device: torch.device, amp: str) -> float | None:
    """Return the data sheet's operations a second in half precision; None: not known, or full precision.

    Args:
        device: of the passes.
        amp: as in `autocast`.
    """
    if device.type != "cuda" or not uses_half(device, amp):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_PEAKS.items() if part in name), None)


def measure_ceiling(device: torch.device, amp: str) -> float:
    """Measure the floating-point operations per second of a large matrix product; takes well under a second.

    Args:
        device: of the passes.
        amp: as in `autocast`; decides the dtype of the product.
    """
    dtype = torch.bfloat16 if uses_half(device, amp) else torch.float32
    side = 8192 if device.type == "cuda" else 1024
    if dtype == torch.bfloat16 and not has_fast_bf16(device):
        side = 256  # without bf16 instructions the larger product takes seconds
    generator = torch.Generator(device).manual_seed(0)  # its own, so that the run's draws stay the same
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()  # the first call initialises the library
    return 2 * side**3 / min(seconds() for _ in range(5))
