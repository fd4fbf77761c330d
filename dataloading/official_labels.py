"""The official code's `cls_labels_onehot.npy`, a pickled dictionary of arrays, read without running what it pickles.

Nothing of a pickle is imported or called. The few names that such a file needs are answered by stand-ins that only
keep their arguments, NumPy's own included; the numbers are then taken from the bytes that were kept.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsr_fast.errors import UserError

NUMBERS = ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def read_official_labels(path: Path) -> tuple[list[str], NDArray[np.bool_]]:
    """Read the image labels of the official code.

    Args:
        path: cls_labels_onehot.npy: name of the image → (C,) of 0 and 1.

    Returns:
        The n names, and (n, C) bool, true where the image shows the class.

    Raises:
        UserError: the file holds anything else.
    """
    form = "expected a pickled dictionary from names to arrays of 0 and 1, as the official code's cls_labels_onehot.npy"
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if not dtype.hasobject or shape != ():
                raise UserError(f"{path}: holds an array of {dtype} and shape {shape}; {form}")
            content = _Unpickler(file).load()
        table = content.items()[0] if isinstance(content, _Array) else None
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table):
            raise UserError(f"{path}: {form}")
        rows = [row.numbers() for row in table.values()]
        labels = np.stack(rows)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged header or pickle raises all kinds of errors
        raise UserError(f"{path}: {type(error).__name__}: {error}; {form}") from None
    if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path}: the labels are not rows of 0 and 1; {form}")
    return list(table), labels.astype(bool)


class _Array:
    """Stands for numpy.ndarray: keeps the state of an unpickled array."""

    def __init__(self, *arguments: Any) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def items(self) -> list[Any]:
        """Return the objects of an array of objects."""
        _, _, dtype, _, content = self._state
        if not isinstance(dtype, _Dtype) or dtype.code != "O8" or not isinstance(content, list):
            raise pickle.UnpicklingError("no array of objects")
        return content

    def numbers(self) -> NDArray[Any]:
        """Return the numbers of an array of one dimension."""
        _, shape, dtype, _, content = self._state
        if not isinstance(dtype, _Dtype) or dtype.code not in NUMBERS or not isinstance(content, bytes):
            raise pickle.UnpicklingError("no array of numbers")
        values = np.frombuffer(content, np.dtype(dtype.order + dtype.code))
        if shape != values.shape:
            raise pickle.UnpicklingError(f"{len(values)} numbers for the shape {shape}")
        return values


class _Dtype:
    """Stands for numpy.dtype: keeps code and byte order."""

    def __init__(self, code: str, *arguments: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


def _encode(text: str, encoding: str) -> bytes:
    """Stand for _codecs.encode, by which old protocols write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which labels do not need: not loaded")
        return STAND_INS[module, name]
