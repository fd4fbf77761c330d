"""Both sides compute in float64, where a tolerance of 1e-9 separates rounding errors from mistakes.

`TRITON_INTERPRET=1 FSR_KERNELS=triton pytest tests/parity` compares Triton's kernels in float32 instead.
"""

from contextlib import nullcontext

import pytest

from tests.helpers import float64

from .harness import KERNELS


@pytest.fixture
def precise():
    """Compute in the dtype of the comparison throughout."""
    with nullcontext() if KERNELS else float64():
        yield
