"""Where shards may lie: in a folder, or in one of the object stores that the documentation names.

fsspec opens far more: archives within archives, files of references whose templates are evaluated, hosts of a dozen
protocols. A configuration may come from a stranger's checkpoint, so nothing but what is listed here is opened.
"""

from __future__ import annotations

from typing import Any

import fsspec

from fsr_fast.errors import UserError, nearest

STORES = ("file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf")
CACHES = ("simplecache", "filecache", "blockcache")
"""Keep on this machine what was read; the only ones that may stand before an address, as in `simplecache::s3://…`."""


def open_store(root: str) -> tuple[Any, str]:
    """Open a folder or an address.

    Args:
        root: folder, or URL of `STORES`, with one of `CACHES` before it or not.

    Returns:
        File system of fsspec, and the folder in it.

    Raises:
        UserError: an address of another kind.
        ImportError: fsspec lacks a package for the store.
        ValueError: the address does not parse.
    """
    if "://" not in root:
        return fsspec.filesystem("file"), root  # whatever characters its name holds
    *caches, address = root.split("::")
    protocol = address.partition("://")[0] if "://" in address else ""
    for given, allowed in ((protocol, STORES), *((cache, CACHES) for cache in caches)):
        if given not in allowed:
            raise UserError(
                f"data.root: {root!r} leads through {given!r}{nearest(given, allowed)}; expected a folder, or an "
                f"address such as s3://bucket/folder or simplecache::s3://bucket/folder"
            )
    filesystem, folder = fsspec.core.url_to_fs(root)
    return filesystem, str(folder)
