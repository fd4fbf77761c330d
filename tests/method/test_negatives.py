"""Images that show no class, beside others in a batch and alone: every loss, mask, pseudo label and CAM.

The step of a batch without any class is compared with the reference in `tests/parity/test_whole_step.py`.
"""

import pytest
import torch

from fsr_fast import kernels, reference
from fsr_fast.method.schedules import schedule_at
from tests import helpers

MIXED = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
NONE = torch.zeros(2, 3)
BOTH = pytest.mark.parametrize("labels", [MIXED, NONE], ids=["mixed", "none"])


@BOTH
@pytest.mark.parametrize("recipe", [{}, helpers.OFFICIAL], ids=["paper", "official"])
def test_every_loss_is_finite_and_pulls_the_classifier_down(labels, recipe):
    step = helpers.step(helpers.config(recipe))
    draws = step.draw(2, helpers.generator())
    output = step(helpers.views(), labels, draws, schedule_at(step.config, 3))
    output.loss.backward()
    assert {"classification", "affinity", "segmentation", "uncertain", "class_token"} <= output.losses.keys()
    assert all(loss.isfinite() for loss in output.losses.values())
    gradients = [parameter.grad for parameter in step.student.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (output.pseudo_labels[0] == 0).all()
    assert (output.cams.values[0] == 0).all()
    assert not output.cams.live[0].any()


def test_the_classifier_s_loss_of_an_image_without_a_class_asks_for_low_scores():
    logits = torch.tensor([[2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = reference.classification_loss(logits, logits, torch.zeros(1, 2, dtype=torch.float64))
    expected = torch.nn.functional.softplus(logits).mean() * 2
    assert torch.allclose(loss, expected, rtol=0, atol=1e-9)
    loss.backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("module", [kernels, reference], ids=["fast", "reference"])
def test_without_a_class_the_mask_is_that_of_the_draws_alone(module):
    draws = torch.Generator().manual_seed(0)
    features, weight = torch.randn(2, 12, 8, generator=draws), torch.randn(3, 8, generator=draws)
    uniform = torch.rand(2, 12, generator=draws)
    found = module.uncertain_mask(features, weight, MIXED, uniform, k=5)
    expected = torch.zeros(12, dtype=torch.bool)
    expected[uniform[0].topk(5).indices] = True
    assert torch.equal(found.mask[0], expected)
    assert found.mask.sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("module", [kernels, reference], ids=["fast", "reference"])
def test_pseudo_labels_of_no_class_are_background_everywhere(module):
    draws = torch.Generator().manual_seed(0)
    classes, live = module.present_classes(MIXED, max_classes=2)
    cams = torch.rand(2, 2, 6, 6, generator=draws) * live[:, :, None, None]
    labels = module.refine_pseudo_labels(
        torch.rand(2, 3, 6, 6, generator=draws), cams, classes, live, size=(12, 12), iterations=2, dilations=(1, 2)
    )
    assert (labels[0] == 0).all()
    assert (labels[1] != 0).any()


@pytest.mark.parametrize("module", [kernels, reference], ids=["fast", "reference"])
def test_merged_cams_of_no_class_are_zero(module):
    draws = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 4, 4, generator=draws) for _ in range(2)]
    merged = module.merge_cams(maps[:1], maps[1:], MIXED, max_classes=2, size=(8, 8))
    assert (merged.values[0] == 0).all()
    assert merged.live.tolist() == [[False, False], [True, True]]
    assert merged.values[1].amax() > 0.9
