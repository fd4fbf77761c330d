"""Training images that show no class, and the balance of those that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from fsr_fast.config import DataConfig
from fsr_fast.dataloading.layout import Split
from fsr_fast.errors import UserError

HANDFUL = 5
"""Number of images below which a class is warned about."""


def keeps_negatives(config: DataConfig) -> bool | None:
    """Return whether images that show no class are trained on (True), left out (False), or refused (None)."""
    if config.negatives != "auto":
        return config.negatives
    return True if config.dataset == "own" or config.labels == "masks" else None


def no_label(split: Split, name: str, count: str) -> UserError:
    """Return the error for a training image without a label, which can mean two things."""
    return UserError(
        f"{split.origin}: the training image {name!r} has no label{count}; label it, or say what that means: "
        "--data.negatives true (train on it as background alone) or false (leave it out)"
    )


def balance_warnings(classes: Sequence[str], shown: NDArray[Any], count: int) -> list[str]:
    """Return warnings about the balance of the training images.

    Args:
        classes: names of the C classes.
        shown: (C,), number of images that show each.
        count: number of images.
    """
    warnings = []
    for name, number in zip(classes, shown, strict=True):
        if number == 0:
            warnings.append(f"no training image shows {name!r}: it cannot be learned")
        elif number < HANDFUL:
            those = "1 training image shows" if number == 1 else f"{int(number)} training images show"
            warnings.append(f"{those} {name!r}: too few to learn it; give {HANDFUL} or more")
        if number == count:
            warnings.append(
                f"every training image shows {name!r}: from image labels alone it cannot be told from what surrounds "
                "it; add images without it, if necessary with an empty label"
            )
    return warnings
