import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fsr_fast.dataloading.palette import save_palette_png, voc_palette
from fsr_fast.reporting.figures import colourise, heatmap, outline, overlay, picture_grid

NAMES = ["bird", "cat"]


def picture(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def has_colour(grid: Image.Image, label: int) -> bool:
    return bool((np.asarray(grid) == voc_palette()[label]).all(-1).any())


@pytest.mark.parametrize(
    ("label", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (8, (64, 0, 0)),
        (15, (192, 128, 128)),
        (20, (0, 64, 128)),
        (255, (224, 224, 192)),
    ],
)
def test_palette_is_that_of_pascal_voc(label, colour):
    assert tuple(voc_palette()[label]) == colour


def test_palette_tells_all_labels_apart():
    assert len(np.unique(voc_palette(), axis=0)) == 256


def test_colourise_paints_every_label_in_its_colour():
    mask = np.array([[0, 1], [2, 255]])
    np.testing.assert_array_equal(colourise(mask), voc_palette()[mask])


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_palette_png_gives_back_the_very_labels(tmp_path_factory, height, width, seed):
    mask = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    save_palette_png(mask, path)
    with Image.open(path) as read:
        assert read.mode == "P"
        np.testing.assert_array_equal(np.asarray(read), mask)
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), colourise(mask))


def test_overlay_mixes_by_opacity_and_leaves_the_background():
    image = picture()
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[:, 20:] = 1
    mixed = overlay(image, mask, 0.25)
    np.testing.assert_array_equal(mixed[:, :20], image[:, :20])
    np.testing.assert_allclose(mixed[:, 20:], image[:, 20:] * 0.75 + voc_palette()[1] * 0.25, atol=0.51)
    np.testing.assert_array_equal(overlay(image, mask, 1.0)[:, 20:], colourise(mask)[:, 20:])


def test_heatmap_is_red_where_the_map_is_high_and_blue_where_it_is_low():
    cam = np.zeros((4, 4), dtype=np.float32)
    cam[:, 2:] = 1
    shown = heatmap(np.full((40, 60, 3), 128, dtype=np.uint8), cam).astype(int)
    assert shown.shape == (40, 60, 3)
    low, high = shown[20, 2], shown[20, 57]
    assert high[0] > high[2]
    assert low[2] > low[0]
    np.testing.assert_array_equal(heatmap(picture(), cam, 0.0), picture())


def test_grid_has_the_size_of_its_cells_and_keeps_aspect():
    wide, tall = picture(20, 40), picture(40, 20)
    one = picture_grid([[wide, wide]], ["image", "CAM"], NAMES, cell=200)
    two = picture_grid([[wide, wide], [tall, tall]], ["image", "CAM"], NAMES, cell=200)
    assert one.width == two.width > 400
    assert 100 < one.height < 180
    assert 200 < two.height - one.height < 230


def test_masks_are_scaled_without_inventing_colours_and_fill_the_cell_of_their_row():
    mask = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    grid = np.asarray(picture_grid([[np.zeros((50, 100, 3), np.uint8), mask]], ["image", "truth"], NAMES, cell=160))
    for label in (1, 2, 255):
        painted = (grid == voc_palette()[label]).all(-1).sum()
        # a quarter of a 160 x 80 cell but for its white borders, and the swatch in the legend
        assert 79 * 39 <= painted <= 80 * 40 + 20 * 20


def test_legend_names_exactly_the_labels_of_the_masks(monkeypatch):
    drawn = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, corner, text, *_, **__: drawn.append(text))
    mask = np.array([[0, 2], [255, 9]])
    grid = picture_grid([[picture(), mask]], ["image", "truth"], NAMES)
    assert drawn == ["background", "cat", "label 9", "ignored", "image", "truth"], "the legend stands above"
    assert has_colour(grid, 9)


def test_a_dark_class_is_seen_on_the_black_background_of_its_mask():
    mask = np.zeros((80, 80), np.uint8)
    mask[20:60, 20:60] = 8  # VOC's cat, nearly black
    grid = np.asarray(picture_grid([[mask]], ["seg"], [*"abcdefgh"], cell=160))
    inside = grid[-12 - 160 : -12, 12 : 12 + 160]
    assert (inside[40:120, 40] == 255).all()
    assert (inside[60, 60] == voc_palette()[8]).all()


def test_a_picture_that_is_not_there_is_said_to_be_empty(monkeypatch):
    drawn = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, corner, text, *_, **__: drawn.append(text))
    grid = picture_grid([[picture(), None]], ["image", "CAM"], NAMES)
    assert drawn.count("empty") == 1
    assert has_colour(grid, 0) is False


def test_long_legends_and_titles_stay_inside():
    mask = np.arange(81, dtype=np.uint8).reshape(9, 9)
    names = [f"a rather long name {number}" for number in range(80)]
    grid = np.asarray(picture_grid([[mask]], ["a title that is much too long for its only column"], names, cell=300))
    assert (grid[:, -4:] == 255).all()
    assert (grid[-4:] == 255).all()
    assert has_colour(Image.fromarray(grid), 80)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: colourise(np.zeros((2, 2))), TypeError, "mask is float64"),
        (lambda: colourise(np.zeros((2, 2, 2), int)), ValueError, r"expected \(H,W\)"),
        (lambda: save_palette_png(np.full((2, 2), 256), None), ValueError, "from 256 to 256"),
        (lambda: overlay(picture(), np.zeros((3, 3), int)), ValueError, "resize one"),
        (lambda: overlay(picture(), np.zeros((30, 40), int), 2), ValueError, "opacity: 2"),
        (lambda: heatmap(picture().astype(float), np.zeros((3, 3))), TypeError, "picture is float64"),
        (lambda: heatmap(picture(), np.zeros((2, 3, 3))), ValueError, "cam is"),
        (lambda: picture_grid([], ["a"], NAMES), ValueError, "rows: empty"),
        (lambda: picture_grid([[picture()]], ["a", "b"], NAMES), ValueError, r"rows\[0\] has 1 pictures for 2"),
        (lambda: picture_grid([[picture()]], ["a"], NAMES, cell=20), ValueError, "cell: 20"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_borders_of_a_mask_are_drawn_in_white_and_nothing_else_is_touched():
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[10:20, 10:30] = 8  # VOC's cat, nearly black
    dark = np.zeros((30, 40, 3), dtype=np.uint8)
    drawn = outline(dark, mask).any(-1)
    assert drawn[10, 10:30].all()
    assert drawn[10:20, 10].all()
    assert drawn[20, 10:30].all()
    assert drawn[10:20, 30].all()
    assert drawn.sum() == 20 + 20 + 10 + 10 - 1
