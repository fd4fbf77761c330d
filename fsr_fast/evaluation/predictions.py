"""Label maps of many images in one stream: read, pass in batches of like size, refine, one image after another."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fsr_fast.config import Config
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.evaluation.crf import CrfPool
from fsr_fast.evaluation.inference import Inference, infer_like
from fsr_fast.evaluation.official_protocol import infer_officially
from fsr_fast.evaluation.passes import largest_side, patch_sizes, scale_down, working_size
from fsr_fast.evaluation.samples import Failure, Sample, batches_of_like_size, read_samples
from fsr_fast.method.cam import merged_labels
from fsr_fast.models import Network

Kind = Literal["pseudo", "seg", "seg+crf"]
BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of the images that go through the network together, at their own resolution."""


@dataclass(frozen=True)
class Labels:
    """A label map and how sure it is."""

    labels: np.ndarray
    """(H, W), uint8: 0 background, class + 1."""
    confidence: np.ndarray | None = None
    """(H, W), float32 in 0…1, of the label given: activation or 1 - activation of the pseudo label, probability of the
    others; where asked for."""


@dataclass(frozen=True)
class Result:
    """What the network says of one image."""

    sample: Sample
    cam: np.ndarray
    """(H, W), float32, largest activation over the classes."""
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

    No more images are held than a window of readers, a batch and the processes of the CRF take.

    Args:
        network: in eval mode, on the device.
        images: where they are.
        indices: which ones.
        config: sections `evaluate`, `cam`, `data` and `run.amp`.
        device: of the network.
        kinds: which maps.
        labelled: pseudo labels show the true classes of each image; else those that the classifier finds.
        confidence: also say how sure the maps are.
    """
    stream = _Stream(network, config, device, kinds, labelled, confidence)
    scales = [*config.cam.scales, *config.evaluate.scales]
    side = largest_side(config.evaluate.side, network)
    batches = batches_of_like_size(
        read_samples(images, indices, config.data.workers),
        lambda size: patch_sizes(working_size(size, side), scales, network.encoder.patch_size),
        BATCH_PIXELS[device.type],
    )
    inferred = (item for batch in batches for item in stream.infer(batch))
    if "seg+crf" not in kinds:
        yield from (item for item, _, _ in inferred)
        return
    evaluate = config.evaluate
    pool = CrfPool(evaluate.crf_backend, device, workers=evaluate.crf_workers, images=len(indices))
    with pool:
        for item, marginals, error in pool.refine(inferred):
            if marginals is None:
                yield item if isinstance(item, Failure) else Failure(item.sample.name, f"dense CRF: {error}")
            elif isinstance(item, Result):
                yield replace(item, maps={**item.maps, "seg+crf": _strongest(marginals, confidence)})


Inferred = tuple[Result | Failure, np.ndarray | None, np.ndarray | None]
"""Result without CRF, the image and its probabilities, if the CRF is wanted."""


@dataclass(frozen=True)
class _Stream:
    network: Network
    config: Config
    device: torch.device
    kinds: Sequence[Kind]
    labelled: bool
    confidence: bool

    def infer(self, batch: list[Sample] | Failure) -> Iterator[Inferred]:
        """Pass a batch; if memory runs out or an image cannot be done, each of the rest by itself."""
        if isinstance(batch, Failure):
            yield batch, None, None
            return
        done = 0
        try:
            for sample, result in zip(batch, self._results(batch), strict=True):
                item = self._read(sample, result)
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

    def _results(self, batch: list[Sample]) -> Iterator[Inference]:
        labels = [torch.from_numpy(sample.labels).to(self.device) if self.labelled else None for sample in batch]
        evaluate, cam_scales = self.config.evaluate, self.config.cam.scales
        options: dict[str, Any] = {
            "cam_scales": cam_scales if "pseudo" in self.kinds else cam_scales[:1],  # no pass that nothing is read of
            "scales": evaluate.scales if {"seg", "seg+crf"} & set(self.kinds) else cam_scales[:1],
            "flip": evaluate.flip,
            "amp": self.config.run.amp,
        }
        if evaluate.protocol == "own":
            side = largest_side(evaluate.side, self.network)
            images = [self._normalise(scale_down(Image.fromarray(sample.image), side)) for sample in batch]
            sizes = [(sample.image.shape[0], sample.image.shape[1]) for sample in batch]
            return infer_like(self.network, images, labels, sizes=sizes, **options)
        images = [self._normalise(sample.image) for sample in batch]
        return (infer_officially(self.network, *pair, **options) for pair in zip(images, labels, strict=True))

    def _normalise(self, image: Image.Image | np.ndarray) -> Tensor:
        return self.network.normalise(torch.tensor(np.asarray(image)).permute(2, 0, 1))

    def _read(self, sample: Sample, result: Inference) -> Inferred:
        maps: dict[Kind, Labels] = {}
        cam = result.cams.values[0].amax(0)
        if not (cam.isfinite().all() and result.seg_logits.isfinite().all()):
            raise ValueError("the network's result is not finite; take an earlier checkpoint")
        if "pseudo" in self.kinds:
            threshold = self.config.evaluate.threshold
            labels = merged_labels(result.cams, high=threshold, low=threshold)[0]
            sure = torch.where(labels == 0, 1 - cam, cam).cpu().numpy() if self.confidence else None
            maps["pseudo"] = Labels(labels.to(torch.uint8).cpu().numpy(), sure)
        if "seg" in self.kinds:
            best = result.seg_logits[0].softmax(0).max(0) if self.confidence else result.seg_logits[0].max(0)
            sure = best.values.cpu().numpy() if self.confidence else None
            maps["seg"] = Labels(best.indices.to(torch.uint8).cpu().numpy(), sure)
        item = Result(sample, cam.cpu().numpy(), result.class_logits[0].cpu().numpy(), maps)
        if "seg+crf" not in self.kinds:
            return item, None, None
        return item, sample.image, result.seg_logits[0].softmax(0).cpu().numpy()


def _strongest(marginals: np.ndarray, confidence: bool) -> Labels:
    return Labels(marginals.argmax(0).astype(np.uint8), marginals.max(0) if confidence else None)
