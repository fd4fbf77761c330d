"""Workers whose batches do not fit into shared memory would wait for ever, which is reported at the start."""

import shutil
from types import SimpleNamespace

import pytest

from fsr_fast.config import build_config
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from tests import helpers

NEEDED = (
    2 * 2 * (2 * 4 * 3 * helpers.IMAGE_SIZE**2 * 4)
)  # workers, batches each, views, images, channels, pixels, bytes


@pytest.mark.faults
@pytest.mark.parametrize(("workers", "free", "fits"), [(2, NEEDED - 1, False), (2, NEEDED, True), (0, 0, True)])
def test_batches_of_the_workers_must_fit_into_shared_memory(tmp_path, monkeypatch, workers, free, fits):
    config = build_config(helpers.values({"data": {"workers": workers}}, root=helpers.write_dataset(tmp_path)), "test")
    images, _ = build_datasets(config.data)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    def build() -> None:
        options = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        build_train_loader(images, config.data, config.augment, **options)

    if fits:
        build()
    else:
        with pytest.raises(UserError, match=r"data\.workers: 2 hold .* --shm-size 2g .* lower --data\.workers"):
            build()
