"""Fast, verified training of segmentation networks from image-level labels (Progressive Feature Self-Reinforcement)."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsr_fast.evaluation.inference import Prediction as Prediction
    from fsr_fast.evaluation.inference import segment as segment
    from fsr_fast.models import Network as Network
    from fsr_fast.models import load_network as from_pretrained
    from fsr_fast.models import load_network as load_network

    __version__: str

# Put large tensors on a CPU in pages of 2 MiB, fewer to set up; torch reads this at its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["Network", "Prediction", "__version__", "from_pretrained", "load_network", "segment"]

_HOMES = {
    "Network": ("fsr_fast.models", "Network"),
    "Prediction": ("fsr_fast.evaluation.inference", "Prediction"),
    "from_pretrained": ("fsr_fast.models", "load_network"),  # one reader for every form in which a network is stored
    "load_network": ("fsr_fast.models", "load_network"),
    "segment": ("fsr_fast.evaluation.inference", "segment"),
}


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that importing a part of the package does not import all of it.
    if name == "__version__":
        from importlib.metadata import version

        return version("fsr_fast")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
