"""What the kernel tests share: the tolerance rules of the project and layouts that trip careless strides."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_close(actual: Tensor, expected: Tensor, relative: float | None = None, label: str = "") -> None:
    """Element-wise bound relative to the largest expected value; the worst element is printed.

    The bound is 1e-5 in fp32 and 1e-10 in fp64 unless ``relative`` says otherwise.
    """
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    bound = relative if relative is not None else max(RELATIVE[actual.dtype], RELATIVE[expected.dtype])
    truth = expected.detach().double()
    error = (actual.detach().double() - truth).abs()
    assert torch.isfinite(error).all(), f"{label}: not finite"
    limit = bound * max(truth.abs().max().item(), 1e-30)
    worst = int(error.argmax())
    assert error.max().item() <= limit, (
        f"{label}: element {worst} is {actual.flatten()[worst].item():.8g}, expected {truth.flatten()[worst]:.8g}; "
        f"error {error.max().item():.3g} over the bound {limit:.3g}"
    )


def assert_low_precision(actual: Tensor, low: Tensor, truth: Tensor, atol: float = 1e-5, label: str = "") -> None:
    """Error(kernel against fp32) at most twice error(low-precision torch against fp32) plus ``atol``."""
    ours = (actual.detach().double() - truth.detach().double()).abs().max().item()
    theirs = (low.detach().double() - truth.detach().double()).abs().max().item()
    assert ours <= 2 * theirs + atol, f"{label}: error {ours:.3g}, low-precision torch {theirs:.3g}, atol {atol:.3g}"


def compile_backend(device: torch.device) -> str:
    """Inductor on the GPU; without one the tracing alone, which spares a C++ compile for each test."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def leaf(tensor: Tensor) -> Tensor:
    """A fresh leaf with the same values and layout that requires a gradient."""
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def permuted(tensor: Tensor) -> Tensor:
    """The same values in memory order of the reversed dimensions (not contiguous)."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.detach().permute(order).contiguous().permute(order).requires_grad_(tensor.requires_grad)


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Iterable[Tensor], seed: int = 7) -> tuple[Tensor, ...]:
    """Gradients of random projections of the outputs, the same projections for the same shapes."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return torch.autograd.grad(outputs, list(inputs), grad_outputs=weights)


def converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves of another dtype, by the same names."""
    return {name: leaf(tensor.to(dtype)) for name, tensor in tensors.items()}
