"""Set-up before any test module is imported: without a GPU the kernels run in Triton's interpreter."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if level := os.environ.get("ATEN_CPU_CAPABILITY"):  # Inductor would take what it compiled for another level
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"fsr_fast_inductor_{level}")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def no_plugins(monkeypatch):
    """Begin with no plug-in, and forget after the test what it has registered."""
    from fsr_fast.plugins import BACKBONES, DATASETS, LOSSES

    for registry in (LOSSES, DATASETS, BACKBONES):
        monkeypatch.setattr(registry, "_found", {})
