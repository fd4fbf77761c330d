"""Self-attention of the encoder over packed images of several sizes, behind one function."""

import functools
import importlib.util
import logging
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.errors import UserError

Groups = tuple[tuple[int, int], ...]
"""Packed images: (images, tokens per image) of each size in turn."""
Backend = Literal["sdpa", "xformers", "varlen"]

logger = logging.getLogger(__name__)


class Backends(NamedTuple):
    """How each kind of pass computes its attention."""

    single: Backend
    """In training, images of one size."""
    packed: Backend
    """In training, images of several sizes."""
    evaluation: Backend
    """Outside training, where nearly every image has another size: one that plans nothing per size."""


def attend(query: Tensor, key: Tensor, value: Tensor, groups: Groups, backend: Backend, packing: Any = None) -> Tensor:
    """Compute softmax(QKᵀ/√d)V within each image.

    Args:
        query: (T, heads, d), floating point; the tokens of all images, one after another, T = Σ images·tokens.
        key: like `query`.
        value: like `query`.
        groups: sizes of the images in T.
        backend: `sdpa`, torch's own, one call per size; `xformers`, one call with a block-diagonal mask; `varlen`,
            torch's own for sequences of any length, one call, CUDA and half precision only.
        packing: from `describe_packing`; None: it is made here, which a compiled block should avoid, since its
            tensors would be made and copied in every call.

    Returns:
        (T, heads·d), in the dtype of `value`.
    """
    packing = describe_packing(groups, backend, query.device) if packing is None else packing
    if backend == "xformers":
        return _attend_xformers(query, key, value, groups, packing)
    if backend == "varlen":
        return _attend_varlen(query, key, value, groups, packing)
    sizes = [images * tokens for images, tokens in groups]
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), groups, strict=True)
    mixed = [_attend_sdpa(images, *part) for *part, (images, _) in parts]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def describe_packing(groups: Groups, backend: Backend, device: torch.device) -> Any:
    """Return what a backend's operator needs to know about packed images: a mask, boundaries, or nothing."""
    if backend == "xformers" and len(groups) > 1:  # images of one size are a batch and need no mask
        return block_diagonal_mask(groups, device)
    return boundaries(groups, device) if backend == "varlen" else None


def choose_backend(wanted: str, device: torch.device, half: bool) -> Backend:
    """Choose how attention is computed.

    `auto` uses sdpa on a CPU, where it is the only one, and in full precision; for half precision on a GPU it uses
    xformers where that is installed. A training calls `fastest_backend` instead.

    Args:
        wanted: `run.attention` of the configuration.
        device: of the passes.
        half: whether they run in half precision.

    Raises:
        UserError: the backend cannot run there; names those that can.
    """
    if wanted == "auto":
        return "xformers" if device.type == "cuda" and half and _admit_xformers() else "sdpa"
    if wanted != "sdpa" and device.type != "cuda":
        raise UserError(f"run.attention: {wanted!r} has no operator for {device.type}; expected 'sdpa' or 'auto'")
    if wanted == "xformers" and not importlib.util.find_spec("xformers"):
        raise UserError("run.attention: 'xformers' is not installed; pip install xformers, or --run.attention sdpa")
    if wanted == "xformers" and not _admit_xformers():
        raise UserError("run.attention: 'xformers' has no operator for this torch; --run.attention sdpa, or varlen")
    if wanted == "varlen":
        if not importlib.util.find_spec("torch.nn.attention.varlen"):
            raise UserError(f"run.attention: torch {torch.__version__} has no 'varlen'; expected 'sdpa' or 'xformers'")
        if not half:
            raise UserError("run.attention: 'varlen' needs half precision; --run.amp bf16, or --run.attention sdpa")
    if wanted not in get_args(Backend):
        raise UserError(f"run.attention: {wanted!r}; expected one of {', '.join(get_args(Backend))}, or auto")
    return cast(Backend, wanted)


def fastest_backend(groups: Groups, heads: int, width: int, device: torch.device, *, gradient: bool) -> Backend:
    """Measure which backend is the fastest on a GPU in bfloat16.

    Args:
        groups: sizes of the packed images.
        heads: number of attention heads.
        width: d, of a head.
        device: a GPU.
        gradient: measure the backward pass, too.
    """
    from triton.testing import do_bench

    total = sum(images * tokens for images, tokens in groups)
    generator = torch.Generator(device).manual_seed(
        0
    )  # its own, so that the run's draws do not depend on a measurement
    qkv = torch.randn(3, total, heads, width, device=device, dtype=torch.bfloat16, generator=generator)
    qkv.requires_grad_(gradient)
    times: dict[Backend, float] = {}
    for backend in _half_precision_backends():

        def call(backend: Backend = backend) -> None:
            with torch.set_grad_enabled(gradient):
                query, key, value = qkv.unbind()
                mixed = attend(query, key, value, groups, backend)
            if gradient:
                mixed.backward(torch.ones_like(mixed))

        try:
            times[backend] = do_bench(call, warmup=5, rep=20, grad_to_none=[qkv])
        except (RuntimeError, NotImplementedError) as error:  # it has no operator for this GPU
            logger.info("attention: %s cannot run here: %s", backend, error)
    found = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    logger.info("attention of images times tokens %s%s: %s", groups, " with its gradient" * gradient, found)
    return min(times, key=lambda name: times[name])


def _half_precision_backends() -> list[Backend]:
    backends: list[Backend] = ["sdpa"]
    if _admit_xformers():
        backends.append("xformers")
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        backends.append("varlen")
    return backends


def _admit_xformers() -> bool:
    """Return whether xformers is installed and has an operator for GPUs.

    Its own library loads only with the CUDA that it was built for. Where that fails, it refuses all operators, even
    those that call torch's own and need no library: these are admitted here.
    """
    if not importlib.util.find_spec("xformers"):
        return False
    try:
        from xformers.ops.fmha import common, flash
    except ImportError:  # this torch is too new for xformers
        return False
    common._built_with_cuda = common._built_with_cuda or flash._USE_PT_FLASH_ATTN
    return bool(common._built_with_cuda)


def _attend_sdpa(images: int, *projected: Tensor) -> Tensor:
    query, key, value = (torch.unflatten(tensor, 0, (images, -1)).transpose(1, 2) for tensor in projected)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)


def _attend_xformers(query: Tensor, key: Tensor, value: Tensor, groups: Groups, mask: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    images = groups[0][0] if mask is None else 1
    query, key, value = (torch.unflatten(tensor, 0, (images, -1)) for tensor in (query, key, value))
    mixed: Tensor = memory_efficient_attention(query, key, value, attn_bias=mask)
    return mixed.flatten(2).flatten(0, 1)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, groups: Groups, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(tokens for _, tokens in groups)
    mixed = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    assert isinstance(mixed, Tensor)
    return mixed.flatten(1)


@functools.lru_cache(maxsize=64)
def block_diagonal_mask(groups: Groups, device: torch.device) -> Any:
    """Return xformers' mask of packed images: each token attends to those of its own image."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(_lengths(groups), device=device)


@functools.lru_cache(maxsize=64)
def boundaries(groups: Groups, device: torch.device) -> Tensor:
    """Return the position of each packed image's first token, and the end: (images + 1,), int32."""
    bounds = torch.tensor([0, *accumulate(_lengths(groups))], dtype=torch.int32, pin_memory=device.type == "cuda")
    return bounds.to(device, non_blocking=True)


def _lengths(groups: Groups) -> list[int]:
    return [tokens for images, tokens in groups for _ in range(images)]
