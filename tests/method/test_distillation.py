import pytest
import torch
import torch.nn.functional as F

from fsr_fast import reference
from fsr_fast.config import TeacherConfig
from fsr_fast.method.distillation import Distillation, gather_tokens
from fsr_fast.method.masking import MaskedPatches
from fsr_fast.method.teacher import Teacher
from fsr_fast.models.projector import Projector
from tests import helpers

B, N, K, E = 3, 6, 16, 8
INDEX = torch.tensor([[0, 2], [1, 5], [3, 4]])
MASK = torch.zeros(B, N, dtype=torch.bool).scatter(1, INDEX, True)
MASKED = MaskedPatches(MASK, INDEX, None)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, E, generator=helpers.generator(seed)), dim=-1)


def projectors() -> tuple[Projector, Projector]:
    torch.manual_seed(0)
    return Projector(helpers.WIDTH, 16, E, K), Projector(helpers.WIDTH, 16, E, K).requires_grad_(False)


HEADS = projectors()
DIRECTIONS = (HEADS[0].directions.detach(), HEADS[1].directions)


def distillation() -> Distillation:
    module = Distillation(TeacherConfig(), K)
    module.patch_centre.copy_(0.1 * torch.randn(K, generator=helpers.generator(8)))
    module.class_centre.copy_(0.1 * torch.randn(K, generator=helpers.generator(9)))
    return module


def prototype_logits(teacher: torch.Tensor) -> torch.Tensor:
    return teacher @ F.normalize(HEADS[1].head, dim=-1).T


# --- losses


def test_the_patch_loss_is_the_mean_over_masked_patches_and_images():
    module, student, teacher = distillation(), vectors(B, 2), vectors(B, N, seed=1)
    centre = module.patch_centre.clone()
    loss = module.patch_loss(student, teacher, MASKED, DIRECTIONS, 0.05)
    expected = [
        reference.distillation_loss(
            student[image],
            teacher[image][MASK[image]],
            HEADS[0].head,
            HEADS[1].head,
            centre,
            teacher_temperature=0.05,
        )
        for image in range(B)
    ]
    assert loss.item() == pytest.approx(sum(expected).item() / B, rel=1e-5)


def test_the_patch_loss_reads_no_unmasked_patch_of_the_teacher():
    student, teacher = vectors(B, 2), vectors(B, N, seed=1)
    other = torch.where(MASK[..., None], teacher, vectors(B, N, seed=2))
    losses = [distillation().patch_loss(student, patches, MASKED, DIRECTIONS, 0.04) for patches in (teacher, other)]
    assert torch.equal(*losses)
    changed = torch.where(MASK[..., None], vectors(B, N, seed=2), teacher)
    assert not torch.allclose(distillation().patch_loss(student, changed, MASKED, DIRECTIONS, 0.04), losses[0])


def test_the_weights_of_a_strict_mask_weigh_every_image_alike_however_many_patches_it_masks():
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, :1], mask[1, :5] = True, True  # the third image has none
    index = torch.arange(N).expand(B, N)
    masked = MaskedPatches(mask, index, mask / (mask.sum(1, keepdim=True).clamp(min=1) * B))
    module, student, teacher = distillation(), vectors(B, N), vectors(B, N, seed=1)
    centre = module.patch_centre.clone()
    loss = module.patch_loss(student, teacher, masked, DIRECTIONS, 0.04)
    expected = sum(
        reference.distillation_loss(
            student[image][mask[image]], teacher[image][mask[image]], HEADS[0].head, HEADS[1].head, centre
        )
        for image in range(2)
    )
    assert loss.item() == pytest.approx(expected.item() / B, rel=1e-5)


def test_a_mask_without_patches_counts_0():
    masked = MaskedPatches(torch.zeros(B, N, dtype=torch.bool), torch.empty(B, 0, dtype=torch.int64), None)
    student = vectors(B, 0).requires_grad_()
    loss = distillation().patch_loss(student, vectors(B, N), masked, DIRECTIONS, 0.04)
    assert loss.item() == 0
    loss.backward()


def test_the_class_loss_is_the_mean_over_the_batch():
    module, student, teacher = distillation(), vectors(B), vectors(B, seed=1)
    centre = module.class_centre.clone()
    loss = module.class_loss(student, teacher, DIRECTIONS, 0.06)
    expected = reference.distillation_loss(
        student, teacher, HEADS[0].head, HEADS[1].head, centre, teacher_temperature=0.06
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_centre_before_it_moved():
    teacher = vectors(B, seed=1)
    actual, expected = vectors(B).requires_grad_(), vectors(B).requires_grad_()
    module = distillation()
    centre = module.class_centre.clone()
    module.class_loss(actual, teacher, DIRECTIONS, 0.04).backward()
    reference.distillation_loss(expected, teacher, HEADS[0].head, HEADS[1].head, centre).backward()
    assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_the_student_s_temperature_is_the_configuration_s():
    module = Distillation(TeacherConfig(student_temperature=0.5), K)
    loss = module.class_loss(vectors(B), vectors(B, seed=1), DIRECTIONS, 0.04)
    expected = reference.distillation_loss(
        vectors(B), vectors(B, seed=1), HEADS[0].head, HEADS[1].head, torch.zeros(K), student_temperature=0.5
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --- centres


def test_the_patch_centre_moves_by_a_tenth_to_the_mean_of_the_teacher_s_logits_of_all_patches():
    module, teacher = distillation(), vectors(B, N, seed=1)
    before, class_centre = module.patch_centre.clone(), module.class_centre.clone()
    module.patch_loss(vectors(B, 2), teacher, MASKED, DIRECTIONS, 0.04)
    expected = 0.9 * before + 0.1 * prototype_logits(teacher).mean((0, 1))
    assert torch.allclose(module.patch_centre, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(module.class_centre, class_centre)


def test_the_class_centre_moves_by_a_tenth_to_the_mean_of_the_teacher_s_class_logits():
    module, teacher = distillation(), vectors(B, seed=1)
    before, patch_centre = module.class_centre.clone(), module.patch_centre.clone()
    module.class_loss(vectors(B), teacher, DIRECTIONS, 0.04)
    expected = 0.9 * before + 0.1 * prototype_logits(teacher).mean(0)
    assert torch.allclose(module.class_centre, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(module.patch_centre, patch_centre)


def test_centres_move_in_float32_under_autocast():
    teacher, moved = vectors(B, seed=1), []
    for half in (False, True):
        module = distillation()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            module.class_loss(vectors(B), teacher, DIRECTIONS, 0.05)
        moved.append(module.class_centre)
    assert torch.equal(*moved)


def test_centres_are_part_of_the_state():
    assert set(distillation().state_dict()) == {"patch_centre", "class_centre"}


def test_gathered_tokens_are_those_of_the_index():
    tokens = torch.arange(B * N * 2).view(B, N, 2)
    actual = gather_tokens(tokens, INDEX)
    assert torch.equal(actual, torch.stack([tokens[image][INDEX[image]] for image in range(B)]))


# --- teacher


def moved_student(recipe):
    student = helpers.network(recipe)
    teacher = Teacher(student, recipe.teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.ones_like(parameter))
    return student, teacher


def test_at_momentum_0_only_the_projector_is_copied():
    recipe = helpers.config()
    _, teacher = moved_student(recipe)
    assert teacher.network is None
    assert all(name.startswith("own_projector.") for name in teacher.state_dict())


def test_the_projector_follows_by_its_momentum():
    student, teacher = moved_student(helpers.config())
    before = [parameter.clone() for parameter in teacher.projector.parameters()]
    teacher.update_ema(student, 0.0, 0.996)
    for old, new, target in zip(before, teacher.projector.parameters(), student.projector.parameters(), strict=True):
        assert torch.allclose(new, 0.996 * old + 0.004 * target, rtol=1e-5, atol=1e-6)
        assert not torch.equal(new, old)


def test_above_momentum_0_a_copy_of_the_whole_network_follows_each_part_by_its_momentum():
    student, teacher = moved_student(helpers.config({"teacher": {"encoder_momentum": 0.9}}))
    before = {name: parameter.clone() for name, parameter in teacher.network.named_parameters()}
    assert set(before) == {name for name, _ in student.named_parameters()}
    teacher.update_ema(student, 0.9, 0.99)
    assert teacher.projector is teacher.network.projector
    for name, parameter in student.named_parameters():
        momentum = 0.99 if name.startswith("projector.") else 0.9
        expected = momentum * before[name] + (1 - momentum) * parameter
        assert torch.allclose(teacher.network.get_parameter(name), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_teacher_asks_for_no_gradient_and_shares_no_weight_with_the_student(momentum):
    student, teacher = moved_student(helpers.config({"teacher": {"encoder_momentum": momentum}}))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
