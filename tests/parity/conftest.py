"""Both sides compute in float64, where a difference of 1e-9 tells a rounding error from a mistake.

`TRITON_INTERPRET=1 FSR_KERNELS=triton pytest tests/parity` compares Triton's kernels in float32 instead.
"""

import pytest
import torch
from torch import Tensor

from .harness import KERNELS


@pytest.fixture
def precise(monkeypatch):
    """Compute in the dtype of the comparison throughout.

    The fast path widens half precision by `.float()`, which would narrow float64, and divides whole numbers, which
    gives the default dtype.
    """
    if KERNELS:
        yield
        return
    widen = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else widen(tensor))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
