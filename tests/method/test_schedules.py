import pytest

from fsr_fast import reference
from fsr_fast.config import CONFIG_FOLDER, load_config
from fsr_fast.method.schedules import learning_rate_factor, momentum, reaches_all, schedule_at, teacher_temperature
from tests import helpers


@pytest.mark.parametrize(
    ("loss", "iteration", "expected"),
    [
        ({"segmentation_start": 5}, 4, False),
        ({"segmentation_start": 5}, 5, True),
        ({"class_token": 0.0}, 5, False),
        ({"uncertain": 0.0}, 5, False),
        ({"affinity": 0.0}, 5, True),  # it has no parameters of its own
    ],
)
def test_losses_that_are_on_reach_all_parameters(loss, iteration, expected):
    assert reaches_all(helpers.config({"loss": loss}), iteration) is expected


def recipe(name: str):
    return load_config(["--config", str(CONFIG_FOLDER / f"{name}.yaml")])[0]


def test_the_rate_warms_up_linearly_from_a_tenth_and_falls_by_a_cosine_to_0():
    values = [learning_rate_factor(iteration, 20_000, 1500, 0.1) for iteration in (0, 750, 1500, 10_750, 20_000)]
    assert values == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0], abs=1e-12)


def test_without_warm_up_the_rate_starts_whole():
    assert learning_rate_factor(0, 10, 0, 0.1) == 1.0


def test_momentum_rises_by_a_cosine_to_1():
    values = [momentum(0.996, iteration, 100) for iteration in (0, 50, 100)]
    assert values == pytest.approx([0.996, 0.998, 1.0])


def test_the_teacher_s_temperature_rises_linearly_over_an_eighth_of_the_training_and_stays():
    config = recipe("voc_vit_b")
    values = [schedule_at(config, iteration).teacher_temperature for iteration in (0, 1249, 2499, 2500, 19_999)]
    assert values == pytest.approx([0.04, 0.04 + 0.03 * 1249 / 2499, 0.07, 0.07, 0.07])


def test_a_training_too_short_to_rise_has_the_last_temperature():
    assert teacher_temperature((0.04, 0.07), 0, 0) == 0.07
    assert teacher_temperature((0.04, 0.07), 0, 1) == 0.04


def test_every_iteration_has_the_values_of_the_reference():
    config = helpers.config({"optim": {"iterations": 40, "warmup": 7}, "teacher": {"encoder_momentum": 0.9}})
    for iteration in range(40):
        found = schedule_at(config, iteration)
        expected = (
            reference.learning_rate_factor(iteration, total=40, warmup=7),
            reference.teacher_momentum(iteration, total=40, start=0.9),
            reference.teacher_momentum(iteration, total=40, start=0.996),
            reference.teacher_temperature(iteration, total=40),
        )
        assert (
            found.learning_rate_factor,
            found.encoder_momentum,
            found.projector_momentum,
            found.teacher_temperature,
        ) == pytest.approx(expected, rel=1e-12)


def test_an_encoder_momentum_of_0_stays_0():
    config = recipe("voc_vit_b")
    assert {schedule_at(config, iteration).encoder_momentum for iteration in (0, 10_000, 19_999)} == {0.0}


@pytest.mark.parametrize(
    ("name", "segmentation_start", "affinity_start"),
    [("voc_vit_b", 2000, 0), ("voc_official", 2000, 0), ("coco_official", 8000, 12_000)],
)
def test_losses_weigh_0_before_their_start_and_their_weight_from_then_on(name, segmentation_start, affinity_start):
    config = recipe(name)
    before, after = (schedule_at(config, segmentation_start - 1 + late).weights for late in (0, 1))
    assert (before.segmentation, before.energy) == (0.0, 0.0)
    assert (after.segmentation, after.energy) == (0.1, config.loss.energy)
    assert [schedule_at(config, affinity_start + shift).weights.affinity for shift in (0, 1)] == [0.2, 0.2]
    if affinity_start:
        assert schedule_at(config, affinity_start - 1).weights.affinity == 0.0
    assert (before.classification, before.uncertain, before.class_token) == (1.0, 0.1, 0.1)


def test_the_official_recipe_masks_at_random_for_a_fifth_of_the_training():
    official = recipe("voc_official")
    assert [schedule_at(official, iteration).random_mask for iteration in (0, 3999, 4000)] == [True, True, False]
    assert not schedule_at(recipe("voc_vit_b"), 0).random_mask
