import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsr_fast.reference import cam_to_labels, class_activation_map, merge_cams, normalise_cam, present_classes

ONE = torch.ones(1, 1)


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def merge_rows(cam: list[float], flipped: list[float], width: int) -> Tensor:
    merged = merge_cams(
        [double(cam).reshape(1, 1, 1, -1)], [double(flipped).reshape(1, 1, 1, -1)], ONE, max_classes=1, size=(1, width)
    )
    return merged.values.flatten()


def test_class_activation_map_projects_features_and_keeps_the_positive():
    features = double([[1.0, -2.0], [3.0, 4.0]]).reshape(1, 2, 1, 2)
    assert class_activation_map(features, double([[1.0, 1.0], [1.0, 0.0]])).tolist() == [[[[4.0, 2.0]], [[1.0, 0.0]]]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_normalised_maps_reach_from_zero_to_almost_one(values):
    cam = normalise_cam(double(values).reshape(1, 1, 1, -1))
    spread = max(values) - min(values)
    assert cam.min() == 0
    assert cam.max().item() == pytest.approx(spread / (spread + 1e-5), rel=1e-9)


def test_every_map_is_normalised_by_itself():
    cam = normalise_cam(double([[[[1.0, 3.0]], [[0.0, 8.0]]], [[[5.0, 5.0]], [[2.0, 4.0]]]]))
    expected = double([[[[0, 2 / 2.00001]], [[0, 8 / 8.00001]]], [[[0, 0]], [[0, 2 / 2.00001]]]])
    torch.testing.assert_close(cam, expected, rtol=1e-12, atol=0)


def test_merging_takes_the_maximum_with_the_map_of_the_mirror_image_turned_back():
    # turned back, the mirrored map is 0 0 3; the maximum of both is 1 1 4
    torch.testing.assert_close(merge_rows([1, 1, 4], [3, 0, 0], 3), double([0, 0, 3]) / 3.00001, rtol=1e-12, atol=0)
    # 2 1 0 against 0 0 1
    torch.testing.assert_close(merge_rows([0, 0, 1], [0, 1, 2], 3), double([1, 0, 0]) / 1.00001, rtol=1e-12, atol=0)


def test_merging_drops_the_negative_before_resizing():
    torch.testing.assert_close(merge_rows([-4, 4], [0, 0], 4), double([0, 1, 3, 4]) / 4.00001, rtol=1e-12, atol=0)


def test_merging_sums_the_scales_before_normalising():
    small, large = double([[[[4.0]]]]), double([[[[0.0, 1.0]]]])
    zeros = [torch.zeros_like(small), torch.zeros_like(large)]
    merged = merge_cams([small, large], zeros, ONE, max_classes=1, size=(1, 2))
    torch.testing.assert_close(merged.values.flatten(), double([0, 1 / 1.00001]), rtol=1e-12, atol=0)


def test_merged_maps_are_normalised_at_full_size_and_then_resized():
    # halved, the maps' means of 2 x 2 pixels: (0 + 0 + 2 + 2) / 4 and (0 + 4 + 2 + 2) / 4, still over the full maximum
    cam = double([[0, 0, 0, 4.0], [2, 2, 2, 2]]).reshape(1, 1, 2, 4)
    merged = merge_cams([cam], [torch.zeros_like(cam)], ONE, max_classes=1, size=(2, 4), output_size=(1, 2))
    torch.testing.assert_close(merged.values.flatten(), double([1, 2]) / 4.00001, rtol=1e-12, atol=0)


def test_merged_maps_lie_in_the_slots_of_the_present_classes():
    cams = torch.rand(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    merged = merge_cams([cams], [torch.zeros_like(cams)], labels, max_classes=3, size=(3, 5))
    assert merged.live.tolist() == [[True, True, False], [False, False, False]]
    assert merged.classes[0, :2].tolist() == [1, 3]
    torch.testing.assert_close(merged.values[0, :2], normalise_cam(cams[0, [1, 3]]), rtol=1e-12, atol=0)
    assert torch.count_nonzero(merged.values[~merged.live]) == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 7))
def test_present_classes_are_the_first_ones_in_ascending_order(present, max_classes):
    index, live = present_classes(torch.tensor([present]).float(), max_classes=max_classes)
    expected = [c for c, there in enumerate(present) if there][:max_classes]
    assert index[live].tolist() == expected
    assert live[0].tolist() == [True] * len(expected) + [False] * (max_classes - len(expected))


def test_label_thresholds_are_strict_above_and_inclusive_below():
    cam = double([0.875, 0.75, 0.5, 0.25, 0.125]).reshape(1, 1, 1, 5)
    labels = cam_to_labels(cam, ONE, high=0.75, low=0.25)
    assert labels.flatten().tolist() == [1, 255, 255, 0, 0]


def test_labels_are_the_strongest_present_class():
    cam = double([[0.8, 0.9], [0.9, 0.8], [1.0, 1.0]]).reshape(1, 3, 1, 2)
    assert cam_to_labels(cam, torch.tensor([[1, 1, 0]])).flatten().tolist() == [2, 1]
    assert cam_to_labels(cam, torch.tensor([[0, 0, 0]])).flatten().tolist() == [0, 0]


def test_wrong_arguments_are_refused():
    cam = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="got 1 cams and 0 flipped"):
        merge_cams([cam], [], ONE, max_classes=1, size=(4, 4))
    with pytest.raises(ValueError, match=r"flipped\[0\] has shape"):
        merge_cams([cam], [cam[..., :1]], ONE, max_classes=1, size=(4, 4))
    with pytest.raises(ValueError, match="max_classes is 0"):
        present_classes(ONE, max_classes=0)
