import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsr_fast.evaluation import tiling
from fsr_fast.evaluation.tiling import blend, plan_spans, plan_tiles

CPU = torch.device("cpu")


class Part:
    """A tile of known values, which counts what is held at a time."""

    held = 0

    def __init__(self, values):
        self.values = values
        Part.held += 1

    def __del__(self):
        Part.held -= 1

    def band(self, rows):
        return self.values[:, rows]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 20),
    st.sampled_from([1, 4, 8, 14]),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]),
)
def test_spans_cover_every_pixel_overlap_enough_and_are_as_few_as_can_be(length, patches, patch, overlap):
    side = patches * patch
    spans = plan_spans(length, side, overlap, patch)
    assert spans.starts[0] == 0
    assert spans.starts[-1] + spans.side == length
    assert spans.side == min(side, length)
    assert all(start % patch == 0 for start in spans.starts[:-1])
    shared = [a + side - b for a, b in zip(spans.starts[:-1], spans.starts[1:], strict=True)]
    least = min(overlap * side, side - patch)
    assert all(least <= one < side for one in shared)
    stride = max(patch, int(side * (1 - overlap)) // patch * patch)
    assert len(spans) == 1 + max(0, -(-(length - side) // stride))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(2, 64), st.sampled_from([0.0, 0.25, 0.6]))
def test_the_weights_of_every_pixel_sum_to_one_and_none_ends_at_a_seam(length, side, overlap):
    spans = plan_spans(length, side, overlap, 1)
    total = torch.zeros(length)
    for number in range(len(spans)):
        total[spans.slice(number)] += spans.weights(number)
    assert (total - 1).abs().max() < 1e-6
    if overlap and side >= 32 and len(spans) > 1 and spans.starts[1] >= side // 4:  # away from the border
        assert spans.weights(1)[0] < 0.01
        assert spans.weights(0)[-1] < 0.01


@pytest.mark.parametrize("band_values", [1, 2**23])
def test_parts_of_one_picture_are_blended_to_that_picture_whatever_the_bands(monkeypatch, band_values):
    monkeypatch.setattr(tiling, "BAND_VALUES", band_values)
    picture = torch.randn(3, 61, 47, generator=torch.Generator().manual_seed(0))
    plan = plan_tiles((61, 47), 16, 0.25, 4)
    parts = (Part(picture[:, rows, columns]) for rows, columns in plan.regions())
    bands = list(blend(plan, parts, 3, CPU))
    assert [rows.start for rows, _ in bands] == [0, *(rows.stop for rows, _ in bands[:-1])]
    assert torch.allclose(torch.cat([values for _, values in bands], 1), picture, atol=1e-6)


def test_tiles_that_disagree_fade_into_each_other():
    plan = plan_tiles((16, 28), 16, 0.25, 4)
    parts = (Part(torch.full((1, 16, 16), float(number))) for number in range(len(plan)))
    ((_, values),) = blend(plan, parts, 1, CPU)
    row = values[0, 8]
    assert (len(plan), row[0], row[-1]) == (2, 0, 1)
    assert (row[1:] >= row[:-1]).all()
    assert (row[1:] - row[:-1]).max() < 0.5  # over four pixels


def test_no_more_than_two_rows_of_tiles_are_held_however_high_the_picture_is(monkeypatch):
    monkeypatch.setattr(tiling, "BAND_VALUES", 4 * 40)
    plan = plan_tiles((2000, 40), 16, 0.25, 4)
    most = 0
    parts = (Part(torch.zeros(1, 16, 16)) for _ in plan.regions())
    for _ in blend(plan, parts, 1, CPU):
        most = max(most, Part.held)
    assert most <= 2 * len(plan.columns)
