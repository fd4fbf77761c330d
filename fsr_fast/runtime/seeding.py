"""Random streams: one seed, one stream per purpose and process."""

import hashlib

import torch


def stream(seed: int, *purpose: int | str) -> torch.Generator:
    """Return the generator for one purpose, e.g. `stream(seed, "step", rank, iteration)`.

    Streams of different purposes are independent; the same purpose always has the same stream.
    """
    text = ":".join(str(part) for part in (seed, *purpose))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
