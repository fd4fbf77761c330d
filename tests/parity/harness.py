"""Trains a tiny network by the fast step and by the reference at once, and measures how far they drift apart."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fsr_fast import reference
from fsr_fast.config import CONFIG_FOLDER, Config, build_config, read_yaml
from fsr_fast.dataloading.batch import Batch
from fsr_fast.engine import build_step
from fsr_fast.method.masking import find_edges, mask_shape
from fsr_fast.method.optim import build_optimiser
from fsr_fast.method.reference_step import reference_settings
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.models import Network, build_network
from fsr_fast.runtime.distributed import Process
from fsr_fast.runtime.guard import NonFiniteGuard
from fsr_fast.runtime.seeding import stream
from fsr_fast.trainer import Trainer

KERNELS = os.environ.get("FSR_KERNELS") == "triton"
DTYPE, BOUND = (torch.float32, 1e-4) if KERNELS else (torch.float64, 1e-9)
"""Of the comparison. Triton's kernels have no float64; with them both sides compute in float32."""

CLASSES = ("ant", "bee", "cat", "dog")
PATCH, WIDTH = 8, 32
LABELS = torch.tensor([[0.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])  # one class, many, two

TINY: dict[str, Any] = {
    "run": {"amp": "off", "device": "cpu"},
    "data": {"dataset": "synthetic", "image_size": 56, "root": None},
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_options": {"img_size": 56, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 4, "num_heads": 4},
        "pretrained": "none",
        "stochastic_depth": 0.4,
        "decoder_width": 16,
        "projector_hidden": 24,
        "bottleneck": 12,
        "prototypes": 20,
    },
    "loss": {"segmentation_start": 1},
    "optim": {"iterations": 10, "batch_size": 3, "learning_rate": 1e-3, "warmup": 2},
    "teacher": {"temperature_fraction": 0.4},
}


def tiny_config(preset: str, *changes: dict[str, Any]) -> Config:
    """Return a shipped recipe with a tiny network, changed section by section."""
    values = read_yaml(CONFIG_FOLDER / f"{preset}.yaml")
    for change in (TINY, *changes):
        for section, content in change.items():
            values[section] = values.get(section, {}) | content
    return build_config(values, "the test")


def build_tiny_network(config: Config, seed: int = 0) -> Network:
    """Build the network with no constant parameters, so that no gradient is 0 by symmetry."""
    torch.manual_seed(seed)
    network = build_network(config.model, CLASSES, config.data.image_size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def draw_views(
    size: tuple[int, int], batch: int = 3, seed: int = 1, dtype: torch.dtype = DTYPE
) -> tuple[Tensor, Tensor]:
    """Draw two normalised views, away from whole grey levels."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.rand(2, batch, 3, *size, generator=generator, dtype=torch.float64)
    first, second = ((levels - 0.45) / 0.23).to(dtype)
    return first, second


def smooth_views(size: tuple[int, int], batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Draw two views of broad blotches: some patches hold edges, some do not."""
    first, second = draw_views((4, 5), batch, seed)
    return tuple(F.interpolate(view, size=size, mode="bicubic") for view in (first, second))


def build_trainer(
    config: Config, size: tuple[int, int], *, dtype: torch.dtype = DTYPE, rank: int = 0
) -> SimpleNamespace:
    """Return what `Trainer` needs for an iteration, for images of any size."""
    network = build_tiny_network(config).to(dtype)
    step = build_step(network, config, len(CLASSES)).to(dtype)
    step.selector.shape = mask_shape(config.mask, (size[0] // PATCH, size[1] // PATCH))
    return SimpleNamespace(
        config=config,
        process=Process(rank, 1, torch.device("cpu")),
        network=network,
        step=step,
        optimiser=(optimiser := build_optimiser(network, config.optim)),
        guard=NonFiniteGuard(optimiser, step.distillation.buffers()),
        iteration=0,
    )


def iterate(trainer: SimpleNamespace, views: tuple[Tensor, Tensor], labels: Tensor) -> StepOutput:
    """Make one iteration of the trainer's own loop."""
    batch = Batch(views, labels, torch.arange(len(labels)))
    return Trainer._iterate(trainer, trainer.step, batch)[0]  # type: ignore[arg-type]


def state_of(trainer: SimpleNamespace) -> dict[str, Tensor]:
    """Copy all weights of the student."""
    return {name: value.detach().clone() for name, value in trainer.network.state_dict().items()}


class Comparison(NamedTuple):
    """One step made twice."""

    fast: StepOutput
    reference: reference.StepRecord
    differences: dict[str, float]
    """Of every loss, gradient, weight, centre and teacher's weight, relative to the norm of the reference's."""

    def worst(self) -> str:
        """Name the largest difference."""
        name = max(self.differences, key=self.differences.__getitem__)
        return f"{name}: {self.differences[name]:.3g}"


def compare_steps(
    config: Config,
    size: tuple[int, int] = (40, 56),
    labels: Tensor = LABELS,
    *,
    steps: int = 3,
    views: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> list[Comparison]:
    """Train by the fast step and by the reference from the same weights on the same views and draws.

    Args:
        config: as tiny_config gives it.
        size: height and width of the views, pixels.
        labels: (B, C), 0 or 1.
        steps: number of steps; neither side is set back to the other between them.
        views: gives the views of an iteration; none: new random ones at each.
    """
    trainer = build_trainer(config, size)
    settings = reference_settings(config, trainer.network)
    state = reference.start_training(trainer.network.state_dict())
    comparisons = []
    for iteration in range(steps):
        pair = views(iteration) if views else draw_views(size, len(labels), seed=iteration)
        draws = trainer.step.draw(len(labels), stream(config.run.seed, "step", 0, iteration))
        edges = find_edges(trainer.network.denormalise(pair[1]), config.mask)
        given = reference.Draws(*draws, edges=edges)
        fast = iterate(trainer, pair, labels)
        state, record = reference.training_step(state, pair, labels, given, settings)
        comparisons.append(Comparison(fast, record, _differences(trainer, fast, state, record)))
    return comparisons


def _differences(
    trainer: SimpleNamespace, fast: StepOutput, state: reference.TrainingState, record: reference.StepRecord
) -> dict[str, float]:
    assert set(fast.losses) == set(record.output.losses)
    step: FSRStep = trainer.step
    gradients = {name: parameter.grad for name, parameter in trainer.network.named_parameters()}
    assert gradients.keys() == record.gradients.keys()
    teacher = step.teacher.network or step.teacher.projector
    prefix = "" if step.teacher.network else "projector."
    groups: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "loss": (
            fast.losses | {"total": fast.loss},
            record.output.losses | {"total": record.output.total},
        ),
        "gradient": (gradients, record.gradients),
        "weight": (trainer.network.state_dict(), state.student),
        "teacher": ({prefix + name: value for name, value in teacher.state_dict().items()}, state.teacher),
        "centre": (
            {"patch": step.distillation.patch_centre, "class_token": step.distillation.class_centre},
            state.centres._asdict(),
        ),
    }
    if KERNELS:  # Adam makes a full step of a gradient that is rounding error, as that of a key bias
        del groups["weight"]
    floor = (1e-3 if KERNELS else 1e-6) * torch.stack([g.norm() for g in record.gradients.values()]).norm().item()
    result = {}
    for group, (ours, theirs) in groups.items():
        for name, value in ours.items():
            difference = (value.detach() - theirs[name].detach()).norm().item()
            # a gradient that is 0 in exact arithmetic, as that of a key bias, is measured against all gradients
            scale = max(theirs[name].norm().item(), floor if group == "gradient" else 1e-9)
            result[f"{group} {name}"] = difference / scale
    return result
