import pytest
import torch
import torch.nn.functional as F

from fsr_fast import reference
from fsr_fast.kernels import MergedCams
from fsr_fast.method.cam import (
    dense_cams,
    merge_passes,
    merged_labels,
    multi_scale_passes,
    normalise_cam,
    scaled_size,
)
from tests import helpers

RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE)
SCALES = (1.0, 0.5, 1.5)


def features_equal(actual, expected) -> bool:
    return torch.allclose(actual.tokens, expected.tokens, rtol=1e-5, atol=1e-6) and torch.allclose(
        actual.aux, expected.aux, rtol=1e-5, atol=1e-6
    )


# --- passes


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((448, 448), 0.5, (224, 224)),
        ((448, 448), 1.5, (672, 672)),
        ((375, 500), 1.0, (368, 496)),
        ((375, 500), 1.25, (464, 624)),
        ((40, 10), 0.1, (16, 16)),
    ],
)
def test_a_scaled_image_has_whole_patches_and_at_least_one(size, scale, expected):
    assert scaled_size(size, scale, 16) == expected


@torch.no_grad()
def test_every_scale_is_passed_with_its_mirror_image():
    images, _ = helpers.views(3)
    passes = multi_scale_passes(NETWORK.encoder, images, SCALES)
    assert [scale_pass.plain.grid for scale_pass in passes] == [(4, 4), (2, 2), (6, 6)]
    for scale, scale_pass in zip(SCALES, passes, strict=True):
        scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        assert features_equal(scale_pass.plain, NETWORK.encoder(scaled))
        assert features_equal(scale_pass.mirrored, NETWORK.encoder(scaled.flip(-1)))


@torch.no_grad()
def test_known_features_of_scale_1_are_taken_as_they_are():
    images, _ = helpers.views()
    known = NETWORK.encoder(images)
    passes = multi_scale_passes(NETWORK.encoder, images, SCALES, first=known)
    assert passes[0].plain is known
    assert features_equal(passes[0].mirrored, NETWORK.encoder(images.flip(-1)))


@torch.no_grad()
def test_stochastic_depth_is_drawn_for_every_scale_images_first():
    images, _ = helpers.views()
    keep = [NETWORK.encoder.draw_drop_path(4, helpers.generator(seed)) for seed in range(len(SCALES))]
    keep = [factor * (1 + 0.1 * torch.rand(factor.shape)) for factor in keep]  # no two alike
    passes = multi_scale_passes(NETWORK.encoder, images, SCALES, drop_path=keep)
    scaled = F.interpolate(images, scale_factor=1.5, mode="bilinear", align_corners=False)
    assert features_equal(passes[2].plain, NETWORK.encoder(scaled, drop_path=keep[2][..., :2]))
    assert features_equal(passes[2].mirrored, NETWORK.encoder(scaled.flip(-1), drop_path=keep[2][..., 2:]))


@torch.no_grad()
def test_passes_for_the_auxiliary_features_stop_at_their_block():
    images, _ = helpers.views()
    whole = multi_scale_passes(NETWORK.encoder, images, SCALES)
    short = multi_scale_passes(NETWORK.encoder, images, SCALES, aux_only=True)
    for long_pass, short_pass in zip(whole, short, strict=True):
        assert torch.equal(short_pass.plain.aux, long_pass.plain.aux)
        assert torch.equal(short_pass.plain.tokens, short_pass.plain.aux)


# --- maps


@torch.no_grad()
@pytest.mark.parametrize("classifier", ["top", "aux"])
@pytest.mark.parametrize("output_size", [None, (16, 16), (4, 4)])
def test_merged_maps_are_those_of_the_reference(classifier, output_size):
    images, _ = helpers.views()
    labels = helpers.labels()
    passes = multi_scale_passes(NETWORK.encoder, images, SCALES)
    actual = merge_passes(
        NETWORK, passes, labels, classifier=classifier, max_classes=2, size=(32, 32), output_size=output_size
    )
    maps = reference.multi_scale_cams(NETWORK.state_dict(), images, heads=2, patch_size=8, scales=SCALES)
    sources = (maps.cams, maps.flipped) if classifier == "top" else (maps.aux_cams, maps.aux_flipped)
    expected = reference.merge_cams(*sources, labels, max_classes=2, size=(32, 32), output_size=output_size)
    assert torch.equal(actual.live, expected.live)
    assert torch.equal(actual.classes[actual.live], expected.classes[expected.live])
    assert torch.allclose(actual.values, expected.values, rtol=1e-5, atol=2e-5)
    assert expected.values.max() > 0.5


def test_normalised_maps_run_from_0_to_1_by_image_and_class():
    activation = torch.tensor([[[-1.0, 2.0], [4.0, 6.0]], [[1.0, 1.0], [2.0, 5.0]], [[-3.0, -2.0], [-1.0, -4.0]]])
    actual = normalise_cam(activation[None])
    expected = torch.tensor([[[0.0, 2.0], [4.0, 6.0]], [[0.0, 0.0], [1.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = expected / torch.tensor([6 + 1e-5, 4 + 1e-5, 1e-5]).view(3, 1, 1)
    assert torch.allclose(actual[0], expected, rtol=1e-6)


def merged(values, classes) -> MergedCams:
    classes = torch.tensor(classes)
    return MergedCams(torch.tensor(values), classes, torch.ones_like(classes, dtype=torch.bool))


def test_labels_are_certain_above_high_background_up_to_low_and_ignored_between():
    cams = merged([[[[0.0, 0.25, 0.250001, 0.7, 0.700001, 1.0]]]], [[4]])
    assert merged_labels(cams, high=0.7, low=0.25)[0, 0].tolist() == [0, 0, 255, 255, 5, 5]


def test_the_strongest_class_labels_a_pixel():
    cams = merged([[[[0.9, 0.8, 0.1]], [[0.8, 0.9, 0.2]]]], [[1, 2]])
    assert merged_labels(cams, high=0.7, low=0.25)[0, 0].tolist() == [2, 3, 0]


def test_labels_are_those_of_the_reference():
    labels = helpers.labels()
    cam = torch.rand(2, 3, 5, 7, generator=helpers.generator())
    index, live = reference.present_classes(labels, max_classes=2)
    values = cam.gather(1, index[:, :, None, None].expand(-1, -1, 5, 7)) * live[:, :, None, None]
    actual = merged_labels(MergedCams(values, index, live), high=0.7, low=0.25)
    assert torch.equal(actual, reference.cam_to_labels(cam, labels, high=0.7, low=0.25))


def test_spread_maps_lie_at_their_classes_and_absent_classes_are_0():
    cams = MergedCams(
        torch.stack([torch.full((2, 1, 1), 0.5), torch.tensor([[[0.3]], [[0.0]]])]),
        torch.tensor([[1, 3], [2, 0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    assert torch.allclose(dense_cams(cams, 4)[:, :, 0, 0], torch.tensor([[0, 0.5, 0, 0.5], [0, 0, 0.3, 0]]))
