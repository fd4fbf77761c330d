from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fsr_fast.method.draws import Draws

from .harness import LABELS, build_trainer, draw_views, iterate, state_of, tiny_config

PAPER, OFFICIAL = "voc_vit_b", "voc_official"
SIZE = (32, 32)
SMALL = {
    "data": {"image_size": 32},
    "mask": {"block": 1},
    "pseudo_label": {"iterations": 2, "dilations": [1, 2]},
    "optim": {"iterations": 20, "batch_size": 3, "learning_rate": 1e-3, "warmup": 2},
}


def train(
    preset: str,
    *changes: dict,
    steps: int,
    rank: int = 0,
    disturb: Callable[[int, Draws], Draws] = lambda _, draws: draws,
) -> dict[str, Tensor]:
    """Train in float32 on views that do not depend on the seed; return the weights."""
    trainer = build_trainer(tiny_config(preset, SMALL, *changes), SIZE, dtype=torch.float32, rank=rank)
    draw = trainer.step.draw
    trainer.step.draw = lambda *arguments: disturb(trainer.iteration, draw(*arguments))
    for iteration in range(steps):
        iterate(trainer, draw_views(SIZE, 2, seed=iteration, dtype=torch.float32), LABELS[:2])
    return state_of(trainer)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("preset", [PAPER, OFFICIAL])
def test_the_same_seed_gives_the_same_bits_after_twenty_steps(preset):
    first = train(preset, steps=20)
    assert all(value.isfinite().all() for value in first.values())
    assert same(first, train(preset, steps=20))


def test_another_seed_gives_other_weights():
    config = {"run": {"amp": "off", "device": "cpu", "seed": 1}}
    assert not same(train(PAPER, steps=1), train(PAPER, config, steps=1))


def turn_around(keep: Tensor, last: int) -> Tensor:
    """Drop the second block's branches of the first `last` images where they were kept, and the other way round."""
    changed = keep.clone()
    changed[1, :, :last] = (keep[1, :, :last] == 0).float()
    return changed


@pytest.mark.parametrize("part", ["uniform", "student", "teacher", "mask_cam", "cam"])
def test_a_changed_draw_changes_the_weights(part):
    def disturb(iteration: int, draws: Draws) -> Draws:
        value = getattr(draws, part)
        if part == "uniform":
            changed = value.clone()
            changed[0, value[0].argmax()] = 0.0  # masked before; now the last to be masked
        elif isinstance(value, list):
            changed = [turn_around(keep, 4) for keep in value]  # maps are thresholded: one draw need not show
        else:
            changed = turn_around(value, 1)
        return draws._replace(**{part: changed}) if iteration == 0 else draws

    changes = {"mask": {"block": 1, "random_fraction": 0.05 if part == "uniform" else 0.0}}
    assert not same(train(OFFICIAL, changes, steps=2), train(OFFICIAL, changes, steps=2, disturb=disturb))


def test_ranks_draw_their_own_streams_unless_the_seed_is_the_same_on_all():
    own = [train(PAPER, steps=1, rank=rank) for rank in (0, 1)]
    alike = {"run": {"amp": "off", "device": "cpu", "seed_per_rank": False}}
    shared = [train(PAPER, alike, steps=1, rank=rank) for rank in (0, 1)]
    assert not same(*own)
    assert same(*shared)
