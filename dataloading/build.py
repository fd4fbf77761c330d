"""Choice of the pipeline that `data.pipeline` names."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading.batch import TrainLoader, TrainSource
from fsr_fast.dataloading.stream import BadFiles
from fsr_fast.dataloading.torch_pipeline import TorchLoader
from fsr_fast.errors import UserError

logger = logging.getLogger(__name__)


def build_train_loader(
    dataset: TrainSource,
    data: DataConfig,
    augment: AugmentConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    bad_files: Path | None = None,
) -> TrainLoader:
    """Build the endless loader of training batches.

    Args:
        dataset: training set.
        data: pipeline, size of the views, number of workers.
        augment: how views are drawn.
        batch_size: images per batch of this rank, ≥ 1.
        rank: number of this process, 0 ≤ rank < world_size.
        world_size: number of processes.
        seed: of order and augmentation, ≥ 0; the same on all ranks.
        mean: of the normalisation, three values in the range 0 to 1.
        std: of the normalisation, three values > 0.
        device: of the training; DALI makes the views there.
        bad_files: file that lists the damaged images, shared by all ranks.

    Raises:
        UserError: `data.pipeline` is `dali`, but DALI cannot be used.
    """
    damaged = BadFiles(bad_files, len(dataset), data.max_bad_fraction)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "seed": seed,
        "bad_files": damaged,
    }
    target = torch.device(device)
    chosen, reason = choose_pipeline(data, augment, target)
    if chosen == "dali" and data.pipeline == "auto" and (obstacle := _try_dali(target)):
        logger.warning("data.pipeline: DALI does not run here (%s)", obstacle)
        chosen, reason = "torch", "DALI does not run here"
    logger.info("data.pipeline: %s (%s)", chosen, reason)
    if chosen == "dali":
        from fsr_fast.dataloading.dali_pipeline import DaliLoader  # slow to import

        loader: TrainLoader = DaliLoader(dataset, data, augment, mean, std, device=target, **options)
    else:
        loader = TorchLoader(dataset, data, augment, mean, std, **options)
    if rank == 0:
        damaged.clear()
    return loader


def choose_pipeline(data: DataConfig, augment: AugmentConfig, device: torch.device) -> tuple[str, str]:
    """Choose between `torch` and `dali`.

    Args:
        data: the requested pipeline.
        augment: DALI supports everything but RandAugment.
        device: of the training.

    Returns:
        The pipeline, and the reason.

    Raises:
        UserError: DALI is requested but cannot be used.
    """
    if data.pipeline == "torch":
        return "torch", "as configured"
    obstacle = None
    if find_spec("nvidia.dali") is None:
        obstacle = "NVIDIA DALI is not installed"
    elif augment.policy == "randaugment":
        obstacle = "DALI does not know the policy randaugment"
    if data.pipeline == "dali":
        if obstacle is not None:
            raise UserError(f"data.pipeline: dali, but {obstacle}; give --data.pipeline torch")
        return "dali", "as configured"
    if obstacle is not None:
        return "torch", obstacle
    return ("dali", "on the GPU") if device.type == "cuda" else ("torch", "faster than DALI on a CPU")


def _try_dali(device: torch.device) -> str | None:
    """Decode a picture; return why that fails, if it does (for example a driver older than this DALI)."""
    target = io.BytesIO()
    Image.new("RGB", (16, 16)).save(target, "JPEG")
    try:
        from fsr_fast.dataloading import dali_graph

        dali_graph.build_decoder(target.getvalue(), device.index or 0).run()
    except (ImportError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return None
