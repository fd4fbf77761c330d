import pytest
import torch

from fsr_fast.method.optim import build_optimiser, fill_missing_gradients, set_learning_rate
from tests import helpers

RECIPE = helpers.config({"optim": {"learning_rate": 1e-3, "head_factor": 10.0, "weight_decay": 0.05}})


def settings_by_name():
    network = helpers.network(RECIPE)
    optimiser = build_optimiser(network, RECIPE.optim)
    groups = {id(parameter): group for group in optimiser.param_groups for parameter in group["params"]}
    return {
        name: (groups[id(parameter)]["lr"], groups[id(parameter)]["weight_decay"])
        for name, parameter in network.named_parameters()
    }


def test_every_parameter_is_in_exactly_one_group():
    network = helpers.network(RECIPE)
    optimiser = build_optimiser(network, RECIPE.optim)
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert len(optimiser.param_groups) == 4


def test_decoder_projector_and_classifiers_learn_ten_times_as_fast_as_the_encoder():
    for name, (rate, _) in settings_by_name().items():
        head = name.split(".")[0] in ("decoder", "projector", "top_classifier", "aux_classifier")
        assert rate == pytest.approx(1e-2 if head else 1e-3), name


def test_vectors_position_embedding_class_token_and_mask_token_do_not_decay():
    settings = settings_by_name()
    exempt = {name for name, (_, decay) in settings.items() if decay == 0}
    for name in ("encoder.pos_embed", "encoder.cls_token", "encoder.mask_token"):
        assert name in exempt
    shapes = {name: parameter.ndim for name, parameter in helpers.network(RECIPE).named_parameters()}
    tokens = {"encoder.pos_embed", "encoder.cls_token", "encoder.mask_token"}
    assert exempt - tokens == {name for name, dimensions in shapes.items() if dimensions == 1}
    assert {decay for _, decay in settings.values()} == {0.0, 0.05}


def test_the_gain_of_the_prototypes_is_not_learnt():
    assert "projector.last_layer.weight_v" in settings_by_name()
    assert "projector.last_layer.weight_g" not in settings_by_name()


def test_the_rate_is_a_factor_on_the_base_rate_however_often_it_is_set():
    optimiser = build_optimiser(helpers.network(RECIPE), RECIPE.optim)
    base = [group["lr"] for group in optimiser.param_groups]
    for factor in (0.1, 0.5, 0.25):
        set_learning_rate(optimiser, factor)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.25 * rate for rate in base])


def test_the_base_rate_survives_saving_and_loading():
    first = build_optimiser(helpers.network(RECIPE), RECIPE.optim)
    set_learning_rate(first, 0.1)
    second = build_optimiser(helpers.network(RECIPE), RECIPE.optim)
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, 1.0)
    assert sorted(group["lr"] for group in second.param_groups) == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2])


def test_a_parameter_that_no_loss_reaches_gets_a_zero_gradient_and_decays():
    network = helpers.network(RECIPE)
    optimiser = build_optimiser(network, RECIPE.optim)
    weight = network.decoder.conv8.weight
    reached = network.top_classifier.weight
    reached.grad = torch.ones_like(reached)
    before = weight.detach().clone()
    fill_missing_gradients(optimiser)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(reached.grad, torch.ones_like(reached))
    optimiser.step()
    assert torch.allclose(weight, before * (1 - 1e-2 * 0.05), rtol=1e-6)


def test_two_steps_are_those_of_adamw():
    network = helpers.network(RECIPE)
    optimiser = build_optimiser(network, RECIPE.optim)
    weight = network.encoder.blocks[0].mlp.fc1.weight
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for count in (1, 2):
        gradient = torch.randn(weight.shape, generator=helpers.generator(count))
        weight.grad = gradient.clone()
        optimiser.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        update = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-3 * 0.05) - 1e-3 * update
    assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-7)
