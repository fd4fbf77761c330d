"""The pipeline on NVIDIA DALI: decoding and augmentation on a GPU, or on the CPU if there is none.

Worker processes read the files and draw the views, with the same draws as the torch pipeline, from seed and position
alone; DALI decodes each image once and crops the views; two operations follow on all of them together, one for
AutoAugment, if it is asked for, one that jitters and normalises the colours. So the stream is the same in both
pipelines, up to the rounding of the resize, and resumes with the very next sample. On a GPU nothing is copied out of
DALI's memory, and the host never waits for a stream.

DALI gets files as they are if it decodes them as Pillow does: intact JPEG and PNG, 8 bits, colour or grey. All others
(CMYK, palettes, 16 bits, TIFF, truncated files, …), and pictures with other than three colours, are decoded by the
reader processes, as for the torch pipeline, and handed over uncompressed. If DALI fails nevertheless, Pillow decides
about each image in flight, and the stream goes on from the last batch returned.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.augment import SOLARISE_THRESHOLD, View, build_policy, draw_view_at
from fsr_fast.dataloading.batch import Batch, TrainSource
from fsr_fast.dataloading.dali_graph import build_decoder, build_graph, parameter_names
from fsr_fast.dataloading.dali_policy import POLICY_STEPS, Recorder, apply_to_batch
from fsr_fast.dataloading.images import DamagedFileError, image_header
from fsr_fast.dataloading.stream import Positions, Stream, StreamLoader, read_ahead
from fsr_fast.errors import UserError
from fsr_fast.kernels import jitter_colours
from fsr_fast.kernels.colour_jitter import STEPS
from fsr_fast.kernels.learned_policy import NUMBERS

VIEWS = 2
JPEG, PNG = b"\xff\xd8", b"\x89PNG"
DECODED = b"P6"  # starts what the reader processes have decoded
JPEG_END, PNG_END, PNG_EXIF, TAIL = b"\xff\xd9", b"IEND", b"eXIf", 64


class DaliLoader(StreamLoader):
    """Training batches made by DALI.

    Args:
        dataset: training set.
        data: size of the views; number of reader processes, and of DALI's threads.
        augment: how views are drawn; RandAugment is not supported here.
        mean: of the normalisation, three values in the range 0 to 1.
        std: of the normalisation, three values > 0.
        device: where the views are made and stay.
        options: see `StreamLoader`.
    """

    def __init__(
        self,
        dataset: TrainSource,
        data: DataConfig,
        augment: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._data, self._augment = data, augment
        self._mean, self._std = mean, std
        self._graph: dict[str, Any] = {
            "views": VIEWS,
            "size": data.image_size,
            "batch_size": self._batch_size,
            "threads": max(1, data.workers),
            "device_id": (device.index or 0) if device.type == "cuda" else None,
            "colours": dataset.reading.channels == 3,
        }
        self._device = device
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._bad: dict[int, str] = {}
        self._strange: set[int] = set()  # images that Pillow decodes but DALI does not

    def _open(self, positions: Positions) -> Iterator[Batch | UserError]:
        given = 0
        while True:
            under_way: deque[_Encoded] = deque()
            try:
                for batch in self._run(positions.skip(given), under_way):
                    yield batch
                    given += 1
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if "DataLoader worker" in str(error):  # a process died; no file is to blame
                    raise
                if not self._judge(under_way):
                    yield UserError(
                        f"data.pipeline: DALI failed ({_reason(error)}); continue with --data.pipeline torch"
                    )

    def _run(self, positions: Positions, under_way: deque[_Encoded]) -> Iterator[Batch | UserError]:
        stream = Stream(self._dataset, self._seed, self._bad)
        host = _Host(stream, self._augment, self._data, self._strange)
        readers = [read_ahead(host, self._data.workers, batch_sampler=positions)]

        def feed() -> Sequence[Any]:
            encoded = next(readers[0])
            if isinstance(encoded, UserError):
                raise encoded
            under_way.append(encoded)
            return encoded.inputs()

        graph = build_graph(feed, **self._graph)
        mean, std = (torch.tensor(values, device=self._device) for values in (self._mean, self._std))
        policy = build_policy(self._augment, self._data.image_size, self._mean)
        on_gpu = self._device.type == "cuda"
        try:
            while True:
                current = torch.cuda.current_stream(self._device) if on_gpu else None
                (output,) = graph.run(current)
                pixels = torch.from_dlpack(output.as_tensor())  # (B, V, H, W, C), DALI's own memory
                encoded = under_way.popleft()
                self._bad |= encoded.bad
                changed = apply_to_batch(policy, pixels.transpose(0, 1), encoded.policy, encoded.seeds)
                views = jitter_colours(changed, encoded.steps, mean, std)
                if current is not None:
                    self._hold(pixels, current)
                for late in encoded.late:
                    picture = views[late.view, late.item]
                    picture.copy_(_finish(picture, late, mean[:, None, None], std[:, None, None]))
                labels = encoded.labels.pin_memory() if on_gpu else encoded.labels
                yield Batch(tuple(views), labels, encoded.indices, encoded.bad)
        finally:
            # DALI's graph keeps `feed` until garbage is collected. A reader that lives until then cannot tell its
            # processes to end, and waits five seconds for each.
            readers.clear()

    def _hold(self, pixels: Tensor, stream: torch.cuda.Stream) -> None:
        """Keep DALI's memory until the GPU has read it: once released, DALI reuses it, in its own stream."""
        self._held.append((stream.record_event(), pixels))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def _judge(self, under_way: deque[_Encoded]) -> bool:
        """Find the images on which DALI failed; return whether there are any."""
        found = False
        for encoded in under_way:
            for index, data in zip(encoded.indices.tolist(), encoded.files(), strict=True):
                if index in self._strange or data[: len(DECODED)].tobytes() == DECODED:
                    continue
                if not self._graph["colours"]:
                    continue  # decoded by the reader processes
                try:
                    self._dataset.reading.pixels(data.tobytes(), self._dataset.encoded(index).name)
                except DamagedFileError as error:
                    self._bad[index] = str(error)
                    found = True
                    continue
                try:
                    build_decoder(data.tobytes(), self._graph["device_id"]).run()
                except RuntimeError:
                    self._strange.add(index)
                    found = True
        return found


class _Late(NamedTuple):
    """Blur and solarisation of a view, where they were drawn."""

    view: int
    item: int
    blur: float | None  # radius in pixels
    solarise: bool


@dataclass(frozen=True)
class _Encoded:
    """Encoded images and the arguments of their views.

    Args:
        shapes: of the decoded images, (H, W, C), with other than three colours; None: files, which DALI decodes.
        data: contents of the files, or pixels, one after another.
        sizes: (B,) int64, number of bytes of each.
        numbers: arguments of DALI by name, each (B, …).
        policy: (POLICY_STEPS, V, B, NUMBERS) float64, of AutoAugment; nothing but 0 without it.
        seeds: (V, B) int64, from which it was drawn.
        steps: (V, B, S, 2) float64, of the colour jitter.
        late: blur and solarisation, which follow it.
        labels: (B, C) float32.
        indices: (B,) int64.
        bad: damaged images met so far.
    """

    shapes: list[tuple[int, int, int]] | None
    data: Tensor
    sizes: Tensor
    numbers: dict[str, Tensor]
    policy: Tensor
    seeds: Tensor
    steps: Tensor
    late: list[_Late]
    labels: Tensor
    indices: Tensor
    bad: Mapping[int, str]

    def files(self) -> list[NDArray[np.uint8]]:
        return np.split(self.data.numpy(), self.sizes.cumsum(0)[:-1].numpy())

    def inputs(self) -> list[Any]:
        files = self.files()
        if self.shapes is not None:
            files = [part.reshape(shape) for part, shape in zip(files, self.shapes, strict=True)]
        return [files, *(value.numpy() for value in self.numbers.values())]


class _Host(Dataset[Any]):
    """Encoded batches by the positions of their samples."""

    def __init__(self, stream: Stream, augment: AugmentConfig, data: DataConfig, strange: set[int]) -> None:
        self.stream, self.augment, self.strange = stream, augment, strange
        self.reading = stream.dataset.reading
        self.recorder = Recorder(data.image_size) if augment.policy == "autoaugment" else None

    def __len__(self) -> int:
        return len(self.stream.dataset)

    def __getitems__(self, positions: list[int]) -> _Encoded | UserError:
        try:
            return self._batch(positions)
        except UserError as error:  # as a value: raised in a worker, it would come with the worker's traceback
            return error

    def _batch(self, positions: list[int]) -> _Encoded:
        indices, files = zip(*(self.stream.load(position, self._file) for position in positions), strict=True)
        numbers: dict[str, Any] = {}
        policy = np.zeros((POLICY_STEPS, VIEWS, len(positions), NUMBERS))
        seeds = np.zeros((VIEWS, len(positions)), np.int64)
        steps, late = np.zeros((VIEWS, len(positions), len(STEPS) - 1, 2)), []
        for number in range(VIEWS):
            rows = []
            for item, (position, file) in enumerate(zip(positions, files, strict=True)):
                view = draw_view_at(self.stream.seed, position, number, self.augment, file.height, file.width)
                rows.append(_arguments(view))
                seeds[number, item] = view.seed
                if self.recorder is not None:
                    policy[:, number, item] = self.recorder.draw(view.seed)
                for place, (name, amount) in enumerate(view.jitter):
                    steps[number, item, place] = STEPS.index(name), amount
                if view.blur is not None or view.solarise:
                    late.append(_Late(number, item, view.blur, view.solarise))
            for name in parameter_names(number):
                numbers[name] = torch.from_numpy(np.stack([row[name.partition("@")[0]] for row in rows]))
        channels = self.reading.channels
        return _Encoded(
            None if channels == 3 else [(file.height, file.width, channels) for file in files],
            torch.from_numpy(np.frombuffer(bytearray().join(file.data for file in files), np.uint8)),
            torch.tensor([len(file.data) for file in files]),
            numbers,
            torch.from_numpy(policy),
            torch.from_numpy(seeds),
            torch.from_numpy(steps),
            late,
            torch.from_numpy(np.stack([file.labels for file in files])),
            torch.tensor(indices),
            dict(self.stream.bad),
        )

    def _file(self, index: int) -> _File:
        data, labels, name = self.stream.dataset.encoded(index)
        if self.reading.channels == 3 and data.startswith((JPEG, PNG)):
            header = image_header(data, name, self.reading.max_pixels)
            if index not in self.strange and _is_plain(data, header.format, header.mode):
                return _File(data, header.width, header.height, labels)
        pixels = self.reading.pixels(data, name)
        height, width, channels = pixels.shape
        head = DECODED + b" %d %d 255\n" % (width, height) if channels == 3 else b""
        return _File(head + pixels.tobytes(), width, height, labels)


class _File(NamedTuple):
    data: bytes
    width: int
    height: int
    labels: NDArray[np.float32]


def _arguments(view: View) -> dict[str, NDArray[Any]]:
    """Convert the draws of a view to the arguments of DALI."""
    return {
        "start": np.array([view.top, view.left], np.int32),
        "shape": np.array([view.height, view.width], np.int32),
        "left": np.array([0, view.flip], np.float32),
        "right": np.array([1, not view.flip], np.float32),
    }


def _finish(picture: Tensor, late: _Late, mean: Tensor, std: Tensor) -> Tensor:
    """Blur and solarise a normalised view (C, H, W); nothing is rounded in between."""
    if late.blur is not None:
        width, sigma = 2 * math.ceil(3 * late.blur) + 1, [late.blur] * 2
        for sides in ([width, 1], [1, width]):
            picture = F.gaussian_blur(picture, sides, sigma)
    if late.solarise:
        bright = picture * std + mean > (SOLARISE_THRESHOLD - 0.5) / 255
        picture = torch.where(bright, (1 - 2 * mean) / std - picture, picture)  # 1 - x, normalised
    return picture


def _is_plain(data: bytes, kind: str, mode: str) -> bool:
    """Return whether DALI decodes a file as Pillow does: 8 bits per channel, colour or grey, and not truncated."""
    if mode not in ("RGB", "L"):
        return False
    tail = data[-TAIL:]
    if kind == "PNG":
        return data[24] == 8 and PNG_END in tail and PNG_EXIF not in data
    return kind == "JPEG" and JPEG_END in tail


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line and "no longer valid" not in line), type(error).__name__)
