"""Inference on a picture of any size: tiles pass through the network, and the result comes out in bands of rows.

The memory does not grow with the height of the picture: it holds the tiles of the rows that overlap, on the
network's own grids, and one band of pixels. Class activation maps are normalised by their minimum and maximum over the
whole picture (METHOD, "Class activation maps"), which are known only at the end: until then they wait in a temporary
file, and the network passes over the picture once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast.config import EvaluateConfig
from fsr_fast.dataloading.arrays import Pixels
from fsr_fast.dataloading.regions import read_scaled
from fsr_fast.evaluation.activations import Activations
from fsr_fast.evaluation.crf import CrfPool
from fsr_fast.evaluation.label_maps import Kind, Labels, labels_of_cams, labels_of_logits, labels_of_marginals
from fsr_fast.evaluation.passes import Passed, largest_side, pass_scales, passing_side, run_trunk, working_size
from fsr_fast.evaluation.tiling import Plan, blend, plan_tiles
from fsr_fast.kernels import present_classes
from fsr_fast.kernels.bilinear import resize_matrix
from fsr_fast.method.cam import resize_images, scaled_size
from fsr_fast.models import Network
from fsr_fast.models.encoder import Features
from fsr_fast.models.network import activate
from fsr_fast.runtime.precision import autocast

AUTO_PATCHES = 16_384
"""`evaluate.tile: auto` cuts pictures of more patches: 128 by 128, that is 2,048 pixels per side in patches of 16."""
WHOLE_PIXELS = 2**24
"""The results of larger pictures are computed in bands, even if the picture passes as a whole."""
BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of the tiles that pass through the network together."""


@dataclass(frozen=True)
class Cut:
    """How a picture passes: the tiles of the network and of the dense CRF, in the picture's own pixels."""

    network: Plan
    crf: Plan
    factor: float
    """Pixels of the picture per pixel that passes, at least 1."""


def plan_picture(evaluate: EvaluateConfig, network: Network, size: tuple[int, int]) -> Cut | None:
    """Decide how a picture passes.

    First it is scaled down to `evaluate.side`; if it is still larger than `evaluate.tile`, it is cut. With a number
    for `tile`, `side: auto` means every pixel.

    Args:
        evaluate: side, tile, overlap and protocol.
        network: determines the size of a patch.
        size: height and width of the picture.

    Returns:
        None: it passes whole, and its results are held whole.
    """
    patch, tile = network.encoder.patch_size, evaluate.tile
    if evaluate.protocol == "official":
        return None
    working = working_size(size, passing_side(evaluate, network))
    usual = largest_side("auto", network) or 0
    if tile == "auto":
        tile = usual if math.prod(-(-length // patch) for length in working) > AUTO_PATCHES else None
    cut = -(-(tile or usual) // patch) * patch
    whole = tile is None or max(working) <= cut
    if whole and math.prod(size) <= WHOLE_PIXELS:
        return None
    factor = max(size) / max(working)
    step = patch if factor == 1 else 1
    plan = plan_tiles(size, max(size) if whole else round(cut * factor), evaluate.overlap, step)
    return Cut(plan, plan_tiles(size, cut, evaluate.overlap, step), factor)


class Strip(NamedTuple):
    """Some rows of a label map."""

    kind: Kind
    rows: slice
    map: Labels


class LargePicture:
    """Inference on one picture in bands.

    Args:
        network: in eval mode.
        pixels: (H, W, 3) uint8, or anything sliced likewise; regions are read when needed.
        cut: its tiles.
        labels: (C,), 0 or 1, classes whose CAMs are wanted; None: the likeliest, and all that are likelier than not,
            which takes an extra pass at the first scale.
        cam_scales: scales of the CAMs; the first is 1.0.
        scales: scales of the segmentation.
        flip: add the mirror image to the segmentation; the CAMs always do.
        amp: as in `infer`.
        cams: what is kept of the CAMs: nothing, a preview, or maps to be read back.

    Attributes:
        class_logits: (C,), of the classifier over all tiles; complete once the bands have been drawn.
        activations: the CAMs, likewise.
    """

    def __init__(
        self,
        network: Network,
        pixels: Pixels,
        cut: Cut,
        labels: Tensor | None,
        *,
        cam_scales: Sequence[float],
        scales: Sequence[float],
        flip: bool,
        amp: str,
        cams: Literal["none", "preview", "all"] = "preview",
    ) -> None:
        self._network, self._pixels, self._cut = network, pixels, cut
        self._cam_scales = cam_scales[:1] if cams == "none" else cam_scales
        self._scales, self._flip, self._amp = scales, flip, amp
        self._device = network.top_classifier.weight.device
        self._peak = torch.full((network.encoder.width,), -math.inf, device=self._device)
        if labels is None or not (scales or cams != "none"):
            self._look()
        if labels is None:
            found = self.class_logits
            labels = ((found == found.amax()) | (found > 0)).float()
        count = max(1, int(labels.sum()))
        (classes,), (live,) = present_classes(labels[None].to(self._device), max_classes=count)
        size = cut.network.size
        self.activations = Activations(size, classes.cpu(), live.cpu(), keep=cams == "all")
        self._slots = None if cams == "none" else classes

    @property
    def class_logits(self) -> Tensor:
        """(C,), of the classifier on the largest features of the tiles that have passed."""
        with torch.no_grad(), autocast(self._device, self._amp):
            return F.linear(self._peak, self._network.top_classifier.weight.flatten(1)).float()

    def scores(self) -> dict[str, float]:
        """Return the probability that the picture shows the class, by name."""
        return dict(zip(self._network.classes, self.class_logits.sigmoid().tolist(), strict=True))

    @torch.no_grad()
    def bands(self) -> Iterator[tuple[slice, Tensor]]:
        """Run the network, from the top of the picture to its bottom.

        Returns:
            Rows, and the logits of the segmentation there, (C+1, h, W), float32; nothing without scales.

        Raises:
            ValueError: the network's result is not finite.
        """
        decoded = len(self._network.classes) + 1 if self._scales else 0
        activated = 0 if self._slots is None else len(self._slots)
        if not decoded + activated:
            return
        for rows, values in blend(self._cut.network, self._tiles(), decoded + activated, self._device):
            if not values.isfinite().all():
                raise ValueError("the network's result is not finite; take an earlier checkpoint")
            if activated:
                self.activations.add(rows, values[decoded:])
            yield rows, values[:decoded]

    def strips(
        self, kinds: Sequence[Kind], threshold: float, *, pool: CrfPool | None = None, confidence: bool = False
    ) -> Iterator[Strip]:
        """Compute label maps. The strips of a kind come in order, those of pseudo labels after all others.

        Args:
            kinds: which label maps.
            threshold: background score of the pseudo labels.
            pool: of the dense CRF, if a kind needs it.
            confidence: also return the confidence of the maps.
        """
        ready: deque[Strip] = deque()

        def decoded() -> Iterator[tuple[slice, Tensor]]:
            for rows, logits in self.bands():
                if "seg" in kinds:
                    ready.append(Strip("seg", rows, labels_of_logits(logits, confidence=confidence)))
                yield rows, logits

        if "seg+crf" in kinds:
            assert pool is not None
            channels = len(self._network.classes) + 1
            for rows, marginals in blend(self._cut.crf, self._refine(decoded(), pool), channels, torch.device("cpu")):
                ready.append(Strip("seg+crf", rows, labels_of_marginals(marginals.numpy(), confidence=confidence)))
                while ready:
                    yield ready.popleft()
        else:
            for _ in decoded():
                while ready:
                    yield ready.popleft()
        if "pseudo" in kinds:
            for rows, cams in self.activations.bands():
                yield Strip("pseudo", rows, labels_of_cams(cams, threshold, confidence=confidence))

    def _look(self) -> None:
        """Pass the tiles at the first scale, only for the classifier."""
        for images in self._batches():
            size = scaled_size(
                (images.shape[-2], images.shape[-1]), self._cam_scales[0], self._network.encoder.patch_size
            )
            with torch.no_grad(), autocast(self._device, self._amp):
                self._see(run_trunk(self._network, [resize_images(images, size)])[0].tokens)

    def _see(self, tokens: Tensor) -> None:
        self._peak = self._peak.maximum(self._network.encoder.norm(tokens).amax((0, 1)).float())

    def _tiles(self) -> Iterator[_Tile]:
        size = (self._cut.network.rows.side, self._cut.network.columns.side)
        for images in self._batches():
            with autocast(self._device, self._amp):
                passed = pass_scales(self._network, [images], self._cam_scales, self._scales, self._flip)
                self._see(passed.cams[0].plain.tokens)
                tiles = [self._read_off(passed.take(index), size) for index in range(len(images))]
            yield from tiles

    def _read_off(self, passed: Passed, size: tuple[int, int]) -> _Tile:
        cams: list[tuple[Tensor, Tensor]] = []
        if self._slots is not None:
            for pair in passed.cams:
                plain, mirrored = (self._activate(features)[0, self._slots].float().relu() for features in pair)
                cams.append((plain, mirrored.flip(-1)))
        return _Tile([logits[0] for logits in passed.logits], cams, size)

    def _activate(self, features: Features) -> Tensor:
        return activate(self._network.encoder.norm(features.tokens), self._network.top_classifier, features.grid)

    def _batches(self) -> Iterator[Tensor]:
        """Read the tiles, normalised, at the size of the pass: (B, 3, h, w)."""
        rows, columns = self._cut.network.rows.side, self._cut.network.columns.side
        height, width = (max(1, round(length / self._cut.factor)) for length in (rows, columns))
        count = max(1, BATCH_PIXELS[self._device.type] // (height * width))
        regions = self._cut.network.regions()
        while group := list(islice(regions, count)):
            images = [torch.tensor(read_scaled(self._pixels, *region, (height, width))) for region in group]
            yield self._network.normalise(torch.stack(images).permute(0, 3, 1, 2))

    def _refine(self, bands: Iterator[tuple[slice, Tensor]], pool: CrfPool) -> Iterator[_Pixels]:
        for _, marginals, error in pool.refine(self._windows(bands)):
            if marginals is None:
                raise RuntimeError(f"dense CRF: {error}")
            yield _Pixels(torch.from_numpy(marginals))

    def _windows(self, bands: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[None, np.ndarray, np.ndarray]]:
        """Cut the CRF's tiles out of picture and blended segmentation: pixels and probabilities."""
        plan = self._cut.crf
        held: list[tuple[slice, Tensor]] = []
        for rows in map(plan.rows.slice, range(len(plan.rows))):
            held = [band for band in held if band[0].stop > rows.start]
            while not held or held[-1][0].stop < rows.stop:
                held.append(next(bands))
            first = rows.start - held[0][0].start
            logits = torch.cat([values for _, values in held], 1)[:, first : first + plan.rows.side]
            for columns in map(plan.columns.slice, range(len(plan.columns))):
                shown = self._network.reading.colours(self._pixels[rows, columns])
                yield None, shown, logits[:, :, columns].softmax(0).cpu().numpy()


@dataclass(frozen=True)
class _Tile:
    """The network's outputs for a tile, on the grids of its scales; resized only where a band needs it."""

    logits: list[Tensor]
    """(C+1, h, w) per scale, to be merged by the maximum."""
    cams: list[tuple[Tensor, Tensor]]
    """(M, h, w) of the tile and of its mirror image per scale, to be merged by the maximum, then added."""
    size: tuple[int, int]

    def band(self, rows: slice) -> Tensor:
        parts = []
        if self.logits:
            parts.append(reduce(torch.maximum, (_resize(one, self.size, rows) for one in self.logits)))
        if self.cams:
            pairs = ([_resize(one, self.size, rows) for one in pair] for pair in self.cams)
            parts.append(reduce(torch.add, (plain.maximum(mirrored) for plain, mirrored in pairs)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Pixels:
    values: Tensor

    def band(self, rows: slice) -> Tensor:
        return self.values[:, rows]


def _resize(values: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """Resize maps (K, h, w) bilinearly to `size`, and return some rows of the result."""
    down = _matrix(values.shape[-2], size[0], values.dtype, values.device)[:, rows].T
    return (down @ values) @ _matrix(values.shape[-1], size[1], values.dtype, values.device)


@lru_cache(maxsize=32)
def _matrix(length: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return resize_matrix(torch.empty(0, dtype=dtype, device=device), length, pixels)
