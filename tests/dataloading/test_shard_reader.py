import json
import pickle
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from fsr_fast.commands.data import main
from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import shard_reader
from fsr_fast.dataloading.batch import ImageSet, TrainLoader
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets, open_split
from fsr_fast.dataloading.images import DamagedFileError
from fsr_fast.dataloading.shard_reader import ShardDataset, ShardOrder
from fsr_fast.errors import UserError
from fsr_fast.evaluation.samples import Failure, Sample, read_samples
from tests.runtime import children

NORM: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
COUNT = 22


@pytest.fixture(scope="module")
def packed(creatures: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set in shards of a few images."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsr_fast.commands.data.MEGABYTE", 10_000)
        main(["pack", str(creatures.root), "--output", str(folder), "--shard-size", "1"])
    return folder


@pytest.fixture
def bucket(packed: Path) -> Iterator[str]:
    """The same behind a URL."""
    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/bucket/shards", recursive=True)
    yield "memory://bucket/shards"
    memory.rm("/bucket", recursive=True)


def data(root: Path | str, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "shards", "root": root, "image_size": 32, "workers": 0} | changes)


def loader(dataset: ImageSet, config: DataConfig, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 5} | NORM | changes
    return build_train_loader(dataset, config, AugmentConfig(), **options)


def test_shards_hold_what_the_files_hold(creatures: DataConfig, packed: Path) -> None:
    for files, shards in zip(build_datasets(creatures), build_datasets(data(packed)), strict=True):
        assert (len(shards), shards.classes) == (len(files), files.classes)
        assert shards.max_labels == files.max_labels
        for index in range(len(files)):
            assert shards.ids[index] == files.ids[index]
            assert shards.encoded(index).data == files.encoded(index).data
            np.testing.assert_array_equal(shards.labels[index], files.labels[index])
    train, val = build_datasets(data(packed))
    assert train.mask(0) is None
    np.testing.assert_array_equal(val.mask(3), build_datasets(creatures)[1].mask(3))
    np.testing.assert_array_equal(np.asarray(val.image(3)), np.asarray(build_datasets(creatures)[1].image(3)))


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_shards_and_files_give_the_same_view_of_an_image(creatures: DataConfig, packed: Path, pipeline: str) -> None:
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0)
    options: dict[str, Any] = {"batch_size": COUNT, "rank": 0, "world_size": 1, "seed": 5} | NORM
    batches = []
    for config in (creatures.model_copy(update={"pipeline": pipeline}), data(packed, pipeline=pipeline)):
        batch = next(build_train_loader(build_datasets(config)[0], config, whole, **options))
        batches.append((batch.views[0][batch.indices.argsort()], batch.labels[batch.indices.argsort()]))
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_url_and_a_resume_with_other_workers_give_the_same_batches(
    packed: Path, bucket: str, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "WINDOW", 2)
    local, remote = data(packed, pipeline=pipeline), data(bucket, pipeline=pipeline, workers=1)
    expected = list(islice(loader(build_datasets(local)[0], local), 7))
    first = loader(build_datasets(local)[0], local)
    list(islice(first, 3))
    second = loader(build_datasets(remote)[0], remote)
    second.load_state_dict(first.state_dict())
    for left, right in zip(expected[3:], islice(second, 4), strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.labels, right.labels)
        assert all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))
    second.close()


def read_share(root: str, rank: int) -> list[int]:
    """Two epochs of a rank's samples."""
    config = data(root)
    stream = loader(build_datasets(config)[0], config, batch_size=1, rank=rank, world_size=2)
    return [int(batch.indices) for batch in islice(stream, COUNT)]


@pytest.mark.ddp
def test_two_processes_see_every_sample_once_an_epoch(packed: Path) -> None:
    with ProcessPoolExecutor(2, children.CONTEXT) as pool:
        shares = list(pool.map(read_share, [f"file://{packed}"] * 2, (0, 1)))
    half = COUNT // 2
    epochs = [[number for share in shares for number in share[part]] for part in (slice(half), slice(half, None))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 2


def test_an_order_is_a_permutation_that_keeps_windows_of_shards_together() -> None:
    sizes = [7, 1, 5, 9, 4, 6, 8, 3, 2, 5, 7, 6, 4, 8, 9, 1, 5, 3, 6]
    starts = np.cumsum([0, *sizes])
    orders = [[ShardOrder(starts, 3, epoch)[offset] for offset in range(sum(sizes))] for epoch in (0, 1)]
    assert all(sorted(order) == list(range(sum(sizes))) for order in orders)
    assert orders[0] != orders[1]
    order = orders[0]
    shards = (np.searchsorted(starts, order, side="right") - 1).tolist()
    runs = (
        [shards.index(shard) for shard in range(len(sizes))],
        [len(shards) - shards[::-1].index(s) for s in range(19)],
    )
    spans = [end - start for start, end in zip(*runs, strict=True)]
    assert max(spans) <= sum(sorted(sizes)[-shard_reader.WINDOW :])
    assert spans != sizes  # the samples of a window are mixed
    backwards = ShardOrder(starts, 3, 0)
    assert [backwards[offset] for offset in reversed(range(sum(sizes)))] == order[::-1]


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Ten times the shards of a thousand samples each: what stays allocated is the list of shards."""

    def allocated(shards: int) -> int:
        starts = np.arange(shards + 1) * 1000
        tracemalloc.start()
        order = ShardOrder(starts, 0, 0)
        assert 0 <= order[17] < shards * 1000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert allocated(1000) - allocated(100) < 100 * 900  # bytes for 900 more shards, far below 8 a sample


def test_the_offsets_of_few_shards_are_kept(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "PLACES", 2)
    dataset = ShardDataset(str(packed), "train_aug")
    assert len(dataset._files) > 3
    names = [dataset.ids[index] for index in range(len(dataset))]
    assert len(set(names)) == COUNT
    assert len(dataset._places) == 2


def test_a_data_set_goes_to_processes_of_any_start_method(packed: Path) -> None:
    dataset = ShardDataset(str(packed), "train_aug")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.ids[3] == dataset.ids[3]
    assert copy.encoded(3).data == dataset.encoded(3).data


def test_evaluation_reads_shards(packed: Path) -> None:
    samples = [
        item for item in read_samples(build_datasets(data(packed))[1], range(7), workers=1) if isinstance(item, Sample)
    ]
    assert [sample.index for sample in samples] == list(range(7))
    assert all(sample.truth is not None and sample.truth.shape == sample.image.shape[:2] for sample in samples)


def rewrite(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage(packed: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_what_is_no_index_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainaug\.json: no such file; did you mean 'train_aug'\?"):
        ShardDataset(str(packed), "trainaug")
    copy = damage(packed, tmp_path)
    rewrite(copy / "train_aug.json", lambda index: index.update(version=2))
    with pytest.raises(UserError, match=r"version 2 with \d+ shards, expected 1"):
        ShardDataset(str(copy), "train_aug")
    (copy / "val.json").write_text("{")
    with pytest.raises(UserError, match=r"val\.json: not a readable index of shards"):
        ShardDataset(str(copy), "val")
    with pytest.raises(UserError, match="install what fsspec needs"):
        ShardDataset("oss://bucket", "val")  # its package is not among ours


def test_damaged_shards_are_named(packed: Path, tmp_path: Path) -> None:
    copy = damage(packed, tmp_path)
    tar = copy / "train_aug-000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(DamagedFileError, match=r"train_aug-000000\.tar: ends before byte \d+; copy or pack it again"):
        ShardDataset(str(copy), "train_aug").encoded(0)
    tar.unlink()
    with pytest.raises(DamagedFileError, match=r"train_aug-000000\.tar: bytes .* cannot be read"):
        ShardDataset(str(copy), "train_aug").encoded(0)
    index = copy / "train_aug-000001.idx"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))
    dataset = ShardDataset(str(copy), "train_aug")
    with pytest.raises(UserError, match=r"train_aug-000001\.idx: cannot be read: not \d samples in the format v1\.2"):
        dataset.encoded(int(dataset._starts[1]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_fails_alone_in_an_evaluation(packed: Path, tmp_path: Path, workers: int) -> None:
    copy = damage(packed, tmp_path)
    tar = copy / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    offset, size = ShardDataset(str(copy), "val")._parts(1)[1]["json"]
    content[offset : offset + size] = b"{" * size
    tar.write_bytes(content)
    samples = list(read_samples(ShardDataset(str(copy), "val"), [0, 1], workers))
    assert [isinstance(sample, Failure) for sample in samples] == [False, True]
    assert samples[1].name == "val-000000.tar, sample 1"
    assert isinstance(samples[1], Failure)
    assert "its JSON cannot be read" in samples[1].message
    assert "Traceback" not in samples[1].message


def test_shards_are_not_opened_as_files(packed: Path) -> None:
    with pytest.raises(UserError, match=r"data\.dataset: shards"):
        open_split(data(packed), training=True, with_masks=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": ["bird"]}, "data.subset: shards contain their labels"),
        ({"labels": "csv"}, "data.labels: shards contain their labels"),
        ({"classes": ["bird"]}, "data.classes: differ from those of the shards"),
    ],
)
def test_what_shards_cannot_do_is_refused(packed: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_datasets(data(packed, **changes))


def test_a_url_is_for_shards_alone(bucket: str) -> None:
    with pytest.raises(UserError, match=r"is a URL; data\.dataset 'voc' needs a folder"):
        build_datasets(DataConfig.model_validate({"dataset": "voc", "root": bucket}))
