"""Masks of all kinds: read where the meaning is certain, else refused with the option that explains it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fsr_fast.dataloading.class_names import COCO_CLASSES
from fsr_fast.dataloading.datasets import SegmentationDataset, build_datasets
from fsr_fast.dataloading.mask_files import COCO_IDS, parse_meaning, read_mask
from fsr_fast.errors import UserError
from tests.dataloading.people import OWN_CLASSES, config, write_mask

# --- masks


def one_class(root: Path, mask: np.ndarray) -> tuple[SegmentationDataset, SegmentationDataset]:
    (root / "classes.txt").write_text("cat\n")
    (root / "train.csv").write_text("image,labels\na.jpg,cat\nd.jpg,\n")
    write_mask(root / "masks/a.png", mask)
    return build_datasets(config(root))  # type: ignore[return-value]


def test_masks_of_one_class_may_be_drawn_in_black_and_white(mydata: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4] = 255
    _, val = one_class(mydata, mask)
    np.testing.assert_array_equal(val.mask(0), mask // 255)
    (message,) = [record.getMessage() for record in caplog.records if "255" in record.getMessage()]
    assert "255 is read as 'cat'" in message
    assert "--data.mask_values" in message
    np.testing.assert_array_equal(
        build_datasets(config(mydata, mask_values={"0": "background", "255": "ignore"}))[1].mask(0), mask
    )


def test_black_and_white_is_the_class_only_where_no_mask_holds_a_one(mydata: Path) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4] = 255
    write_mask(mydata / "masks/d.png", np.ones((6, 8), np.uint8))
    (mydata / "val.csv").write_text("image,labels\na.jpg,cat\nd.jpg,cat\n")
    _, val = one_class(mydata, mask)
    np.testing.assert_array_equal(val.mask(0), mask)


def test_labels_from_masks_in_black_and_white_show_the_class(mydata: Path) -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4] = 255
    one_class(mydata, mask)
    (mydata / "train.csv").write_text("image,labels\na.jpg,\nd.jpg,\n")
    write_mask(mydata / "masks/d.png", 0 * mask)
    assert build_datasets(config(mydata, labels="masks"))[0].labels.tolist() == [[1], [0]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16", "TIFF"])
def test_masks_whose_numbers_are_certain_are_read_whatever_their_mode(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    path = tmp_path / "mask.png"
    if mode == "1":
        Image.fromarray(values.astype(bool)).save(path)
    elif mode == "I;16":
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif mode == "TIFF":
        Image.fromarray(values).save(path, "TIFF")
    else:
        Image.fromarray(values).convert(mode).save(path)
    np.testing.assert_array_equal(read_mask(path, 3), values)


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "colours": (
        lambda path: Image.fromarray(np.array([[[0, 0, 0], [128, 0, 0]]], np.uint8)).save(path),
        ("mode RGB", "#000000", "#800000", "--data.mask_values"),
    ),
    "half transparent": (lambda path: Image.new("RGBA", (3, 2), (1, 1, 1, 99)).save(path), ("mode RGBA",)),
    "sixteen bits": (
        lambda path: Image.fromarray(np.array([[0, 1000]], np.uint16)).save(path),
        ("the value 1000", "its values are 0, 1000", "--data.mask_values"),
    ),
    "another system of numbers": (
        lambda path: Image.fromarray(np.array([[0, 7, 26]], np.uint8)).save(path),
        ("the value 26", "there are 3 classes", "its values are 0, 7, 26", "--data.mask_values"),
    ),
    "a JPEG": (
        lambda path: Image.effect_noise((32, 32), 90).save(path, "JPEG"),
        ("JPEG smears the values", "write masks as PNG"),
    ),
    "smoothed colours": (
        lambda path: Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path),
        ("colours, as a photograph", "without smoothing"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_whose_meaning_is_not_certain_is_refused_with_the_option_that_says_it(tmp_path: Path, case: str) -> None:
    write, fragments = REFUSED[case]
    write(tmp_path / "mask.png")
    with pytest.raises(UserError) as caught:
        read_mask(tmp_path / "mask.png", 3)
    for fragment in ("mask.png", *fragments):
        assert fragment in str(caught.value)


def test_colours_and_other_numbers_mean_what_the_option_says(mydata: Path) -> None:
    colours = np.zeros((6, 8, 3), np.uint8)
    colours[2], colours[3], colours[4] = (255, 128, 0), (0, 0, 255), (255, 255, 255)
    Image.fromarray(colours).save(mydata / "masks/a.png")
    meaning = {"#000000": "background", "#ff8000": "dog", "#0000FF": 3, "#ffffff": "ignore"}
    mask = build_datasets(config(mydata, mask_values=meaning))[1].mask(0)
    assert mask is not None
    assert mask[:, 0].tolist() == [0, 0, 2, 3, 255, 0]
    write_mask(mydata / "masks/a.png", np.full((6, 8), 1000, np.uint16))
    mask = build_datasets(config(mydata, mask_values={0: 0, 1000: "cat"}))[1].mask(0)
    assert mask is not None
    assert (mask == 1).all()
    with pytest.raises(UserError, match=r"holds 1000, which data\.mask_values lacks"):
        build_datasets(config(mydata, mask_values={0: 0, 7: "cat"}))[1].mask(0)


def test_ms_coco_s_own_numbers_become_those_of_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    write_mask(path, np.array([[0, 1, 90, 255]], np.uint8))
    with pytest.raises(UserError, match=r"MS COCO's own numbers, 1 to 90, give --data\.mask_values coco91"):
        read_mask(path, 80)
    meaning = parse_meaning("coco91", COCO_CLASSES)
    assert read_mask(path, 80, "", meaning).tolist() == [[0, 1, 80, 255]]
    assert (len(COCO_IDS), COCO_IDS[11], COCO_IDS[-1]) == (80, 13, 90)  # stop sign


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"red": "cat"}, "expected a number 0 to 65535 or a colour"),
        ({"0": "catt"}, "unknown class 'catt'; did you mean 'cat'"),
        ({"0": 0, "#ffffff": 1}, "only numbers or only colours"),
        ("coco91", "coco91 needs MS COCO's 80 classes, not 3"),
    ],
)
def test_meanings_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_meaning(given, OWN_CLASSES)
