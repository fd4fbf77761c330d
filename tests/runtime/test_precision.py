import pytest
import torch

from fsr_fast.runtime.precision import dense_peak


@pytest.mark.parametrize(
    ("name", "amp", "peak"),
    [
        ("NVIDIA H200", "auto", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "auto", 756e12),
        ("NVIDIA H200", "off", None),
        ("NVIDIA GeForce GTX 1080", "auto", None),
    ],
)
def test_the_dense_peak_is_that_of_the_data_sheet(monkeypatch, name, amp, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert dense_peak(torch.device("cuda"), amp) == peak


def test_a_cpu_has_no_dense_peak():
    assert dense_peak(torch.device("cpu"), "bf16") is None
