import pytest
import torch

from fsr_fast import reference
from fsr_fast.config import CONFIG_FOLDER, build_config, read_yaml
from fsr_fast.engine import build_step
from fsr_fast.errors import UserError
from fsr_fast.method.reference_step import ReferenceStep, reference_settings
from fsr_fast.method.step import FSRStep
from tests.models.families import FAMILIES, WITH_REGISTERS, WITHOUT_PREFIX

from .harness import (
    BOUND,
    CLASSES,
    DTYPE,
    KERNELS,
    LABELS,
    TINY,
    Comparison,
    build_tiny_network,
    build_trainer,
    compare_steps,
    draw_views,
    iterate,
    smooth_views,
    state_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("precise")

PAPER, OFFICIAL = "voc_vit_b", "voc_official"
BLOCKS_OF_PATCHES = {"mask": {"block": 1}}  # a grid of 5 x 7 patches has no larger blocks
WITH_LABELS = {"loss": {"segmentation_start": 0}}


def assert_parity(comparisons: list[Comparison]) -> None:
    for step, comparison in enumerate(comparisons):
        assert max(comparison.differences.values()) <= BOUND, f"step {step}, {comparison.worst()}"
        fast, oracle = comparison.fast, comparison.reference.output
        for name, ours, theirs in (
            ("mask", fast.mask, oracle.mask),
            ("pseudo labels", fast.pseudo_labels, oracle.pseudo_labels),
        ):
            assert (ours is None) == (theirs is None), f"step {step}, {name}"
            assert ours is None or torch.equal(ours, theirs), f"step {step}, {name}"


# --- three steps of both presets


@pytest.mark.parametrize(
    ("preset", "change", "size"),
    [
        (PAPER, {}, (40, 56)),
        (OFFICIAL, BLOCKS_OF_PATCHES, (40, 56)),
        (OFFICIAL, {"mask": {"block": 2}, "data": {"image_size": 48}}, (32, 48)),
    ],
    ids=["paper 5x7", "official 5x7", "official blocks 4x6"],
)
def test_three_steps_are_those_of_the_reference(preset, change, size):
    comparisons = compare_steps(tiny_config(preset, change), size)
    assert_parity(comparisons)
    first, second, third = comparisons
    assert set(second.fast.losses) - set(first.fast.losses) >= {"segmentation"}, "labels start at the second step"
    for comparison in (second, third):
        found = set(comparison.fast.pseudo_labels.unique().tolist())
        assert {0, 255} < found, "the views give background, foreground and undecided pixels"
    assert ("energy" in third.fast.losses) == (preset == OFFICIAL)


def test_a_parameter_that_no_loss_reaches_gets_a_zero_gradient_and_still_decays():
    (comparison,) = compare_steps(tiny_config(PAPER), steps=1)
    gradient = comparison.reference.gradients["decoder.conv6.weight"]
    assert not gradient.any()
    assert comparison.differences.get("weight decoder.conv6.weight", 0.0) <= BOUND
    before = build_tiny_network(tiny_config(PAPER)).decoder.conv6.weight.detach()
    trainer = build_trainer(tiny_config(PAPER), (40, 56))
    iterate(trainer, draw_views((40, 56), seed=0), LABELS)
    rate = 1e-3 * 10 * 0.1  # base, head, first iteration of the warm-up
    torch.testing.assert_close(trainer.network.decoder.conv6.weight.detach(), before.to(DTYPE) * (1 - rate * 0.05))


# --- every switch


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        # Table 3
        (PAPER, {"mask": {"strategy": "random"}}),
        (PAPER, {"mask": {"strategy": "cam_strict"}}),
        (PAPER, {"mask": {"strategy": "edge_strict"}}),
        (PAPER, {"mask": {"strategy": "cam_strict", "multi_scale": True}}),
        (PAPER, {"mask": {"ratio": 0.1}}),
        (PAPER, {"mask": {"ratio": 0.5}}),
        # Table 4
        (PAPER, {"loss": {"uncertain": 0.0, "class_token": 0.0}}),
        (PAPER, {"loss": {"class_token": 0.0}}),
        (PAPER, {"loss": {"uncertain": 0.0}}),
        (PAPER, {"loss": {"uncertain": 0.0}, "model": {"aggregation": "gap"}}),
        (PAPER, {"loss": {"uncertain": 0.0}, "model": {"aggregation": "gmp"}}),
        # Eq. 7
        (PAPER, {"model": {"mask_mode": "multiply"}}),
        (PAPER, {"model": {"mask_mode": "none"}}),
        # what the presets decide together, one by one
        (PAPER, {"mask": {"source": "aux"}}),
        (PAPER, {"mask": {"multi_scale": True}}),
        (PAPER, {"teacher": {"encoder_momentum": 0.9}}),
        (PAPER, {"teacher": {"stochastic_depth": "always"}}),
        (PAPER, {"teacher": {"stochastic_depth": "shared"}}),
        (PAPER, {"loss": {"segmentation": 0.0, "energy": 0.05}}),
        (OFFICIAL, {"mask": {"block": 1, "multi_scale": False, "random_fraction": 0.0}}),
        (OFFICIAL, {"mask": {"block": 1, "random_fraction": 0.0}, "teacher": {"encoder_momentum": 0.0}}),
        # the rest of the recipe
        (PAPER, {"loss": {"affinity_start": 1}}),
        (PAPER, {"optim": {"clip_norm": 0.1}}),
        (PAPER, {"model": {"aux_block": 1}, "cam": {"scales": [1.0, 0.75]}}),
        (PAPER, {"pseudo_label": {"high": 0.6, "low": 0.3, "iterations": 2, "dilations": [1, 5]}}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value,
)
def test_every_switch_changes_both_alike(preset, change):
    config = tiny_config(preset, WITH_LABELS, change)
    assert_parity(compare_steps(config, labels=LABELS[:2], steps=1, views=lambda _: smooth_views((40, 56), 2)))


# --- families of backbones


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_of_backbones_is_that_of_the_reference(family):
    options = {**TINY["model"]["backbone_options"], "depth": 2}
    model = {"backbone": FAMILIES[family], "backbone_options": options, "aux_block": 0}
    if family not in WITHOUT_PREFIX | WITH_REGISTERS:
        model["prefix_tokens"] = "keep" if family.startswith(("DINOv2", "EVA", "CLIP")) else "drop"
    config = tiny_config(PAPER, WITH_LABELS, {"model": model})
    assert_parity(compare_steps(config, labels=LABELS[:2], steps=1, views=lambda _: smooth_views((40, 56), 2)))


# --- images and masks at the edge


def test_a_mask_that_swallows_all_uncertain_patches_goes_on_at_random():
    strict, most = (
        compare_steps(tiny_config(PAPER, {"mask": change}), steps=1)
        for change in ({"strategy": "cam_strict"}, {"ratio": 0.9})
    )
    assert_parity([*strict, *most])
    uncertain, mask = strict[0].fast.mask, most[0].fast.mask
    assert uncertain.any(1).all()
    assert mask[uncertain].all()
    assert mask.sum(1).tolist() == [31] * 3
    assert (uncertain.sum(1) < 31).all()


def test_a_mask_of_no_patch_gives_no_uncertain_loss_and_moves_the_centre():
    (comparison,) = compare_steps(tiny_config(PAPER, {"mask": {"ratio": 0.0}}), steps=1)
    assert_parity([comparison])
    assert comparison.fast.losses["uncertain"] == 0
    assert comparison.reference.output.centres.patch.any()


@pytest.mark.parametrize("aggregation", ["mca", "gap", "gmp"])
def test_an_image_whose_patches_are_all_masked_stays_finite(aggregation):
    config = tiny_config(PAPER, {"mask": {"strategy": "edge_strict"}, "model": {"aggregation": aggregation}})
    (comparison,) = compare_steps(config, steps=1)
    assert_parity([comparison])
    assert comparison.fast.mask.all(1).any(), "noise has an edge in every patch"
    assert comparison.fast.loss.isfinite()


@pytest.mark.parametrize(
    ("labels", "change", "labelled"),
    [
        (torch.zeros(2, 4), {}, {0}),
        (LABELS[:2], {"pseudo_label": {"low": 0.0005, "high": 0.001}}, {1, 2, 3, 4}),
    ],
    ids=["no foreground", "no background"],
)
def test_an_empty_part_of_the_pseudo_labels_counts_nothing(labels, change, labelled):
    (comparison,) = compare_steps(tiny_config(PAPER, WITH_LABELS, change), labels=labels, steps=1)
    assert_parity([comparison])
    assert set(comparison.fast.pseudo_labels.unique().tolist()) - {255} <= labelled
    assert comparison.fast.losses["segmentation"] > 0


# --- the reference as an engine


def test_training_by_the_reference_engine_gives_the_same_weights():
    fast, slow = (
        build_trainer(tiny_config(OFFICIAL, BLOCKS_OF_PATCHES, {"run": {"amp": "off", "engine": engine}}), (40, 56))
        for engine in ("fast", "reference")
    )
    assert type(fast.step) is FSRStep
    assert type(slow.step) is ReferenceStep
    for iteration in range(3):
        outputs = [iterate(trainer, draw_views((40, 56), seed=iteration), LABELS) for trainer in (fast, slow)]
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    torch.testing.assert_close(outputs[0].cams, outputs[1].cams, rtol=BOUND, atol=BOUND)
    steps = 3 * fast.config.optim.learning_rate if KERNELS else BOUND  # Adam's, where the gradient is rounding error
    torch.testing.assert_close(state_of(fast), state_of(slow), rtol=0, atol=steps)
    for part in ("teacher", "distillation"):
        ours, theirs = (getattr(trainer.step, part).state_dict() for trainer in (fast, slow))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=BOUND)


def test_the_reference_engine_refuses_what_it_does_not_know():
    config = tiny_config(PAPER, {"run": {"engine": "reference", "amp": "bf16"}})
    with pytest.raises(UserError, match=r"--run\.amp off"):
        build_step(build_tiny_network(config), config, len(CLASSES))
    config = tiny_config(PAPER, {"run": {"engine": "reference", "amp": "off"}, "cam": {"fp8": True}})
    with pytest.raises(UserError, match=r"--cam\.fp8 false"):
        build_step(build_tiny_network(config), config, len(CLASSES))


@pytest.mark.parametrize(("preset", "expected"), [(PAPER, reference.PAPER), (OFFICIAL, reference.OFFICIAL)])
def test_the_shipped_recipes_are_the_presets_of_the_reference(preset, expected):
    network = build_tiny_network(tiny_config(preset))
    config = build_config(read_yaml(CONFIG_FOLDER / f"{preset}.yaml"), preset)
    assert (config.model.backbone, config.data.image_size) == ("vit_base_patch16_224.orig_in21k_ft_in1k", 448)
    assert reference_settings(config, network)._replace(heads=12, patch_size=16) == expected
