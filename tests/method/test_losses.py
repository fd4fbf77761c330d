import math

import pytest
import torch
import torch.nn.functional as F

from fsr_fast import reference
from fsr_fast.method import losses
from fsr_fast.method.losses import affinity_loss, classification_loss, energy_loss, segmentation_loss
from tests import helpers


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=helpers.generator(seed))


# --- classification


def test_classification_is_the_mean_binary_cross_entropy_of_both_classifiers_added():
    top, aux = torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[0.5, 0.5], [0.0, -2.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def cross_entropy(logit: float, label: float) -> float:
        probability = 1 / (1 + math.exp(-logit))
        return -math.log(probability if label else 1 - probability)

    expected = sum(
        cross_entropy(logits[row][column].item(), labels[row][column].item()) / 4
        for logits in (top, aux)
        for row in range(2)
        for column in range(2)
    )
    assert classification_loss(top, aux, labels).item() == pytest.approx(expected, rel=1e-6)


def test_classification_is_computed_in_float32():
    top, aux, labels = draw(2, 3), draw(2, 3, seed=1), helpers.labels()
    exact = classification_loss(top.bfloat16().float(), aux.bfloat16().float(), labels)
    actual = classification_loss(top.bfloat16(), aux.bfloat16(), labels)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, exact)


# --- sums over all processes


FEATURES, PATCH_LABELS = draw(4, 9, 5), torch.randint(0, 3, (4, 9), generator=helpers.generator(1))
LOGITS, PIXEL_LABELS = draw(4, 3, 5, 5), torch.randint(0, 3, (4, 12, 12), generator=helpers.generator(2))
PATCH_LABELS[:, 0], PIXEL_LABELS[:, 0] = 255, 255
PATCH_LABELS[2:], PIXEL_LABELS[2:] = PATCH_LABELS[2:].clamp(max=0), PIXEL_LABELS[2:].clamp(max=0)  # no class there
CASES = {
    "affinity": (affinity_loss, reference.affinity_loss, FEATURES, PATCH_LABELS),
    "segmentation": (segmentation_loss, reference.segmentation_loss, LOGITS, PIXEL_LABELS),
}


@pytest.mark.parametrize("name", CASES)
def test_with_one_process_the_global_loss_is_the_loss_of_its_batch(name):
    loss, literal, values, labels = CASES[name]
    actual, expected = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss(actual, labels).backward()
    literal(expected, labels).backward()
    assert loss(values, labels).item() == pytest.approx(literal(values, labels).item(), rel=1e-5)
    assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_averaged_over_two_processes_the_global_loss_is_that_of_the_whole_batch(name, monkeypatch):
    loss, literal, values, labels = CASES[name]
    parts = list(zip(values.split(2), labels.split(2), strict=True))
    if name == "affinity":
        counts = sum(losses.affinity_sums(*part)[[1, 3]] for part in parts)
    else:
        counts = losses.segmentation_counts(labels)
    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda local: counts)
    leaves = [part.clone().requires_grad_() for part, _ in parts]
    shares = [loss(leaf, label) for leaf, (_, label) in zip(leaves, parts, strict=True)]
    (sum(shares) / 2).backward()
    whole = values.clone().requires_grad_()
    expected = literal(whole, labels)
    expected.backward()
    assert (sum(shares) / 2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(torch.cat([leaf.grad for leaf in leaves]), whole.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_normalised_by_process_the_loss_is_that_of_the_process_alone(name, monkeypatch):
    loss, literal, values, labels = CASES[name]
    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda local: local + 100)
    assert loss(values, labels, "process").item() == pytest.approx(literal(values, labels).item(), rel=1e-5)
    assert loss(values, labels, "global").item() != pytest.approx(literal(values, labels).item(), rel=1e-2)


def test_a_batch_without_certain_pixels_counts_0():
    logits = LOGITS.clone().requires_grad_()
    loss = segmentation_loss(logits, torch.full((4, 12, 12), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_a_batch_without_certain_patches_has_no_gradient():
    features = FEATURES.clone().requires_grad_()
    loss = affinity_loss(features, torch.full((4, 9), 255))
    loss.backward()
    assert loss.item() == 0.5  # no pair to draw together, none to push apart
    assert features.grad.abs().max() == 0


# --- dense energy


def test_the_energy_is_taken_at_half_resolution_and_scaled():
    size, half = (12, 16), (6, 8)
    images = 255 * torch.rand(2, 3, *size, generator=helpers.generator(3))
    labels = torch.randint(0, 3, (2, *size), generator=helpers.generator(4)).to(torch.uint8)
    labels[0, :6] = 255
    logits = draw(2, 3, 3, 4)
    resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1)
    probabilities = F.interpolate(resized, size=half, mode="bilinear", align_corners=False)
    expected = 1e-7 * reference.dense_energy(probabilities, images[..., ::2, ::2], labels[..., ::2, ::2])
    actual = energy_loss(logits, images, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert actual.item() < 0


def test_the_energy_draws_the_classes_of_like_pixels_together():
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 255
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 1, :, :2] = 1.0
    logits[0, :, 1, 1] = torch.tensor([1.0, 0.0])  # one pixel disagrees with its colour
    logits.requires_grad_()
    energy_loss(logits, images, torch.full((1, 8, 8), 255, dtype=torch.uint8)).backward()
    descent = -logits.grad
    assert descent[0, 1, 1, 1] > 0 > descent[0, 0, 1, 1]
