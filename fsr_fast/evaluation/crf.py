"""The fully connected CRF (Krähenbühl and Koltun) that sharpens the decoder's result at test time."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import numpy as np

from fsr_fast.errors import UserError

if TYPE_CHECKING:
    import torch

Backend = Literal["pydensecrf", "exact"]
Item = TypeVar("Item")
NEGLIGIBLE = 1e-4


def dense_crf(
    image: np.ndarray,
    probabilities: np.ndarray,
    *,
    backend: Backend = "pydensecrf",
    device: torch.device | str = "cpu",
    iterations: int = 10,
    gaussian_weight: float = 1.0,
    gaussian_sigma: float = 1.0,
    bilateral_weight: float = 4.0,
    bilateral_sigma_xy: float = 121.0,
    bilateral_sigma_rgb: float = 5.0,
) -> np.ndarray:
    """Run mean-field inference of a CRF whose edges join every pair of pixels.

    Args:
        image: (H,W,3) uint8, RGB.
        probabilities: (C+1,H,W) float32, softmax over the classes; values below 1e-5 count as 1e-5.
        backend: `pydensecrf` filters by a permutohedral lattice, an approximation, and leaves out classes that are
            nowhere likelier than 1e-4 (its time grows with the classes; their result is 0); `exact` filters by exact
            Gaussians, which takes a CPU core more than a minute per photograph.
        device: where `exact` computes.
        iterations: mean-field iterations.
        gaussian_weight: weight of the smoothness term.
        gaussian_sigma: its width, in pixels.
        bilateral_weight: weight of the appearance term.
        bilateral_sigma_xy: its width in space, in pixels.
        bilateral_sigma_rgb: its width in colour, of 0 to 255.

    Returns:
        (C+1,H,W) float32, probabilities that sum to 1 at every pixel.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes that do not fit each other.
        UserError: pydensecrf is not installed.

    Source: paper, evaluation protocol; parameters of the official code.
    """
    _check(image, probabilities)
    if backend == "exact":
        import torch

        from fsr_fast.kernels import dense_crf as mean_field

        return (
            mean_field(
                torch.tensor(probabilities, device=device)[None],
                torch.tensor(image, device=device).permute(2, 0, 1)[None],
                iterations=iterations,
                gaussian_weight=gaussian_weight,
                gaussian_sigma=gaussian_sigma,
                bilateral_weight=bilateral_weight,
                bilateral_sigma_xy=bilateral_sigma_xy,
                bilateral_sigma_rgb=bilateral_sigma_rgb,
            )[0]
            .cpu()
            .numpy()
        )
    require_pydensecrf()
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    live = np.flatnonzero(probabilities.max((1, 2)) > NEGLIGIBLE)
    _, height, width = probabilities.shape
    field = DenseCRF2D(width, height, len(live))
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities[live])))
    field.addPairwiseGaussian(sxy=gaussian_sigma, compat=gaussian_weight)
    field.addPairwiseBilateral(
        sxy=bilateral_sigma_xy,
        srgb=bilateral_sigma_rgb,
        rgbim=np.array(image, order="C"),  # a copy, since a read-only array is refused
        compat=bilateral_weight,
    )
    marginals = np.zeros_like(probabilities, order="C")
    marginals[live] = np.array(field.inference(iterations)).reshape(len(live), height, width)
    return marginals


def require_pydensecrf() -> None:
    """Check that the package is there.

    Raises:
        UserError: it is not.
    """
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        raise UserError(
            "the dense CRF needs the package pydensecrf2, which is not installed: `pip install pydensecrf2`, "
            "or give --evaluate.crf_backend exact (best on a GPU), or leave out the CRF"
        ) from None


class CrfPool:
    """The dense CRF of many images, in processes of its own.

    Use as a context manager. While the network works on a GPU, the processes work in parallel. On a CPU, where both
    would compete for the cores, they take turns: as many images as there are processes, then the CRF of these at once.
    The exact CRF on a GPU is computed there, in this process.

    Args:
        backend: as in `dense_crf`.
        device: of the network.
        workers: number of processes; 0: only this one; None: one per CPU core available to this process.
        images: largest number of images; no more processes than that are started.
    """

    def __init__(self, backend: Backend, device: torch.device, *, workers: int | None, images: int) -> None:
        if backend == "pydensecrf":
            require_pydensecrf()
        self._backend, self._device = backend, device
        count = min(_cores() if workers is None else workers, images)
        alone = (backend == "exact" and device.type == "cuda") or images == 1 or (count == 1 and device.type == "cpu")
        self._workers = 0 if alone else count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._workers:
            context = multiprocessing.get_context("forkserver")  # forking a process with threads and CUDA may hang
            self._pool = ProcessPoolExecutor(
                self._workers, mp_context=context, initializer=_prepare, initargs=(self._backend,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def refine(
        self, items: Iterable[tuple[Item, np.ndarray | None, np.ndarray | None]]
    ) -> Iterator[tuple[Item, np.ndarray | None, Exception | None]]:
        """Refine images in order, while more are drawn from `items`.

        Args:
            items: anything, (H, W, 3) uint8 RGB, and (C+1, H, W) float32 probabilities; or anything, None and None,
                which keeps its place. At most two per process are drawn ahead.

        Returns:
            The item, its marginals (C+1, H, W) float32, and None; or the item, None, and what went wrong.

        Raises:
            UserError: a process died.
        """
        try:
            yield from self._refine(items)
        except BrokenProcessPool:
            raise UserError(
                "a process of the dense CRF died, often for lack of memory: lower --evaluate.crf_workers, or look at "
                "the kernel's log"
            ) from None

    def _refine(
        self, items: Iterable[tuple[Item, np.ndarray | None, np.ndarray | None]]
    ) -> Iterator[tuple[Item, np.ndarray | None, Exception | None]]:
        if self._device.type == "cpu":
            for turn in _in_turns(items, max(self._workers, 1)):
                yield from [_collect(*pair) for pair in [self._submit(*one) for one in turn]]
            return
        running: deque[tuple[Item, Future[np.ndarray] | None]] = deque()
        for one in items:
            running.append(self._submit(*one))
            if len(running) > 2 * self._workers:
                yield _collect(*running.popleft())
        while running:
            yield _collect(*running.popleft())

    def _submit(
        self, item: Item, image: np.ndarray | None, probabilities: np.ndarray | None
    ) -> tuple[Item, Future[np.ndarray] | None]:
        if image is None or probabilities is None:
            return item, None
        if self._pool is not None:
            return item, self._pool.submit(dense_crf, image, probabilities, backend=self._backend)
        future: Future[np.ndarray] = Future()
        try:
            future.set_result(dense_crf(image, probabilities, backend=self._backend, device=self._device))
        except _OF_THE_IMAGE as error:
            future.set_exception(error)
        return item, future


_OF_THE_IMAGE = (RuntimeError, ValueError, MemoryError)


def _collect(item: Item, future: Future[np.ndarray] | None) -> tuple[Item, np.ndarray | None, Exception | None]:
    if future is None:
        return item, None, None
    try:
        return item, future.result(), None
    except BrokenProcessPool:
        raise
    except _OF_THE_IMAGE as error:
        return item, None, error


def _prepare(backend: Backend) -> None:
    if backend == "exact":
        import torch

        torch.set_num_threads(1)


def _in_turns(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    items = iter(items)
    while turn := list(islice(items, count)):
        yield turn


def _cores() -> int:
    """Return this process's share of the machine's CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _check(image: np.ndarray, probabilities: np.ndarray) -> None:
    if image.dtype != np.uint8:
        raise TypeError(f"image is {image.dtype}; expected uint8")
    if probabilities.dtype != np.float32:
        raise TypeError(f"probabilities are {probabilities.dtype}; expected float32")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.shape}; expected (H,W,3)")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(f"probabilities are {probabilities.shape}; expected (C+1,{image.shape[0]},{image.shape[1]})")
