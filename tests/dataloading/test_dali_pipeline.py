"""The two pipelines make the same views: the draws are equal, the pixels up to rounding."""

import io
import logging
import weakref
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import build, dali_graph, dali_pipeline
from fsr_fast.dataloading.batch import ImageSet
from fsr_fast.dataloading.build import build_train_loader, choose_pipeline
from fsr_fast.dataloading.dali_pipeline import DaliLoader, _is_plain
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.stream import BadFiles
from fsr_fast.dataloading.torch_pipeline import TorchLoader
from fsr_fast.errors import UserError
from tests.kernels.conftest import choose

MEAN, LEVELS = (0.4, 0.5, 0.6), (1 / 255,) * 3  # views are counted in levels of 8 bits
PLAIN = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}
NONE = {"flip": 0.0, "jitter": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


@pytest.fixture(scope="module")
def train(creatures: DataConfig) -> ImageSet:
    return build_datasets(creatures)[0]


def views(
    dataset: ImageSet, pipeline: str, augment: dict[str, Any], *, size: int = 48, batches: int = 3, **changes: Any
) -> Tensor:
    """Return the views of the first batches, (2, n, 3, H, W)."""
    data = DataConfig.model_validate({"image_size": size, "workers": 0, "pipeline": pipeline})
    options: dict[str, Any] = {
        "batch_size": 8,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "mean": MEAN,
        "std": LEVELS,
    } | changes
    stream = build_train_loader(dataset, data, AugmentConfig.model_validate(augment), **options | changes)
    return torch.cat([torch.stack(batch.views) for batch in islice(stream, batches)], 1)


def differences(dataset: ImageSet, augment: dict[str, Any], **options: Any) -> Tensor:
    """Return the mean absolute difference of each view, in levels of 8 bits."""
    first, second = (views(dataset, pipeline, augment, **options) for pipeline in ("torch", "dali"))
    return (first - second).abs().mean((2, 3, 4))


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"jitter": 1.0},
        {"jitter": 0.5, "brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5},
        {"jitter": 0.5, "policy": "autoaugment"},
    ],
    ids=["nothing", "jitter", "strong jitter", "AutoAugment"],
)
def test_an_image_that_is_neither_cropped_nor_resized_is_equal_to_the_bit(
    train: ImageSet, augment: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"size": 96, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    first, second = (views(train, pipeline, {**PLAIN, **augment}, **options) for pipeline in ("torch", "dali"))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("augment", "level"),
    [({"solarise": 0.5}, 1e-3), ({"blur": 0.5}, 1.0), ({"blur": 0.5, "solarise": 0.5, "jitter": 1.0}, 1.5)],
    ids=["solarise", "blur", "all"],
)
def test_blur_and_solarisation_follow_the_jitter(train: ImageSet, augment: dict[str, Any], level: float) -> None:
    assert differences(train, {**PLAIN, **augment}, size=96).max() < level


@pytest.mark.parametrize(
    ("augment", "level"),
    [
        (NONE, 0.5),
        ({**NONE, "flip": 0.5}, 0.5),
        ({**NONE, "jitter": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}, 0.7),
        ({**NONE, "blur": 0.5}, 1.5),
        ({**NONE, "solarise": 0.5}, 0.5),
        ({"jitter": 1.0, "contrast": 0.9, "saturation": 0.9, "hue": 0.5}, 2.0),
    ],
    ids=["crop", "flip", "jitter", "blur", "solarise", "strong jitter"],
)
def test_a_step_gives_the_pixels_of_the_torch_pipeline(train: ImageSet, augment: dict[str, Any], level: float) -> None:
    found = differences(train, augment)
    assert found.max() < level
    assert found.mean() < level / 2 + 0.05


def test_the_kernels_give_the_views_of_pillow(train: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = {"policy": "autoaugment", "jitter": 0.0}
    found = []
    for path in ("torch", "interpreter"):
        choose(path, monkeypatch)
        found.append(views(train, "dali", augment, size=32, batches=1))
    assert (found[0] - found[1]).abs().max() < 0.5  # levels


def test_the_views_of_both_pipelines_are_distributed_alike(train: ImageSet) -> None:
    """Mean, spread and colour of the views, compared as two samples of other seeds are."""

    def moments(pipeline: str, seed: int) -> Tensor:
        found = views(train, pipeline, {"blur": 0.3, "solarise": 0.1}, batches=8, seed=seed).flatten(0, 1)
        return torch.cat([found.mean((2, 3)), found.std((2, 3))], 1)

    torch_moments, dali_moments = moments("torch", 5), moments("dali", 6)
    for first, second in zip(torch_moments.T, dali_moments.T, strict=True):
        error = (first.var() / len(first) + second.var() / len(second)).sqrt()
        assert abs(first.mean() - second.mean()) < 4 * error
        assert 0.7 < first.std() / second.std() < 1.4


def test_what_dali_decodes_in_other_ways_is_left_to_pillow() -> None:
    def kinds(image: Image.Image, kind: str) -> bool:
        target = io.BytesIO()
        image.save(target, kind)
        return _is_plain(target.getvalue(), kind, image.mode)

    colour = Image.new("RGB", (4, 4))
    assert kinds(colour, "JPEG")
    assert kinds(colour.convert("L"), "PNG")
    assert not kinds(colour.convert("CMYK"), "JPEG")
    assert not kinds(colour.convert("P"), "PNG")
    assert not kinds(colour, "BMP")


@pytest.mark.parametrize(
    ("pipeline", "policy", "device", "expected"),
    [
        ("torch", "none", "cuda", ("torch", "as configured")),
        ("dali", "autoaugment", "cpu", ("dali", "as configured")),
        ("auto", "none", "cuda", ("dali", "on the GPU")),
        ("auto", "none", "cpu", ("torch", "faster than DALI on a CPU")),
        ("auto", "randaugment", "cuda", ("torch", "DALI does not know the policy randaugment")),
    ],
)
def test_the_pipeline_is_chosen_by_device_and_policy(
    pipeline: str, policy: str, device: str, expected: tuple[str, str]
) -> None:
    data = DataConfig.model_validate({"pipeline": pipeline})
    augment = AugmentConfig.model_validate({"policy": policy})
    assert choose_pipeline(data, augment, torch.device(device)) == expected


def test_dali_is_refused_where_it_cannot_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, cpu = DataConfig.model_validate({"pipeline": "dali"}), torch.device("cpu")
    with pytest.raises(UserError, match=r"does not know the policy randaugment; give --data\.pipeline torch"):
        choose_pipeline(data, AugmentConfig(policy="randaugment"), cpu)
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="NVIDIA DALI is not installed"):
        choose_pipeline(data, AugmentConfig(), cpu)
    assert choose_pipeline(DataConfig(), AugmentConfig(), torch.device("cuda"))[0] == "torch"


@pytest.mark.parametrize(("wanted", "taken"), [("auto", TorchLoader), ("dali", DaliLoader)])
def test_auto_tries_dali_and_goes_on_without_it(
    train: ImageSet, wanted: str, taken: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(dali_graph, "build_decoder", fail)
    data = DataConfig.model_validate({"pipeline": wanted})
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5, "mean": MEAN, "std": LEVELS}
    stream = build_train_loader(train, data, AugmentConfig(), device="cuda", **options)
    assert isinstance(stream, taken)
    assert ("DALI does not run here (driver too old)" in caplog.text) == (wanted == "auto")


def cpu_loader(train: ImageSet) -> DaliLoader:
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5}
    data = DataConfig.model_validate({"image_size": 32, "workers": 0})
    bad_files, device = BadFiles(None, len(train), 0.0), torch.device("cpu")
    return DaliLoader(train, data, AugmentConfig(), MEAN, LEVELS, device=device, bad_files=bad_files, **options)


def test_a_batch_takes_few_operators() -> None:
    """Decode, two crops, two resizes and their inputs."""
    graph = dali_graph.build_graph(lambda: (), views=2, size=448, batch_size=16, threads=2, device_id=0)
    graph._build_graph()
    assert len(graph._ops) <= 20


class Graph:
    """Stands for DALI on a GPU: knows the stream that it is run on, and gives pixels of its own memory."""

    def __init__(self, feed: Any) -> None:
        self.feed, self.streams, self.memory = feed, [], []

    def run(self, stream: Any) -> tuple[Any]:
        self.feed()
        self.streams.append(stream)
        pixels = torch.zeros(4, 2, 32, 32, 3, dtype=torch.uint8)
        self.memory.append(weakref.ref(pixels))
        return (SimpleNamespace(as_tensor=lambda: pixels),)


def test_a_batch_is_read_in_dali_s_memory_which_stays_until_the_gpu_has_read_it(
    train: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work on the stream of the training, without a wait of the host."""
    graphs: list[Graph] = []
    read: list[bool] = []  # of each batch: whether the GPU has come so far

    def record() -> Any:
        number = len(read)
        read.append(False)
        return SimpleNamespace(query=lambda: read[number])

    stream = SimpleNamespace(record_event=record)  # has nothing to wait with
    loader = cpu_loader(train)
    monkeypatch.setattr(loader, "_device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(
        torch, "tensor", lambda values, device=None, make=torch.tensor, **options: make(values, **options)
    )
    monkeypatch.setattr(torch, "from_dlpack", lambda output: output)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(dali_pipeline, "build_graph", lambda feed, **_: graphs.append(Graph(feed)) or graphs[-1])
    for _ in range(3):
        next(loader)
    assert graphs[0].streams == [stream] * 3
    assert all(memory() is not None for memory in graphs[0].memory)
    read[:2] = True, True
    next(loader)
    assert [memory() is not None for memory in graphs[0].memory] == [False, False, True, True]


def test_a_lack_of_memory_is_no_fault_of_a_file(train: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(dali_pipeline, "jitter_colours", fail)
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        next(cpu_loader(train))


@pytest.mark.gpu
def test_the_host_waits_for_no_batch(train: ImageSet) -> None:
    data = DataConfig.model_validate({"image_size": 64, "workers": 0, "pipeline": "dali"})
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5, "mean": MEAN, "std": LEVELS}
    augment = AugmentConfig(blur=0.5, solarise=0.5, policy="autoaugment")
    stream = build_train_loader(train, data, augment, device="cuda", **options)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_gives_the_views_of_the_cpu(train: ImageSet) -> None:
    """The GPU's decoder rounds in its own way."""
    augment = {"blur": 0.3, "solarise": 0.3}
    first, second = (views(train, "dali", augment, device=name) for name in ("cpu", "cuda"))
    assert second.is_cuda
    assert (first - second.cpu()).abs().mean() < 2


def test_the_choice_is_logged(train: ImageSet, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        views(train, "auto", PLAIN, batches=1)
    assert "data.pipeline: torch (faster than DALI on a CPU)" in caplog.messages
