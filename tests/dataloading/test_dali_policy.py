"""AutoAugment after DALI is that of the torch pipeline, drawn and applied."""

import numpy as np
import pytest
import torch

from fsr_fast.config import AugmentConfig
from fsr_fast.dataloading.augment import build_policy
from fsr_fast.dataloading.dali_policy import Recorder, apply_to_batch
from fsr_fast.kernels.learned_policy import OPERATIONS
from tests.kernels.conftest import CUDA, choose

SIZE, MEAN = 17, (0.485, 0.456, 0.406)
SEEDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("path", ["interpreter", CUDA])
def test_every_operation_of_the_policy_is_recorded_and_gives_the_pixels_of_pillow(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = choose(path, monkeypatch)
    recorder = Recorder(SIZE)
    steps = torch.from_numpy(np.stack([recorder.draw(seed) for seed in SEEDS.flatten().tolist()], 1))
    assert set(steps[..., 0].flatten().tolist()) == set(range(len(OPERATIONS)))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 20, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    policy = build_policy(AugmentConfig(policy="autoaugment"), SIZE, MEAN)
    arguments = policy, pixels.to(device), steps.view(2, 2, 20, -1), SEEDS
    by_kernel = apply_to_batch(*arguments).cpu()
    choose("torch", monkeypatch)
    by_pillow = apply_to_batch(*arguments).cpu()
    assert torch.equal(by_kernel, by_pillow)
    assert (by_pillow != pixels).any((2, 3, 4)).float().mean() > 0.8
