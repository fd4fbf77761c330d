import random
from itertools import islice
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import torch_pipeline
from fsr_fast.dataloading.batch import Batch, TrainLoader
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets
from fsr_fast.errors import UserError

PIPELINES = ("torch", "dali")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0)


def steps(pipeline: str) -> AugmentConfig:
    """Return every step that a pipeline knows."""
    policy = "randaugment" if pipeline == "torch" else "autoaugment"
    return AugmentConfig.model_validate({"jitter": 1.0, "blur": 0.5, "solarise": 0.5, "policy": policy})


@pytest.fixture(scope="module")
def train(creatures: DataConfig) -> SegmentationDataset:
    return build_datasets(creatures)[0]


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> str:
    return request.param


def loader(
    dataset: SegmentationDataset,
    augment: AugmentConfig | None = None,
    *,
    pipeline: str = "torch",
    size: int = 32,
    workers: int = 0,
    **changes: Any,
) -> TrainLoader:
    data = DataConfig.model_validate({"image_size": size, "workers": workers, "pipeline": pipeline})
    options = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5, "mean": MEAN, "std": STD} | changes
    return build_train_loader(dataset, data, augment or AugmentConfig(), **options)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        for view_a, view_b in zip(a.views, b.views, strict=True):
            assert torch.equal(view_a, view_b)


def test_a_batch_has_two_views_labels_and_indices(train: SegmentationDataset, pipeline: str) -> None:
    batch = next(loader(train, pipeline=pipeline))
    assert [view.shape for view in batch.views] == [(4, 3, 32, 32)] * 2
    assert {view.dtype for view in batch.views} == {torch.float32}
    assert all(view.is_contiguous() for view in batch.views)
    assert batch.indices.dtype == torch.int64
    np.testing.assert_array_equal(batch.labels.numpy(), train.labels[batch.indices.numpy()])


def test_without_augmentation_a_view_is_the_normalised_image(train: SegmentationDataset) -> None:
    batch = next(loader(train, PLAIN, size=96))
    for item, index in enumerate(batch.indices.tolist()):
        pixels = np.asarray(train.image(index), np.float64)
        expected = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)
        for view in batch.views:
            np.testing.assert_allclose(view[item].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_two_views_of_an_image_differ(train: SegmentationDataset, pipeline: str) -> None:
    for batch in islice(loader(train, pipeline=pipeline), 3):
        for first, second in zip(*batch.views, strict=True):
            assert (first - second).abs().mean() > 0.05


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(
    train: SegmentationDataset, pipeline: str
) -> None:
    stream = torch.cat(
        [batch.indices for batch in islice(loader(train, pipeline=pipeline), 11)]
    )  # 44 samples: two epochs of 22
    epochs = stream.view(2, 22).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(22))
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(22))


def test_the_same_image_gets_other_views_in_the_next_epoch(train: SegmentationDataset, pipeline: str) -> None:
    batches = list(islice(loader(train, pipeline=pipeline, batch_size=22), 2))
    first, second = (batch.views[0][batch.indices.argsort()] for batch in batches)
    assert (first - second).abs().mean(dim=(1, 2, 3)).min() > 0.02


def test_ranks_share_the_stream_of_one_process(train: SegmentationDataset, pipeline: str) -> None:
    whole = list(islice(loader(train, pipeline=pipeline, batch_size=6), 4))
    parts = [
        list(islice(loader(train, pipeline=pipeline, batch_size=3, rank=rank, world_size=2), 4)) for rank in (0, 1)
    ]
    for batch, even, odd in zip(whole, *parts, strict=True):
        for rank, part in enumerate((even, odd)):
            assert torch.equal(part.indices, batch.indices[rank::2])
            assert torch.equal(part.views[1], batch.views[1][rank::2])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(train: SegmentationDataset, workers: int, pipeline: str) -> None:
    alone = list(islice(loader(train, steps(pipeline), pipeline=pipeline), 7))
    helped = loader(train, steps(pipeline), pipeline=pipeline, workers=workers)
    assert_same(alone, list(islice(helped, 7)))
    helped.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_goes_on_with_the_very_next_sample(train: SegmentationDataset, workers: int, pipeline: str) -> None:
    whole = list(islice(loader(train, pipeline=pipeline), 9))
    first = loader(train, pipeline=pipeline, workers=workers)
    started = list(islice(first, 4))
    state = first.state_dict()
    first.close()
    assert state["position"] == 16
    second = loader(train, pipeline=pipeline, workers=2 - workers)
    next(second)  # a loader that has begun is moved as well
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert_same(whole, started + list(islice(second, 5)))
    second.close()


def test_a_closed_loader_goes_on_where_it_was(train: SegmentationDataset, pipeline: str) -> None:
    whole = list(islice(loader(train, pipeline=pipeline), 4))
    stream = loader(train, pipeline=pipeline, workers=1)
    before = psutil.Process().children()
    started = list(islice(stream, 2))
    processes = set(psutil.Process().children()) - set(before)
    stream.close()
    assert processes
    assert not any(process.is_running() for process in processes), "none waits until garbage is collected"
    assert_same(whole, started + list(islice(stream, 2)))


def test_the_position_counts_the_samples_of_all_ranks(train: SegmentationDataset, pipeline: str) -> None:
    stream = loader(train, pipeline=pipeline, batch_size=3, rank=1, world_size=4)
    list(islice(stream, 2))
    assert stream.state_dict()["position"] == 24


def test_another_seed_gives_another_stream(train: SegmentationDataset) -> None:
    first, second = next(loader(train)), next(loader(train, seed=6))
    assert first.indices.tolist() != second.indices.tolist()


def test_a_state_of_another_seed_or_list_is_refused(train: SegmentationDataset) -> None:
    state = loader(train).state_dict()
    with pytest.raises(UserError, match=r"seed was 5, is 6; resume with the same run\.seed"):
        loader(train, seed=6).load_state_dict(state)
    with pytest.raises(UserError, match="images was 23, is 22; resume with the same training list"):
        loader(train).load_state_dict(state | {"images": 23})


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generators_of_the_process_alone(
    train: SegmentationDataset, workers: int, pipeline: str
) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    stream = loader(train, steps(pipeline), pipeline=pipeline, workers=workers)
    list(islice(stream, 2))
    stream.close()
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())


def test_the_cache_is_bounded_and_changes_nothing(train: SegmentationDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = SegmentationDataset.encoded
    monkeypatch.setattr(SegmentationDataset, "encoded", lambda self, index: reads.append(index) or read(self, index))
    kept = list(islice(loader(train), 11))
    assert len(reads) == 22
    monkeypatch.setattr(torch_pipeline, "CACHE_BYTES", 21 * 96 * 96 * 4)
    assert_same(kept, list(islice(loader(train), 11)))
    assert len(reads) == 22 + 44


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_arguments_are_refused(train: SegmentationDataset, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected batch_size ≥ 1"):
        loader(train, **changes)
