"""Where shards may be: in a folder, or in one of the documented object stores.

fsspec opens far more: archives within archives, reference files whose templates are evaluated, hosts of a dozen
protocols. A configuration may come from an untrusted checkpoint, so only what is listed here is opened.
"""

from __future__ import annotations

from typing import Any

import fsspec

from fsr_fast.errors import UserError, nearest

STORES = ("file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf")
CACHES = ("simplecache", "filecache", "blockcache")
"""Caches on this machine; the only prefixes allowed before an address, as in `simplecache::s3://…`."""


def open_store(root: str) -> tuple[Any, str]:
    """Open a folder or an address.

    Args:
        root: folder, or URL of `STORES`, optionally with one of `CACHES` before it.

    Returns:
        File system of fsspec, and the folder in it.

    Raises:
        UserError: an address of another kind.
        ImportError: fsspec lacks a package for the store.
        ValueError: the address does not parse.
    """
    if "://" not in root:
        return fsspec.filesystem("file"), root  # its name may hold any characters
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
