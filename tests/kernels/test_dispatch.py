"""The path of an operation follows the device, or FSR_KERNELS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsr_fast.kernels.dispatch import next_power_of_2, require_shape, use_triton

ROOT = Path(__file__).parents[2]


def test_cpu_tensor_takes_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSR_KERNELS", raising=False)
    assert not use_triton(torch.zeros(1))


@pytest.mark.gpu
def test_cuda_tensor_takes_the_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSR_KERNELS", raising=False)
    assert use_triton(torch.zeros(1, device="cuda"))
    monkeypatch.setenv("FSR_KERNELS", "torch")
    assert not use_triton(torch.zeros(1, device="cuda"))


def test_kernels_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSR_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="unset FSR_KERNELS, or set TRITON_INTERPRET=1"):
        use_triton(torch.zeros(1))


def test_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSR_KERNELS", "cuda")
    with pytest.raises(ValueError, match="FSR_KERNELS is 'cuda'; expected 'torch', 'triton'"):
        use_triton(torch.zeros(1))


def test_shape_is_checked_in_rank_and_size() -> None:
    require_shape("x", torch.zeros(2, 3), ("B", 3))
    for shape in ((2, 4), ("B",), ("B", 3, "D")):
        with pytest.raises(ValueError, match=r"x has shape \(2, 3\); expected"):
            require_shape("x", torch.zeros(2, 3), shape)


def test_power_of_two_is_the_next_one() -> None:
    assert [next_power_of_2(number) for number in (0, 1, 2, 3, 25, 784, 1024)] == [1, 1, 2, 4, 32, 1024, 1024]


def test_operations_run_where_triton_is_not_installed() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from fsr_fast.kernels import affinity_sums, top_k_mask
assert top_k_mask(torch.rand(2, 9), k=4).mask.sum() == 8
assert affinity_sums(torch.rand(1, 9, 4), torch.zeros(1, 9, dtype=torch.int64)).isfinite().all()
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FSR_KERNELS")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
