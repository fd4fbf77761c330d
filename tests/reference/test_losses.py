import math

import pytest
import torch
from torch import Tensor

from fsr_fast.reference import (
    affinity_loss,
    affinity_sums,
    classification_loss,
    dense_energy,
    distillation_loss,
    segmentation_loss,
    segmentation_sums,
)


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_value(actual: Tensor, expected: float) -> None:
    assert actual.item() == pytest.approx(expected, rel=1e-12)


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def test_classification_loss_adds_both_classifiers_means():
    logits, aux_logits, labels = double([[2.0, -1.0]]), double([[0.0, 0.0]]), torch.tensor([[1, 0]])
    softplus = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1))]
    assert_value(classification_loss(logits, aux_logits, labels), sum(softplus) / 2 + math.log(2))


STUDENT, TEACHER = double([[1.0, 0.0], [0.0, 1.0]]), double([[0.6, 0.8], [1.0, 0.0]])
HEAD, CENTRE = double([[3.0, 0.0], [0.0, 5.0]]), double([0.1, 0.3])


def distillation_by_hand(teacher_temperature: float) -> list[float]:
    # the heads' rows have the axes' directions, so the logits are the vectors themselves
    losses = []
    for student, teacher in ((1.0, 0.0), (0.6, 0.8)), ((0.0, 1.0), (1.0, 0.0)):
        scores = [math.exp((t - c) / teacher_temperature) for t, c in zip(teacher, (0.1, 0.3), strict=True)]
        losses.append(
            sum(scores[i] / sum(scores) * cross_entropy([value / 0.1 for value in student], i) for i in range(2))
        )
    return losses


def test_distillation_loss_is_the_mean_cross_entropy():
    expected = distillation_by_hand(0.04)
    assert_value(distillation_loss(STUDENT, TEACHER, HEAD, HEAD, CENTRE), sum(expected) / 2)


def test_distillation_loss_takes_weights_and_a_temperature_on_the_device():
    first, second = distillation_by_hand(0.07)
    loss = distillation_loss(
        STUDENT, TEACHER, HEAD, HEAD, CENTRE, teacher_temperature=double(0.07), weight=double([0.25, 2.0])
    )
    assert_value(loss, 0.25 * first + 2.0 * second)


def test_distillation_loss_teaches_the_student_only_and_ignores_the_length_of_head_rows():
    tensors = [t.clone().requires_grad_() for t in (STUDENT, TEACHER, HEAD, HEAD, CENTRE)]
    distillation_loss(*tensors).backward()
    student, teacher, student_head, teacher_head, centre = tensors
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert teacher_head.grad is None
    assert centre.grad is None
    # weight normalisation: moving a row along itself changes nothing
    torch.testing.assert_close((student_head.grad * student_head).sum(dim=1), double([0.0, 0.0]), rtol=0, atol=1e-12)
    assert student_head.grad.abs().sum() > 0


FEATURES = double([[[2.0, 0.0], [-3.0, 0.0], [1.0, 1.0]]])


def test_affinity_of_three_vectors():
    # |cos| = 1 between the first two, 1/√2 between each of them and the third; ordered pairs count twice
    sums = affinity_sums(FEATURES, torch.tensor([[1, 1, 2]]))
    torch.testing.assert_close(sums, double([2, 2, 4 / math.sqrt(2), 4]), rtol=1e-12, atol=0)
    loss = affinity_loss(FEATURES, torch.tensor([[1, 1, 2]]))
    assert_value(loss, 0.5 * (1 - 2 / 3) + 0.5 * 4 / math.sqrt(2) / 5)


def test_affinity_leaves_out_unknown_patches_and_counts_background_as_a_class():
    sums = affinity_sums(FEATURES, torch.tensor([[0, 255, 2]]))
    torch.testing.assert_close(sums, double([0, 0, 2 / math.sqrt(2), 2]), rtol=1e-12, atol=0)
    assert_value(affinity_loss(FEATURES, torch.tensor([[255, 255, 255]])), 0.5)


def test_affinity_pairs_patches_of_one_image_only_and_counts_over_the_batch():
    sums = affinity_sums(FEATURES.expand(2, -1, -1), torch.tensor([[1, 255, 2], [1, 1, 255]]))
    torch.testing.assert_close(sums, double([2, 2, 2 / math.sqrt(2), 2]), rtol=1e-12, atol=0)


def test_affinity_gives_a_zero_vector_no_gradient_trouble():
    features = torch.zeros(1, 3, 2, requires_grad=True)
    affinity_loss(features, torch.tensor([[1, 1, 2]])).backward()
    assert torch.isfinite(features.grad).all()


def test_affinity_gradient_is_that_of_the_loss():
    features = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 1, 1, 255], [2, 2, 0, 1]])
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, labels), (features,))


def test_segmentation_loss_weighs_background_and_foreground_alike():
    logits = double([[1.0, 0.0, 3.0], [0.0, 2.0, -1.0]]).reshape(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, 0]]], dtype=torch.uint8)
    background = [cross_entropy([1.0, 0.0], 0), cross_entropy([3.0, -1.0], 0)]
    foreground = cross_entropy([0.0, 2.0], 1)
    torch.testing.assert_close(
        segmentation_sums(logits, labels), double([sum(background), 2, foreground, 1]), rtol=1e-12, atol=0
    )
    assert_value(segmentation_loss(logits, labels), 0.5 * (sum(background) / 2 + foreground))


def test_segmentation_loss_resizes_logits_between_pixel_centres():
    logits = double([[0.0, 4.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    labels = torch.tensor([[[0, 0, 0, 0]]])
    expected = sum(cross_entropy([value, 0.0], 0) for value in (0.0, 1.0, 3.0, 4.0)) / 4
    assert_value(segmentation_loss(logits, labels), 0.5 * expected)


@pytest.mark.parametrize("label", [0, 1, 255])
def test_segmentation_loss_of_an_empty_set_is_zero_and_never_nan(label):
    logits = double([[1.0], [0.0]]).reshape(1, 2, 1, 1).requires_grad_()
    loss = segmentation_loss(logits, torch.full((1, 1, 1), label, dtype=torch.uint8))
    loss.backward()
    assert_value(loss, 0.0 if label == 255 else 0.5 * cross_entropy([1.0, 0.0], label))
    assert torch.isfinite(logits.grad).all()


def dense_energy_by_hand(probabilities: Tensor, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    B, channels, h, w = probabilities.shape
    pixels = [(y, x) for y in range(h) for x in range(w)]
    energy, gradient = 0.0, torch.zeros_like(probabilities)
    for b in range(B):
        for y, x in pixels:
            gate = 1.0 if labels[b, y, x] == 255 else max(0.0, 1.0 - max(probabilities[b, :, y, x].tolist()))
            for v, u in pixels:
                colour = sum((images[b, c, y, x].item() - images[b, c, v, u].item()) ** 2 for c in range(3))
                kernel = math.exp(-colour / (2 * 20.0**2) - ((y - v) ** 2 + (x - u) ** 2) / (2 * 3.0**2))
                for c in range(channels):
                    other = probabilities[b, c, v, u].item()
                    energy -= kernel * gate * probabilities[b, c, y, x].item() * other / B
                    gradient[b, c, y, x] -= 2 * gate * kernel * other / B
    return energy, gradient


def test_dense_energy_agrees_with_loops_over_pixels_and_classes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=generator)
    probabilities = logits.softmax(dim=1).requires_grad_()
    images = torch.rand(2, 3, 3, 4, dtype=torch.float64, generator=generator) * 60
    labels = torch.randint(0, 3, (2, 3, 4), generator=generator).to(torch.uint8)
    labels[0, 1, 1:3] = 255
    energy, gradient = dense_energy_by_hand(probabilities.detach(), images, labels)
    actual = dense_energy(probabilities, images, labels, sigma_rgb=20.0, sigma_xy=3.0)
    actual.backward()
    assert_value(actual, energy)
    torch.testing.assert_close(probabilities.grad, gradient, rtol=1e-12, atol=0)


def test_dense_energy_of_sure_pixels_counts_only_where_the_label_is_unknown():
    probabilities = double([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)
    images = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    assert_value(dense_energy(probabilities, images, torch.tensor([[[0, 1]]])), 0.0)
    pair = 1 + math.exp(-0.5 / 50**2)
    assert_value(dense_energy(probabilities, images, torch.tensor([[[0, 255]]])), -pair)


def test_single_precision_stays_near_double():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 20, 8, generator=generator)
    labels = torch.randint(0, 3, (2, 20), generator=generator)
    logits, segments = (
        torch.randn(2, 3, 5, 4, generator=generator),
        torch.randint(0, 3, (2, 20, 16), generator=generator),
    )
    for loss, double_loss in (
        (affinity_loss(features, labels), affinity_loss(features.double(), labels)),
        (segmentation_loss(logits, segments), segmentation_loss(logits.double(), segments)),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(double_loss.item(), rel=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="labels has shape"):
        affinity_loss(FEATURES, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="centre has shape"):
        distillation_loss(STUDENT, TEACHER, HEAD, HEAD, torch.zeros(3))
    with pytest.raises(ValueError, match="images has shape"):
        dense_energy(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 4), torch.zeros(1, 3, 3))
