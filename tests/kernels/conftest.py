"""Fixtures of the kernel tests: the same checks run interpreted on CPU tensors and natively on a GPU."""

import os

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device whose tensors go through the Triton kernels: CPU under the interpreter, or the GPU."""
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off: on a machine with a GPU the same test runs natively")
    monkeypatch.setenv("FSR_KERNELS", "triton")
    return torch.device("cpu")


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectorised torch path, whatever the environment asks for."""
    monkeypatch.setenv("FSR_KERNELS", "torch")


@pytest.fixture
def compile_backend(triton_device: torch.device) -> str:
    """Inductor on the GPU; without one the tracing alone, which spares a C++ compile for each test."""
    return "inductor" if triton_device.type == "cuda" else "aot_eager"
