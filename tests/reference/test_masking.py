import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsr_fast.reference import top_k_mask, uncertain_mask, uncertain_mask_from_cam

few = settings(max_examples=25, deadline=None)


@few
@given(st.data())
def test_exactly_k_patches_are_masked_whatever_the_input(data):
    B, N, C = (data.draw(st.integers(1, high)) for high in (3, 12, 3))
    k = data.draw(st.integers(0, N))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    features = torch.randn(B, N, 2, generator=generator) * data.draw(st.sampled_from([0.0, 1e-8, 1.0, 1e6]))
    weight = torch.randn(C, 2, generator=generator)
    labels = torch.randint(0, 2, (B, C), generator=generator)
    uniform = torch.randint(0, 3, (B, N), generator=generator) / 4  # many ties
    selection = uncertain_mask(features, weight, labels, uniform, k=k)
    assert selection.mask.sum(dim=1).tolist() == [k] * B
    for b in range(B):
        assert selection.masked[b].tolist() == selection.mask[b].nonzero().flatten().tolist()


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.data())
def test_the_highest_are_masked_and_ties_go_to_the_lower_index(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    selection = top_k_mask(torch.tensor([scores], dtype=torch.float32), k=k)
    for i in selection.masked[0].tolist():
        for j in (~selection.mask[0]).nonzero().flatten().tolist():
            assert scores[i] > scores[j] or (scores[i] == scores[j] and i < j)


@few
@given(st.permutations(range(8)), st.integers(0, 8))
def test_permuting_the_draw_permutes_the_mask(order, k):
    uniform = torch.linspace(0, 0.9, 8)[None]
    plain, permuted = top_k_mask(uniform, k=k), top_k_mask(uniform[:, order], k=k)
    assert torch.equal(permuted.mask, plain.mask[:, order])


def test_without_uncertain_patches_every_patch_is_equally_likely():
    draws, N, k = 1000, 10, 3
    uniform = torch.rand(draws, N, generator=torch.Generator().manual_seed(0))
    selection = uncertain_mask(torch.zeros(draws, N, 1), torch.ones(1, 1), torch.ones(draws, 1), uniform, k=k)
    frequency = selection.mask.double().mean(dim=0)
    deviation = (k / N * (1 - k / N) / draws) ** 0.5
    assert (frequency - k / N).abs().max() < 4 * deviation


def test_uncertain_patches_come_first_and_the_draw_orders_the_rest():
    # relu: 0 2 4 0 -> min-max: 0 .5 1 0, so only patch 1 is uncertain
    features = torch.tensor([[[0.0], [2.0], [4.0], [-1.0]]])
    uniform = torch.tensor([[0.5, 0.0, 0.25, 0.75]])
    masked = [
        uncertain_mask(features, torch.ones(1, 1), torch.ones(1, 1), uniform, k=k).masked.tolist() for k in range(5)
    ]
    assert masked == [[[]], [[1]], [[1, 3]], [[0, 1, 3]], [[0, 1, 2, 3]]]


def test_activation_is_measured_from_its_minimum():
    # 5 7 9 -> 0 .5 1; unshifted they would be .56 .78 1, the first one uncertain
    features = torch.tensor([[[5.0], [7.0], [9.0]]])
    selection = uncertain_mask(features, torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[0.9, 0.0, 0.5]]), k=1)
    assert selection.masked.tolist() == [[1]]


def test_both_thresholds_are_strict():
    cam = torch.tensor([0.25, 0.5, 0.75, 0.0, 1.0]).reshape(1, 1, 1, 5)
    uniform = torch.tensor([[0.9, 0.0, 0.8, 0.7, 0.6]])
    for k, expected in ((1, [1]), (2, [0, 1]), (3, [0, 1, 2])):
        selection = uncertain_mask_from_cam(cam, torch.ones(1, 1), uniform, grid=(1, 5), k=k, low=0.25, high=0.75)
        assert selection.masked[0].tolist() == expected


def test_a_patch_is_as_certain_as_its_strongest_present_class():
    cam = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])  # class 1 is sure of the first patch
    uniform = torch.tensor([[0.9, 0.0]])
    for labels, expected in (([1, 1], [1]), ([1, 0], [0]), ([0, 1], [0]), ([0, 0], [0])):
        selection = uncertain_mask_from_cam(cam, torch.tensor([labels]), uniform, grid=(1, 2), k=1)
        assert selection.masked[0].tolist() == expected


def test_blocks_are_sampled_nearest_and_masked_as_a_whole():
    cam = torch.zeros(1, 1, 8, 8)
    cam[0, 0, 0, 4] = 0.5  # the pixel that nearest sampling reads for block (0, 1)
    cam[0, 0, 7, 7] = 0.5  # a pixel that it skips
    uniform = torch.tensor([[0.3, 0.0, 0.2, 0.1]])
    selection = uncertain_mask_from_cam(cam, torch.ones(1, 1), uniform, grid=(4, 4), k=2, block=2)
    assert selection.mask[0].reshape(4, 4).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert selection.masked.shape == (1, 8)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="k is 4, expected 0 <= k <= 3"):
        top_k_mask(torch.zeros(1, 3), k=4)
    with pytest.raises(ValueError, match="whole blocks"):
        uncertain_mask_from_cam(torch.zeros(1, 1, 2, 2), torch.ones(1, 1), torch.zeros(1, 2), grid=(3, 4), k=1, block=2)
    with pytest.raises(ValueError, match="weight has shape"):
        uncertain_mask(torch.zeros(1, 3, 2), torch.zeros(1, 3), torch.ones(1, 1), torch.zeros(1, 3), k=1)
