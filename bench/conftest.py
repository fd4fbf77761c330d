"""Fixtures of the benches: the GPU if there is one, else the CPU at a small size."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device to measure on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
