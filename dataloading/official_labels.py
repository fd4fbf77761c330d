"""The official code's `cls_labels_onehot.npy`, a pickled dictionary of arrays, read without running what it pickles.

Other projects write the same with numbers instead of names, as IRN's `cls_labels.npy` does for VOC: 2007000032 for
`2007_000032`. Numbers of that form are converted; for any other, a template must say how they become names.

Nothing in a pickle is imported or called. The few names that such a file needs are replaced by stand-ins that only
keep their arguments, NumPy's own included; the numbers are then read from the stored bytes.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError

VOC_NUMBER = re.compile(r"20\d{8}")
NUMBERS = ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def read_official_labels(
    path: Path, template: str | None = None, notes: Notes | None = None
) -> tuple[list[str], NDArray[np.bool_]]:
    """Read the image labels of the official code.

    Args:
        path: cls_labels_onehot.npy: name of the image → (C,) of 0 and 1.
        template: how numbers become names, such as `COCO_train2014_{:012d}`; None: only VOC's are known.
        notes: records what was inferred.

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
        if not isinstance(table, dict) or not table:
            raise UserError(f"{path}: {form}")
        names = _name_all(list(table), template, path, notes or Notes())
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
    return names, labels.astype(bool)


def _name_all(keys: list[Any], template: str | None, path: Path, notes: Notes) -> list[str]:
    """Return the names of the images, which may be written as numbers."""
    if all(isinstance(key, str) for key in keys):
        return keys
    if not all(isinstance(key, int) and key >= 0 for key in keys):
        raise UserError(f"{path}: its keys are neither names nor numbers, but such as {keys[0]!r}")
    if template is not None:
        try:
            return [template.format(key) for key in keys]
        except (ValueError, LookupError) as error:
            raise UserError(
                f"--names: {template!r}: {error}; expected something like 'COCO_train2014_{{:012d}}'"
            ) from None
    if not all(VOC_NUMBER.fullmatch(str(key)) for key in keys):
        raise UserError(
            f"{path}: its keys are numbers, such as {keys[0]}, which do not tell the names of the pictures; "
            "give them by --names 'COCO_train2014_{:012d}'"
        )
    notes.add(f"{path.name}: numbers are read as PASCAL VOC's names", f"{keys[0]}: {_voc_name(keys[0])}")
    return [_voc_name(key) for key in keys]


def _voc_name(number: int) -> str:
    return f"{str(number)[:4]}_{str(number)[4:]}"


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
            raise pickle.UnpicklingError("not an array of objects")
        return content

    def numbers(self) -> NDArray[Any]:
        """Return the numbers of an array of one dimension."""
        _, shape, dtype, _, content = self._state
        if not isinstance(dtype, _Dtype) or dtype.code not in NUMBERS or not isinstance(content, bytes):
            raise pickle.UnpicklingError("not an array of numbers")
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


def _scalar(dtype: Any, content: Any = b"") -> int:
    """Stand for numpy.core.multiarray.scalar: a whole number."""
    if not isinstance(dtype, _Dtype) or dtype.code not in NUMBERS or not isinstance(content, bytes):
        raise pickle.UnpicklingError("no number")
    (value,) = np.frombuffer(content, np.dtype(dtype.order + dtype.code))
    return int(value)


STAND_INS = {
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
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
