import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fsr_fast import reference
from fsr_fast.config import PseudoLabelConfig
from fsr_fast.kernels import MergedCams
from fsr_fast.method.pseudo_labels import generate_pseudo_labels, half_size
from tests import helpers

NETWORK = helpers.network(helpers.config({"model": {"normalisation": "imagenet"}}))


def test_denormalised_images_have_whole_grey_levels_rounded_down():
    grey = torch.tensor([0.4, 17.6, 99.99, 254.9]).expand(1, 3, 1, 4)
    actual = NETWORK.denormalise(helpers.normalised(grey, NETWORK))
    assert actual.tolist() == [[[[0.0, 17.0, 99.0, 254.0]]] * 3]


def test_denormalised_images_stay_within_0_and_255():
    images = torch.tensor([-9.0, 9.0]).expand(1, 3, 1, 2)
    assert NETWORK.denormalise(images).tolist() == [[[[0.0, 255.0]]] * 3]


def test_denormalising_is_that_of_the_reference_at_every_grey_level():
    images = helpers.normalised(torch.arange(256.0).expand(1, 3, 1, 256), NETWORK)
    expected = reference.denormalise_images(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    actual = NETWORK.denormalise(images)
    assert torch.equal(actual, expected)
    assert (actual - torch.arange(256.0)).abs().max() <= 1


def test_normalising_8_bit_pixels_is_undone_exactly_but_for_the_rounding_down():
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    torch.testing.assert_close(NETWORK.normalise(pixels), helpers.normalised(pixels, NETWORK))
    assert torch.equal(NETWORK.grey_levels(NETWORK.normalise(pixels)).round(), pixels.float())


@pytest.mark.parametrize(("size", "half"), [((448, 448), (224, 224)), ((33, 47), (16, 23)), ((1, 2), (1, 1))])
def test_half_a_size_is_rounded_down_to_at_least_one_pixel(size, half):
    assert half_size(size) == half


def test_pseudo_labels_are_those_of_the_reference_from_start_to_end():
    size, half = (24, 32), (12, 16)
    generator = helpers.generator(3)
    shapes = torch.nn.functional.interpolate(torch.rand(2, 3, 3, 4, generator=generator), size=size, mode="bilinear")
    images = helpers.normalised(255 * shapes, NETWORK)
    labels = helpers.labels()
    cam = torch.nn.functional.interpolate(1.3 * torch.rand(2, 3, 4, 4, generator=generator), size=size).clamp(max=1)
    expected = reference.generate_pseudo_labels(
        images, cam, labels, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD
    )
    classes, live = reference.present_classes(labels, max_classes=2)
    halved = torch.nn.functional.interpolate(cam, size=half, mode="bilinear", align_corners=False)
    values = halved.gather(1, classes[:, :, None, None].expand(-1, -1, *half)) * live[:, :, None, None]
    actual = generate_pseudo_labels(NETWORK.denormalise(images), MergedCams(values, classes, live), PseudoLabelConfig())
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, expected)
    assert set(actual[0].unique().tolist()) == {0, 1, 255}
    assert set(actual[1].unique().tolist()) == {2, 3, 255}


def test_thresholds_iterations_and_dilations_are_those_of_the_configuration():
    images = 255 * torch.rand(1, 3, 16, 16, generator=helpers.generator())
    values = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    cams = MergedCams(values, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))

    def ignored(**changes) -> int:
        config = PseudoLabelConfig(dilations=(1,), iterations=1).model_copy(update=changes)
        return int((generate_pseudo_labels(images, cams, config) == 255).sum())

    usual = ignored()
    assert usual > 0
    assert ignored(high=0.9) > usual > ignored(low=0.6)
    assert ignored(iterations=20) != usual
    assert ignored(dilations=(4,)) != usual
