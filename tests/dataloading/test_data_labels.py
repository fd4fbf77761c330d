"""`fsr-fast data labels` and `fsr-fast data masks`."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fsr_fast.commands.data import main
from fsr_fast.config import DataConfig
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.official_labels import read_official_labels
from fsr_fast.errors import UserError
from tests.dataloading.conftest import CLASSES, SHOWN, write_mask
from tests.dataloading.test_coco import coco  # noqa: F401 (a fixture)


def rows(path: Path) -> dict[str, set[str]]:
    lines = path.read_text().splitlines()
    assert lines[0] == "image,labels"
    return {name: set(shown.split()) for name, _, shown in (line.partition(",") for line in lines[1:])}


@pytest.mark.parametrize("source", ["xml", "csv", "masks"])
def test_every_source_gives_the_same_table(folder: Path, tmp_path: Path, source: str) -> None:
    output = tmp_path / "out/labels.csv"
    main(["labels", str(folder), "--classes", ",".join(CLASSES), "--labels", source, "--output", str(output)])
    assert rows(output) == {name: {CLASSES[value - 1] for value in shown} for name, shown in SHOWN.items()}


def test_the_table_is_one_that_training_reads(folder: Path) -> None:
    (folder / "labels.csv").unlink()
    main(["labels", str(folder), "--classes", ",".join(CLASSES), "--output", str(folder / "labels.csv")])
    shutil.rmtree(folder / "Annotations")
    train, _ = build_datasets(DataConfig(dataset="voc", root=folder, classes=CLASSES, labels="csv"))
    np.testing.assert_array_equal(train.labels, [[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]])


def test_an_image_of_two_lists_has_one_row(folder: Path, tmp_path: Path) -> None:
    with (folder / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("two\n")
    main(["labels", str(folder), "--classes", ",".join(CLASSES), "--output", str(tmp_path / "labels.csv")])
    names = [line.partition(",")[0] for line in (tmp_path / "labels.csv").read_text().splitlines()]
    assert sorted(names) == sorted(["image", *SHOWN])


def test_ms_coco_s_labels_come_from_its_folder_or_one_file(coco: Path, tmp_path: Path) -> None:  # noqa: F811
    main(["labels", str(coco), "--output", str(tmp_path / "both.csv")])
    main(["labels", str(coco / "annotations/instances_train2014.json"), "--output", str(tmp_path / "train.csv")])
    train = {"COCO_1": {"stop_sign"}, "COCO_2": {"person", "toothbrush"}}
    assert rows(tmp_path / "train.csv") == train
    assert rows(tmp_path / "both.csv") == train | {"COCO_3": {"car", "person"}}


def test_nothing_is_overwritten_and_a_failure_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = (folder / "labels.csv").read_bytes()
    arguments = ["labels", str(folder), "--classes", ",".join(CLASSES), "--output"]
    with pytest.raises(UserError, match=r"labels\.csv exists"):
        main([*arguments, str(folder / "labels.csv")])
    assert (folder / "labels.csv").read_bytes() == before
    (folder / "Annotations/two.xml").write_text("<a>")
    with pytest.raises(UserError, match=r"two\.xml"):
        main([*arguments, str(tmp_path / "labels.csv")])
    assert [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents] == []


def write_official(path: Path, content: Any, protocol: int = 2) -> Path:
    """Write an object as the official code's file has it: in an array of objects without dimensions, pickled."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(np.array(content, object), file, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1", "?"])
def test_the_official_file_is_read(tmp_path: Path, protocol: int, dtype: str) -> None:
    onehot = np.zeros((2, 20), dtype)
    onehot[0, [3, 14]], onehot[1, 19] = 1, 1
    content = {"2007_000032": onehot[0], "ä": onehot[1]}
    names, labels = read_official_labels(write_official(tmp_path / "labels.npy", content, protocol))
    assert names == ["2007_000032", "ä"]
    assert labels.dtype == bool
    np.testing.assert_array_equal(labels, onehot.astype(bool))


def test_numpy_s_own_file_of_a_dictionary_is_read_and_written_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "cls_labels_onehot.npy"
    np.save(path, {"COCO_1": np.eye(80, dtype=np.float32)[9], "COCO_2": np.eye(80)[79]}, allow_pickle=True)
    main(["labels", str(path), "--output", str(tmp_path / "labels.csv")])
    assert rows(tmp_path / "labels.csv") == {"COCO_1": {"traffic_light"}, "COCO_2": {"toothbrush"}}


def test_the_classes_of_an_official_file_go_by_their_number(tmp_path: Path) -> None:
    path = write_official(tmp_path / "labels.npy", {"a": np.eye(20)[0]})
    main(["labels", str(path), "--output", str(tmp_path / "voc.csv")])
    assert rows(tmp_path / "voc.csv") == {"a": {VOC_CLASSES[0]}}
    path = write_official(tmp_path / "three.npy", {"a": np.array([0.0, 1, 1])})
    with pytest.raises(UserError, match="3 classes; name each of them"):
        main(["labels", str(path), "--output", str(tmp_path / "three.csv")])
    main(["labels", str(path), "--classes", "x,y,z", "--output", str(tmp_path / "three.csv")])
    assert rows(tmp_path / "three.csv") == {"a": {"y", "z"}}


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    for function, argument in ((os.mkdir, "made"), (os.system, "mkdir made"), (eval, "__import__('os').mkdir('made')")):
        made = tmp_path / "made"
        command = argument.replace("made", str(made))
        path = write_official(tmp_path / "labels.npy", {"a": Hostile(function, command)})
        with pytest.raises(UserError, match="which labels do not need: not loaded"):
            read_official_labels(path)
        assert not made.exists()
        np.load(path, allow_pickle=True)  # the file is a real attack: NumPy's own reader falls for it
        assert made.exists()
        made.rmdir()


BAD: dict[str, Any] = {
    "a list": [1, 2],
    "an empty dictionary": {},
    "pairs for names": {(1, 2): np.zeros(3)},
    "text for labels": {"a": "cat"},
    "text arrays": {"a": np.array(["cat"])},
    "nested arrays": {"a": np.array([{}], object)},
    "two dimensions": {"a": np.zeros((2, 2))},
    "rows of two lengths": {"a": np.zeros(2), "b": np.zeros(3)},
    "counts": {"a": np.array([0, 2])},
}


@pytest.mark.parametrize("case", BAD)
def test_other_pickles_are_refused(tmp_path: Path, case: str) -> None:
    path = write_official(tmp_path / "labels.npy", BAD[case])
    with pytest.raises(UserError, match=r"labels\.npy: .*(cls_labels_onehot\.npy|neither names nor numbers)"):
        read_official_labels(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = write_official(tmp_path / "labels.npy", {"a": np.zeros(3)})
    whole = path.read_bytes()
    for content in (b"", b"no numbers", whole[:90], whole[:200], whole[:128] + b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"labels\.npy: "):
            read_official_labels(path)
    np.save(path, np.zeros(3))
    with pytest.raises(UserError, match="holds an array of float64"):
        read_official_labels(path)
    with pytest.raises(UserError, match="no such file"):
        read_official_labels(tmp_path / "missing.npy")


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_official_files_give_labels_or_one_error(tmp_path: Path, protocol: int) -> None:
    path = write_official(tmp_path / "labels.npy", {"a": np.eye(3)[0], "b": np.eye(3)[1]}, protocol)
    whole, draws = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for place in draws.integers(0, len(content), draws.integers(1, 6)):
            content[place] = draws.integers(0, 256)
        path.write_bytes(content)
        try:
            names, labels = read_official_labels(path)
        except UserError:
            refused += 1
            continue
        assert (len(names), labels.dtype) == (len(labels), bool)
    assert refused > 100


# --- masks


@pytest.fixture
def voc(tmp_path: Path) -> tuple[Path, Path]:
    """VOC and SBD in miniature: a in both, b only in SBD, c in VOC's training list, v in its validation list."""
    root, sbd = tmp_path / "VOC2012", tmp_path / "sbd"
    for folder in (root / "JPEGImages", root / "ImageSets/Segmentation", root / "SegmentationClass", sbd / "cls"):
        folder.mkdir(parents=True)
    for name, value in (("a", 1), ("c", 3), ("v", 4)):
        mask = np.full((6, 8), value, np.uint8)
        mask[0] = 255
        write_mask(root / f"SegmentationClass/{name}.png", mask)
    for name, value in (("a", 11), ("b", 12), ("v", 14)):
        classes = {"Segmentation": np.full((6, 8), value, np.uint8), "CategoriesPresent": np.array([[value]])}
        savemat(sbd / f"cls/{name}.mat", {"GTcls": classes})
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nc\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("v\n")
    (sbd / "train.txt").write_text("b\n")
    (sbd / "val.txt").write_text("a\nv\n")
    return root, sbd


def test_augmented_masks_are_voc_s_own_and_else_sbd_s(voc: tuple[Path, Path]) -> None:
    root, sbd = voc
    main(["masks", str(root), "--sbd", str(sbd)])
    folder = root / "SegmentationClassAug"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "c.png", "v.png"]
    values = {path.stem: set(np.unique(np.asarray(Image.open(path)))) for path in folder.iterdir()}
    assert values == {"a": {1, 255}, "b": {12}, "c": {3, 255}, "v": {4, 255}}
    assert Image.open(folder / "b.png").mode == "P"
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nb\nc\n"


def test_a_list_that_is_there_is_kept_and_masks_are_not_overwritten(voc: tuple[Path, Path]) -> None:
    root, sbd = voc
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("mine\n")
    main(["masks", str(root), "--sbd", str(sbd)])
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "mine\n"
    with pytest.raises(UserError, match="SegmentationClassAug exists"):
        main(["masks", str(root), "--sbd", str(sbd)])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cls/b.mat", None, r"b\.mat: no such file"),
        ("cls/b.mat", b"no matrix", r"b\.mat: not one of SBD's class masks"),
        ("cls/b.mat", {"GTinst": 1}, r"b\.mat: not one of SBD's class masks"),
        ("cls/b.mat", {"GTcls": {"Segmentation": np.full((2, 2), 21)}}, r"b\.mat: .*expected a class from 0 to 20"),
        ("cls/b.mat", {"GTcls": {"Segmentation": np.full((2, 2), 0.5)}}, r"b\.mat: float64"),
        ("val.txt", None, r"val\.txt: no such list"),
    ],
)
def test_bad_sbd_files_are_named_and_leave_nothing(
    voc: tuple[Path, Path], file: str, content: Any, message: str
) -> None:
    root, sbd = voc
    (sbd / file).unlink()
    if isinstance(content, bytes):
        (sbd / file).write_bytes(content)
    elif content is not None:
        savemat(sbd / file, content)
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message):
        main(["masks", str(root), "--sbd", str(sbd)])
    assert sorted(root.rglob("*")) == before


def test_ms_coco_s_masks_become_files_that_the_official_layout_reads(coco: Path, tmp_path: Path) -> None:  # noqa: F811
    drawn = build_datasets(DataConfig(dataset="coco", root=coco, train_list="train", val_list="val"))[1].mask(1)
    main(["masks", str(coco), "--output", str(coco / "SegmentationClass")])
    assert sorted(path.name for path in (coco / "SegmentationClass").iterdir()) == ["train2014", "val2014"]
    (coco / "JPEGImages").mkdir()
    for part in ("train2014", "val2014"):
        (coco / part).rename(coco / "JPEGImages" / part)
    main(["labels", str(coco), "--output", str(coco / "labels.csv")])
    shutil.rmtree(coco / "annotations")
    (coco / "ImageSets/Segmentation").mkdir(parents=True)
    (coco / "ImageSets/Segmentation/train.txt").write_text("COCO_1\n")
    (coco / "ImageSets/Segmentation/val.txt").write_text("COCO_3\n")
    train, val = build_datasets(DataConfig(dataset="coco", root=coco, train_list="train", val_list="val"))
    assert train.labels[0, COCO_CLASSES.index("stop sign")] == 1
    mask = val.mask(0)
    assert mask is not None
    assert drawn is not None
    np.testing.assert_array_equal(mask, drawn)


def test_masks_need_to_know_from_where_or_where_to(coco: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--sbd FOLDER"):
        main(["masks", str(coco)])
