"""What the tests of the trainer share: a tiny data set in PASCAL VOC layout, and a tiny network's recipe."""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from bench import clone
from fsr_fast.config import Config, build_config
from fsr_fast.method.step import FSRStep
from fsr_fast.models import Network, build_network
from fsr_fast.trainer import Trainer

CLASSES = ("red", "green", "blue")
IMAGE_SIZE, PATCH, GRID, WIDTH, DEPTH = 32, 8, (4, 4), 32, 4
N = GRID[0] * GRID[1]

OFFICIAL: dict[str, Any] = {
    "run": {"seed_per_rank": False},
    "model": {"mask_mode": "none"},
    "mask": {"source": "aux", "multi_scale": True, "block": 2, "random_fraction": 0.2},
    "teacher": {"encoder_momentum": 0.9995, "projector_momentum": 0.9995, "stochastic_depth": "always"},
    "loss": {"energy": 0.03, "normalise": "process"},
}
"""What `configs/voc_official.yaml` changes, with blocks that fit the tiny grid."""


def write_dataset(root: Path, *, train: int = 8, val: int = 4) -> Path:
    """Write images of one or two coloured squares on grey noise, their masks and their labels; return the root."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    draws = np.random.default_rng(0)
    rows = ["image,labels"]
    names = [f"picture_{number}" for number in range(train + val)]
    for number, name in enumerate(names):
        image = draws.integers(90, 160, (40, 36, 3), dtype=np.uint8)
        mask = np.zeros((40, 36), np.uint8)
        shown = sorted({number % 3, (number // 3) % 3})
        for place, colour in enumerate(shown):
            part = (slice(4 + 18 * place, 18 + 18 * place), slice(6 + 6 * place, 22 + 6 * place))
            image[part] = 30
            image[(*part, colour)] = 230
            mask[part] = colour + 1
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
        rows.append(f"{name},{' '.join(CLASSES[colour] for colour in shown)}")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:train]) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(names[train:]) + "\n")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def values(*changes: dict[str, Any], root: Path | str = "nowhere", output: Path | str = "run") -> dict[str, Any]:
    """Return the tiny recipe, changed section by section."""
    recipe: dict[str, Any] = {
        "run": {
            "output": str(output),
            "device": "cpu",
            "amp": "off",
            "log_every": 2,
            "picture_every": 0,
            "checkpoint_every": 100,
            "evaluate_every": 0,
        },
        "data": {
            "dataset": "voc",
            "root": str(root),
            "train_list": "train",
            "classes": list(CLASSES),
            "labels": "csv",
            "image_size": IMAGE_SIZE,
            "workers": 0,
        },
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "backbone_options": {
                "img_size": IMAGE_SIZE,
                "patch_size": PATCH,
                "embed_dim": WIDTH,
                "depth": DEPTH,
                "num_heads": 2,
            },
            "pretrained": "none",
            "decoder_width": 8,
            "projector_hidden": 16,
            "bottleneck": 8,
            "prototypes": 16,
        },
        "pseudo_label": {"dilations": [1, 2], "iterations": 2},
        "loss": {"segmentation_start": 0},
        "optim": {"iterations": 4, "batch_size": 4, "learning_rate": 1e-3, "head_factor": 2.0, "warmup": 1},
        "evaluate": {"scales": [1.0]},
    }
    for change in copy.deepcopy(changes):
        for section, content in change.items():
            recipe.setdefault(section, {}).update(content)
    return recipe


def config(*changes: dict[str, Any]) -> Config:
    """Return the tiny recipe as a configuration."""
    return build_config(values(*changes), "the test")


def write_config(path: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe to a file for `--config`."""
    path.write_text(yaml.safe_dump(recipe))
    return path


def network(recipe: Config, seed: int = 0) -> Network:
    """Build the recipe's network from random weights, without constant parameters."""
    torch.manual_seed(seed)
    built = build_network(recipe.model, CLASSES, recipe.data.image_size)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def step(recipe: Config, seed: int = 0) -> FSRStep:
    """Build the recipe's training step."""
    return FSRStep(network(recipe, seed), recipe, 2)


def views(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Draw two normalised views, smooth enough to hold shapes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, batch, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    first, second = fine.unflatten(0, (2, batch))
    return first, second


def labels(batch: int = 2) -> Tensor:
    """Return image labels: one class, two classes, one class, …"""
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).repeat((batch + 1) // 2, 1)[:batch]


def normalised(pixels: np.ndarray | Tensor, network: Network) -> Tensor:
    """Return grey levels (..., 3, H, W) of 0…255 as the network reads them: the formula, in float64 until the end."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (network.mean, network.std))
    return ((torch.as_tensor(pixels).double() / 255 - mean) / std).float()


def generator(seed: int = 0) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def float64() -> Iterator[None]:
    """Compute in float64 throughout, batches of the trainer included; its evaluations are not."""
    iterate = Trainer._iterate

    def iterate_wide(trainer, forward, batch):
        views = tuple(view.double() for view in batch.views)
        return iterate(trainer, forward, dataclasses.replace(batch, views=views))

    with mock.patch.object(Trainer, "_iterate", iterate_wide), clone.float64():
        yield
