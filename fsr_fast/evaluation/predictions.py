"""Label maps of many images in one stream: read, pass in batches of similar size, refine, one image after another."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.evaluation.crf import CrfPool
from fsr_fast.evaluation.inference import Inference, infer_like, inference_settings
from fsr_fast.evaluation.label_maps import Kind, Labels, labels_of_cams, labels_of_logits, labels_of_marginals
from fsr_fast.evaluation.large import Cut, LargePicture, plan_picture
from fsr_fast.evaluation.official_protocol import infer_officially
from fsr_fast.evaluation.passes import passing_side, patch_sizes, scale_pixels, working_size
from fsr_fast.evaluation.samples import Failure, Sample, batches_of_like_size, read_samples
from fsr_fast.models import Network

BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of the images that pass through the network together, at their own resolution."""


@dataclass(frozen=True)
class Result:
    """The network's outputs for one image."""

    sample: Sample
    cam: np.ndarray
    """(h, w), float32, largest activation over the classes; of a large picture, at every n-th pixel;
    0 if no pseudo labels are wanted."""
    class_logits: np.ndarray
    """(C,), float32, of the classifier."""
    maps: dict[Kind, Labels] = field(default_factory=dict)


def predict_images(
    network: Network,
    images: ImageSet,
    indices: Sequence[int],
    config: Config,
    device: torch.device,
    kinds: Sequence[Kind],
    *,
    labelled: bool = True,
    confidence: bool = False,
) -> Iterator[Result | Failure]:
    """Return the label maps of images, each once, in an order that depends on their sizes.

    Only as many images are held as the readers' window, a batch and the processes of the CRF need.

    Args:
        network: in eval mode, on the device.
        images: the data set.
        indices: which ones.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        device: of the network.
        kinds: which maps.
        labelled: pseudo labels show the true classes of each image; else those that the classifier finds.
        confidence: also return the confidence of the maps.
    """
    evaluate = config.evaluate
    pool = None
    if "seg+crf" in kinds:
        pool = CrfPool(evaluate.crf_backend, device, workers=evaluate.crf_workers, images=len(indices))
    stream = _Stream(network, config, device, kinds, labelled, confidence, pool)
    scales = [*config.cam.scales, *evaluate.scales]
    side = passing_side(evaluate, network)

    def alike(size: tuple[int, int]) -> Hashable:
        large = plan_picture(evaluate, network, size) is not None
        return large, patch_sizes(working_size(size, side), scales, network.encoder.patch_size)

    samples = read_samples(images, indices, config.data.workers)
    batches = batches_of_like_size(samples, alike, BATCH_PIXELS[device.type])
    inferred = (item for batch in batches for item in stream.infer(batch))
    if pool is None:
        yield from (item for item, _, _ in inferred)
        return
    with pool:
        for item, marginals, error in pool.refine(inferred):
            if isinstance(item, Failure) or "seg+crf" in item.maps:
                yield item
            elif marginals is None:
                yield Failure(item.sample.name, f"dense CRF: {error}")
            else:
                found = labels_of_marginals(marginals, confidence=confidence)
                yield replace(item, maps={**item.maps, "seg+crf": found})


Inferred = tuple[Result | Failure, np.ndarray | None, np.ndarray | None]
"""Result without CRF; the image and its probabilities, if the CRF is wanted."""


@dataclass(frozen=True)
class _Stream:
    network: Network
    config: Config
    device: torch.device
    kinds: Sequence[Kind]
    labelled: bool
    confidence: bool
    pool: CrfPool | None

    def infer(self, batch: list[Sample] | Failure) -> Iterator[Inferred]:
        """Pass a batch; if memory runs out or an image fails, pass each of the rest by itself."""
        if isinstance(batch, Failure):
            yield batch, None, None
            return
        done = 0
        try:
            for item in self._infer(batch):
                done += 1
                yield item
            return
        except (RuntimeError, ValueError, MemoryError) as error:
            message = f"{type(error).__name__}: {error}"
        if len(batch) == 1:
            yield Failure(batch[0].name, message), None, None
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for sample in batch[done:]:
            yield from self.infer([sample])

    def _infer(self, batch: list[Sample]) -> Iterator[Inferred]:
        cuts = [plan_picture(self.config.evaluate, self.network, sample.image.shape[:2]) for sample in batch]
        if cuts[0] is None:
            for sample, result in zip(batch, self._results(batch), strict=True):
                yield self._read(sample, result)
            return
        for sample, cut in zip(batch, cuts, strict=True):
            assert cut is not None  # a batch is of one kind
            yield self._infer_large(sample, cut), None, None

    def _infer_large(self, sample: Sample, cut: Cut) -> Result:
        picture = LargePicture(
            self.network,
            sample.pixels,
            cut,
            self._shown(sample),
            cams="all" if "pseudo" in self.kinds else "none",
            **{**inference_settings(self.config), "scales": self.config.evaluate.scales if self._decodes else ()},
        )
        size = (sample.image.shape[0], sample.image.shape[1])
        maps = {kind: np.empty(size, np.uint8) for kind in self.kinds}
        sure = {kind: np.empty(size if self.confidence else 0, np.float32) for kind in self.kinds}
        threshold = self.config.evaluate.threshold
        for kind, rows, found in picture.strips(self.kinds, threshold, pool=self.pool, confidence=self.confidence):
            maps[kind][rows] = found.labels
            if found.confidence is not None:
                sure[kind][rows] = found.confidence
        cam = picture.activations.preview().amax(0).numpy()
        whole = {kind: Labels(maps[kind], sure[kind] if self.confidence else None) for kind in self.kinds}
        return Result(sample, cam, picture.class_logits.cpu().numpy(), whole)

    @property
    def _decodes(self) -> bool:
        return bool({"seg", "seg+crf"} & set(self.kinds))

    def _shown(self, sample: Sample) -> Tensor | None:
        return torch.from_numpy(sample.labels).to(self.device) if self.labelled else None

    def _results(self, batch: list[Sample]) -> Iterator[Inference]:
        labels = [self._shown(sample) for sample in batch]
        evaluate, cam_scales = self.config.evaluate, self.config.cam.scales
        options: dict[str, Any] = {
            "cam_scales": cam_scales if "pseudo" in self.kinds else cam_scales[:1],  # no pass whose result is unused
            "scales": evaluate.scales if self._decodes else (),
            "flip": evaluate.flip,
            "amp": self.config.run.amp,
        }
        if evaluate.protocol == "own":
            side = passing_side(evaluate, self.network)
            images = [self._normalise(scale_pixels(sample.pixels, side)) for sample in batch]
            sizes = [(sample.image.shape[0], sample.image.shape[1]) for sample in batch]
            return infer_like(self.network, images, labels, sizes=sizes, **options)
        images = [self._normalise(sample.pixels) for sample in batch]
        return (infer_officially(self.network, *pair, **options) for pair in zip(images, labels, strict=True))

    def _normalise(self, pixels: np.ndarray) -> Tensor:
        return self.network.normalise(torch.tensor(pixels).permute(2, 0, 1))

    def _read(self, sample: Sample, result: Inference) -> Inferred:
        maps: dict[Kind, Labels] = {}
        cam = result.cams.values[0].amax(0)
        if not (_finite(cam) and _finite(result.seg_logits)):
            raise ValueError("the network's result is not finite; take an earlier checkpoint")
        if "pseudo" in self.kinds:
            maps["pseudo"] = labels_of_cams(result.cams, self.config.evaluate.threshold, confidence=self.confidence)
        if "seg" in self.kinds:
            maps["seg"] = labels_of_logits(result.seg_logits[0], confidence=self.confidence)
        item = Result(sample, cam.cpu().numpy(), result.class_logits[0].cpu().numpy(), maps)
        if "seg+crf" not in self.kinds:
            return item, None, None
        return item, sample.image, result.seg_logits[0].softmax(0).cpu().numpy()


def _finite(values: Tensor) -> bool:
    """Return whether all values are finite, in one pass: the extremes are NaN where a value is."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())
