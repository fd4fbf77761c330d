"""Results of `fsr-fast predict` for pictures that are written in bands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fsr_fast.config import Config
from fsr_fast.dataloading.arrays import Pixels
from fsr_fast.dataloading.label_files import write_rows
from fsr_fast.dataloading.reading import picture_size
from fsr_fast.dataloading.regions import read_scaled
from fsr_fast.dataloading.tiff import GeoTag, geo_tags
from fsr_fast.evaluation.crf import CrfPool
from fsr_fast.evaluation.inference import another_picture, inference_settings
from fsr_fast.evaluation.label_maps import Kind
from fsr_fast.evaluation.large import Cut, LargePicture, plan_picture
from fsr_fast.models import Network


class Large(NamedTuple):
    """A picture that is read by region, and its tiles."""

    pixels: Pixels
    cut: Cut
    ground: list[GeoTag]
    """GeoTIFF tags; empty without a georeference."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.cut.network.size[::-1]


def open_large(path: Path, network: Network, config: Config) -> Large | None:
    """Open a picture whose results are written in bands; TIFF and `.npy` are read by region, others are decoded here.

    Returns:
        None: its results can be held whole.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    with another_picture():
        width, height = picture_size(path, max_pixels=network.reading.max_pixels)
        cut = plan_picture(config.evaluate, network, (height, width))
        return None if cut is None else Large(network.reading.open(path), cut, geo_tags(path))


def write_large(
    folder: Path,
    name: str,
    large: Large,
    network: Network,
    config: Config,
    *,
    crf: bool,
    draw: Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray]], None],
) -> tuple[dict[str, float], np.ndarray]:
    """Segment a picture and write its mask as it becomes known.

    Args:
        folder: the mask goes to its `masks`.
        name: of the file, without extension.
        large: the picture.
        network: in eval mode.
        config: sections `evaluate`, `cam` and `run.amp`.
        crf: refine by the dense CRF.
        draw: draws picture, mask and CAMs by class, all reduced to the same size.

    Returns:
        Probability of each class, and the number of pixels of each label.
    """
    (pixels, cut, ground), evaluate = large, config.evaluate
    height, width = cut.network.size
    device = network.top_classifier.weight.device
    kind: Kind = "seg+crf" if crf else "seg"
    picture = LargePicture(network, pixels, cut, None, **inference_settings(config))
    step = picture.activations.step
    areas = np.zeros(len(network.classes) + 1, np.int64)
    parts: list[np.ndarray] = []
    workers = evaluate.crf_workers
    pool = CrfPool(evaluate.crf_backend, device, workers=workers, images=len(cut.crf)) if crf else None

    def bands() -> Iterator[np.ndarray]:
        for _, rows, found in picture.strips([kind], evaluate.threshold, pool=pool):
            areas[:] += np.bincount(found.labels.ravel(), minlength=len(areas))
            parts.append(found.labels[-rows.start % step :: step, ::step].copy())
            yield found.labels

    with pool or nullcontext():
        write_rows(folder / "masks" / name, (height, width), bands(), colours=True, tags=ground)
    mask = np.concatenate(parts)
    small = read_scaled(pixels, slice(0, height), slice(0, width), (mask.shape[0], mask.shape[1]))
    activations = picture.activations
    names = [network.classes[index] for index in activations.classes.tolist()]
    draw(network.reading.colours(small), mask, dict(zip(names, activations.preview().numpy(), strict=True)))
    return picture.scores(), areas
