"""Untrusted files of tensors: none of their code is run, and no more is read than the file's size."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_tensors(path: Path, *, mmap: bool = False) -> Any:
    """Read what `torch.save` wrote: tensors and plain values.

    A few bytes can claim any amount of memory: by compression, by parts that overlap, by a tensor that repeats one
    element a trillion times. All of these are refused, and so are tensors without data.

    Args:
        path: the file.
        mmap: read the bytes of the tensors only when needed, if the file allows it.

    Raises:
        Exception: a damaged file can raise anything.
    """
    size = path.stat().st_size
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            _compare(sum(part.file_size for part in archive.infolist()), size)
    content = torch.load(path, "cpu", weights_only=True, mmap=mmap and zipped)
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            raise ValueError("holds a tensor that is not plain, with its own data")
        _compare(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return content


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part)


def _compare(claimed: int, size: int) -> None:
    if claimed > size:
        raise ValueError(f"claims to hold {claimed:,} bytes in {size:,}")
