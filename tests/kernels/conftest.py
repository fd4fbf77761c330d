"""Fixtures of the kernel tests: the same checks run interpreted on CPU tensors and natively on a GPU."""

import os

import pytest
import torch

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def choose(path: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Have the operations take a path; return the device of its tensors."""
    if path == "cuda":
        return torch.device("cuda")
    if path == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off: on a machine with a GPU the same test runs natively")
    monkeypatch.setenv("FSR_KERNELS", "torch" if path == "torch" else "triton")
    return torch.device("cpu")


@pytest.fixture(params=["torch", "interpreter", CUDA])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of every path in turn: vectorised torch on the CPU, the kernels interpreted, the kernels on the GPU."""
    return choose(request.param, monkeypatch)


@pytest.fixture(params=["interpreter", CUDA])
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device whose tensors go through the Triton kernels: CPU under the interpreter, or the GPU."""
    return choose(request.param, monkeypatch)


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectorised torch path, whatever the environment asks for."""
    choose("torch", monkeypatch)
