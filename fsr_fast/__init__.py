"""Fast, verified training of segmentation networks from image-level labels (Progressive Feature Self-Reinforcement)."""

import os
from typing import Any

# Large tensors of a CPU in pages of 2 MiB, which are fewer to set up; torch asks for this at its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread that waits for another polls about 0.2 ms and then sleeps. OpenMP's own limit is 30 times as long: where
# another program takes a core, threads poll for each other and the computation all but stops. Read as torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["from_pretrained", "load_network", "segment"]


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that importing a part of the package does not import all of it.
    if name in ("load_network", "from_pretrained"):  # one reader for all that a network may be stored as
        from fsr_fast.models import load_network

        return load_network
    if name == "segment":
        from fsr_fast.evaluation.inference import segment

        return segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
