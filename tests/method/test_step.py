import math
from typing import NamedTuple

import pytest
import torch

from fsr_fast.method.schedules import schedule_at
from fsr_fast.method.step import FSRStep, StepOutput
from tests import helpers
from tests.helpers import DEPTH, OFFICIAL, N

B = 2
LATE = 3
"""An iteration at which every loss counts and the official recipe no longer masks at random."""


class Pass(NamedTuple):
    """Images of one size in one pass through the trunk."""

    images: int
    scale: float
    gradient: bool
    aux_only: bool


def run(step: FSRStep, iteration: int = LATE, seed: int = 0) -> StepOutput:
    draws = step.draw(B, helpers.generator(seed))
    return step(helpers.views(B), helpers.labels(B), draws, schedule_at(step.config, iteration))


def passes(step: FSRStep, iteration: int = LATE) -> list[Pass]:
    return [
        Pass(images, math.sqrt(tokens / N), one.gradient, one.blocks < DEPTH)
        for one in run(step, iteration).work.passes
        for images, tokens in one.groups
    ]


def work(one: Pass) -> float:
    """Floating-point operations of ViT-B/16 for images of 448 pixels at this scale; 3 times with gradient."""
    tokens, width = round(784 * one.scale**2), 768
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    depth = 10 if one.aux_only else 12
    return one.images * (depth * block + 2 * tokens * width**2) * (3 if one.gradient else 1)


def units(made: list[Pass]) -> float:
    """Work per image of the batch, in passes of one image through the trunk."""
    return sum(map(work, made)) / work(Pass(1, 1.0, False, False)) / B


# --- no pass is made twice, and none that nothing reads


def test_the_paper_s_step_takes_the_least_work():
    made = passes(helpers.step(helpers.config()))
    assert sorted(made) == sorted(
        [
            # view 1 for CAM and class token, its mirror image, and view 2 for its CAM, mask and the teacher's patches
            Pass(3 * B, 1.0, False, False),
            Pass(2 * B, 1.0, True, False),  # student: view 1 and masked view 2
            Pass(2 * B, 0.5, False, False),
            Pass(2 * B, 1.5, False, False),
        ]
    )
    assert units(made) == pytest.approx(14.8, abs=0.06)


@pytest.mark.parametrize("change", [{"teacher": {"stochastic_depth": "shared"}}, {"model": {"stochastic_depth": 0.0}}])
def test_the_student_s_pass_of_view_1_serves_the_maps_where_it_may(change):
    made = passes(helpers.step(helpers.config(change)))
    assert Pass(2 * B, 1.0, False, False) in made
    assert units(made) == pytest.approx(13.8, abs=0.06)


def test_neither_maps_nor_teacher_see_the_student_s_stochastic_depth_unless_shared():
    cams, shared = {}, {"teacher": {"stochastic_depth": "shared"}}
    for name, change in (("never", {}), ("shared", shared)):
        step = helpers.step(helpers.config({"model": {"stochastic_depth": 0.9}}, change))
        cams[name] = [run(step, seed=seed).cams.values for seed in (0, 1)]
    assert torch.equal(*cams["never"])
    assert not torch.equal(*cams["shared"])


def test_the_counter_counts_what_the_formula_says():
    output = run(helpers.step(helpers.config()))
    width, block = helpers.WIDTH, 0
    for images, tokens, times in ((2 * B, N, 3), (3 * B, N, 1), (2 * B, N // 4, 1), (2 * B, 9 * N // 4, 1)):
        block += images * times * (24 * tokens * width**2 + 4 * tokens**2 * width)
    patches = 2 * (B * N * (2 * 3 + 3) + 2 * B * (N // 4 + 9 * N // 4)) * 3 * helpers.PATCH**2 * width
    assert output.work.flops == DEPTH * block + patches
    one = DEPTH * (24 * N * width**2 + 4 * N**2 * width) + 2 * N * 3 * helpers.PATCH**2 * width
    assert output.work.units == pytest.approx(output.work.flops / one / B)


def test_the_official_step_takes_the_least_work():
    made = passes(helpers.step(helpers.config(OFFICIAL)))
    scales = (1.0, 0.5, 1.5)
    assert sorted(made) == sorted(
        [
            *(Pass(2 * B, scale, False, True) for scale in scales),  # view 2's auxiliary CAM for the mask
            Pass(2 * B, 1.0, True, False),
            *(Pass(2 * B, scale, False, False) for scale in scales),  # view 1's CAM
            Pass(2 * B, 1.0, False, False),  # teacher
        ]
    )
    assert units(made) == pytest.approx(22.2, abs=0.06)


def test_random_masks_need_no_cam_of_view_2():
    made = passes(helpers.step(helpers.config(OFFICIAL, {"optim": {"iterations": 20}})))
    assert not any(one.aux_only for one in made)
    assert units(made) == pytest.approx(22.2 - 7.76 * 10 / 12, abs=0.06)


OFF = {"affinity": 0.0, "segmentation": 0.0, "uncertain": 0.0, "class_token": 0.0, "energy": 0.0}


@pytest.mark.parametrize("preset", [{}, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize(
    ("weights", "paper", "official"),
    [
        ({}, 3.0, 3.0),  # classification alone: view 1 with gradient
        ({"affinity": 0.2}, 3 + 7.76, 3 + 7.76),
        ({"segmentation": 0.1}, 3 + 7.76, 3 + 7.76),
        ({"energy": 0.05}, 3 + 7.76, 3 + 7.76),
        ({"uncertain": 0.1}, 7.0, 6 + 1 + 6.47),
        ({"class_token": 0.1}, 8.0, 6 + 1 + 6.47),
    ],
    ids=lambda value: "+".join(value) or "classification" if isinstance(value, dict) else "",
)
def test_a_stage_whose_losses_weigh_0_is_not_computed(preset, weights, paper, official):
    step = helpers.step(helpers.config(preset, {"loss": {**OFF, **weights}}))
    assert units(passes(step)) == pytest.approx(official if preset else paper, abs=0.06)


@pytest.mark.parametrize(
    "weights",
    [{}, {"affinity": 0.2}, {"segmentation": 0.1}, {"energy": 0.05}, {"uncertain": 0.1}, {"class_token": 0.1}],
)
def test_only_losses_that_count_are_computed_and_they_add_up_by_their_weights(weights):
    output = run(helpers.step(helpers.config({"loss": {**OFF, "classification": 0.5, **weights}})))
    assert set(output.losses) == {"classification", *weights}
    expected = sum({"classification": 0.5, **weights}[name] * loss for name, loss in output.losses.items())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not any(loss.requires_grad for loss in output.losses.values())
    labelled = "segmentation" in weights or "energy" in weights
    assert (output.pseudo_labels is not None) == (output.cams is not None) == labelled
    assert (output.mask is not None) == bool(weights.keys() & {"uncertain", "class_token"})


def test_before_their_start_segmentation_and_energy_are_not_computed():
    step = helpers.step(helpers.config(OFFICIAL, {"loss": {"segmentation_start": 2}}))
    assert not run(step, 1).losses.keys() & {"segmentation", "energy"}
    assert run(step, 2).losses.keys() >= {"segmentation", "energy"}


def test_the_prototypes_are_compared_at_the_masked_patches_alone(monkeypatch):
    step = helpers.step(helpers.config())
    shapes = []
    forward = step.student.projector.forward

    def spy(tokens):
        shapes.append(tuple(tokens.shape[:-1]))
        return forward(tokens)

    monkeypatch.setattr(step.student.projector, "forward", spy)
    run(step)
    assert shapes == [(B * step.selector.shape.count + B,)], "and class tokens with them"


def test_the_aggregator_reads_one_view_of_student_and_teacher_each(monkeypatch):
    step = helpers.step(helpers.config())
    masks = []
    aggregate = step.student.encoder.aggregate

    def spy(tokens, mask=None):
        masks.append((len(tokens), mask is not None, torch.is_grad_enabled()))
        return aggregate(tokens, mask)

    monkeypatch.setattr(step.student.encoder, "aggregate", spy)
    run(step)
    assert sorted(masks) == [(B, False, False), (B, True, True)]


# --- what reads what


def test_the_uncertain_loss_reads_the_student_at_masked_patches_alone(monkeypatch):
    step = helpers.step(helpers.config({"loss": {**OFF, "classification": 0.0, "uncertain": 1.0}}))
    kept = []
    student_pass = step._pass_student

    def keep_tokens(*arguments):
        first, second = student_pass(*arguments)
        second.tokens.retain_grad()
        kept.append(second.tokens)
        return first, second

    monkeypatch.setattr(step, "_pass_student", keep_tokens)
    output = run(step)
    output.loss.backward()
    reached = kept[0].grad.abs().amax(2) > 0
    assert torch.equal(reached, output.mask)


def test_the_mask_covers_view_2_alone(monkeypatch):
    step = helpers.step(helpers.config())
    masks = []
    forward = step.student.encoder.forward

    def spy(images, mask=None, *arguments, **options):
        masks.append(mask)
        return forward(images, mask, *arguments, **options)

    monkeypatch.setattr(step.student.encoder, "forward", spy)
    output = run(step)
    (mask,) = [mask for mask in masks if mask is not None]
    assert not mask[:B].any()
    assert torch.equal(mask[B:], output.mask)
    assert mask[B:].sum(1).tolist() == [int(0.4 * N)] * B


def test_the_mask_is_guided_by_view_2_of_the_masked_images_own_classes():
    step = helpers.step(helpers.config({"mask": {"strategy": "cam_strict"}}))
    views, labels = helpers.views(B), helpers.labels(B)
    draws = step.draw(B, helpers.generator())
    schedule = schedule_at(step.config, LATE)
    mask = step(views, labels, draws, schedule).mask
    other_view_1 = step((views[0].flip(-1) * 0.5, views[1]), labels, draws, schedule).mask
    other_view_2 = step((views[0], views[1].flip(-1)), labels, draws, schedule).mask
    other_labels = step(views, labels.flip(0), draws, schedule).mask
    assert torch.equal(mask, other_view_1)
    assert not torch.equal(mask, other_view_2)
    assert not torch.equal(mask, other_labels)


@pytest.mark.parametrize("preset", [{}, OFFICIAL], ids=["paper", "official"])
def test_every_parameter_of_the_student_is_reached_and_none_of_the_teacher(preset):
    step = helpers.step(helpers.config(preset))
    run(step).loss.backward()
    for name, parameter in step.student.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("attn.k.bias"):  # the softmax does not change with it
            assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in step.teacher.parameters())


def test_in_bfloat16_the_same_parameters_are_reached_by_nearly_the_same_gradient():
    exact, rough = (helpers.step(helpers.config({"run": {"amp": amp}})) for amp in ("off", "bf16"))
    for step in (exact, rough):
        run(step).loss.backward()
    for (name, ours), theirs in zip(rough.student.named_parameters(), exact.student.parameters(), strict=True):
        assert ours.grad is not None, name
        assert (ours.grad != 0).any() or not (theirs.grad.abs() > 1e-8).any(), name
    ours, theirs = (
        torch.cat([parameter.grad.flatten() for parameter in step.student.parameters()]) for step in (rough, exact)
    )
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


# --- draws


def test_the_same_draws_give_the_same_losses_and_others_give_others():
    step = helpers.step(helpers.config({"model": {"stochastic_depth": 0.5}}))
    first, second, third = (run(step, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.mask, second.mask)
    assert first.losses["classification"] == second.losses["classification"]
    assert not torch.equal(first.mask, third.mask)
    assert first.losses["classification"] != third.losses["classification"]


@pytest.mark.parametrize("preset", [{}, OFFICIAL], ids=["paper", "official"])
def test_stochastic_depth_is_drawn_without_gradient_where_the_recipe_says_so(preset):
    draws = helpers.step(helpers.config(preset)).draw(B, helpers.generator())
    depth = (helpers.DEPTH, 2, 2 * B)
    assert draws.uniform.shape == (B, 4 if preset else N)
    assert draws.student.shape == depth
    if preset:
        assert draws.teacher.shape == depth
        assert [tuple(drop_path.shape) for drop_path in (*draws.cam, *draws.mask_cam)] == [depth] * 6
    else:
        assert (draws.teacher, draws.cam, draws.mask_cam) == (None, None, None)


def test_both_views_of_an_image_have_their_own_depth():
    drop_path = helpers.step(helpers.config({"model": {"stochastic_depth": 0.5}})).draw(8, helpers.generator()).student
    assert not torch.equal(drop_path[..., :8], drop_path[..., 8:])
