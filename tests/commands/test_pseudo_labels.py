"""Label maps of whole lists, and the archive for the test server."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_fast.commands import pseudo_labels as label_images
from fsr_fast.commands.pseudo_labels import main
from fsr_fast.config import build_config
from fsr_fast.dataloading import label_files
from fsr_fast.dataloading.class_names import COCO_CLASSES, VOC_CLASSES
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.palette import save_palette_png, voc_palette
from fsr_fast.errors import UserError
from fsr_fast.evaluation.archive import FOLDER, check_archive, write_archive
from fsr_fast.evaluation.evaluator import evaluate_network
from fsr_fast.evaluation.inference import infer
from fsr_fast.evaluation.journal import Journal
from fsr_fast.models import build_network
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.distributed import Process
from tests import helpers

NETWORK = helpers.network(helpers.config()).eval()
ALONE = Process(0, 1, torch.device("cpu"))
TRAIN = [f"picture_{number}" for number in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return helpers.write_dataset(tmp_path / "data", train=4, val=2)


def checkpoint(folder: Path, root: Path, network=NETWORK, classes=helpers.CLASSES) -> Path:
    recipe = helpers.values({"data": {"classes": list(classes)}, "evaluate": {"threshold": 0.4}}, root=root)
    config = build_config(recipe, "the test").model_dump(mode="json")
    state = {"iteration": 7, "config": config, "classes": list(classes), "student": network.state_dict()}
    return write_checkpoint(folder, state)


def label(tmp_path: Path, root: Path, *options: str) -> Path:
    main(["--checkpoint", str(checkpoint(tmp_path / "run", root)), "--output", str(tmp_path / "out"), *options])
    return tmp_path / "out"


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def expected(root: Path, number: int, **options):
    config = build_config(helpers.values(root=root), "the test")
    images, _ = build_datasets(config.data)
    image = helpers.normalised(np.array(images.image(number)).transpose(2, 0, 1), NETWORK)
    return infer(NETWORK, image[None], torch.from_numpy(images.labels[number])[None], scales=(1.0,), **options)


def test_pseudo_labels_are_written_for_the_whole_training_list(tmp_path, root):
    output = label(tmp_path, root)
    for part in ("labels", "confidence"):
        assert sorted(path.stem for path in (output / part).iterdir()) == TRAIN
    assert (output / "classes.txt").read_text().split() == ["background", *helpers.CLASSES]
    for number, name in enumerate(TRAIN):
        cams = expected(root, number).cams
        value, slot = cams.values[0].max(0)
        wanted = torch.where(value > 0.4, cams.classes[0][slot] + 1, 0)
        labels = read(output / "labels" / f"{name}.png")
        assert (labels == wanted.numpy()).mean() > 0.99
        assert labels.max() > 0
        sure = torch.where(wanted == 0, 1 - value, value).numpy()
        assert np.abs(read(output / "confidence" / f"{name}.png") - 255 * sure).mean() < 1
        with Image.open(output / "labels" / f"{name}.png") as picture:
            assert picture.mode == "P"
            assert picture.getpalette()[:12] == voc_palette()[:4].ravel().tolist()


def test_segmentations_are_written_with_their_probability(tmp_path, root):
    output = label(tmp_path, root, "--kind", "seg", "--list", "val", "--unlabelled")
    assert sorted(path.stem for path in (output / "labels").iterdir()) == ["picture_4", "picture_5"]
    found = expected(helpers.write_dataset(tmp_path / "again", train=6, val=1), 4).seg_logits[0].softmax(0)
    assert (read(output / "labels" / "picture_4.png") == found.argmax(0).numpy()).mean() > 0.99
    assert np.abs(read(output / "confidence" / "picture_4.png") - 255 * found.amax(0).numpy()).mean() < 1


def test_large_label_maps_are_tiled_tiff_but_for_readers_that_want_png(tmp_path, root, monkeypatch):
    output = label(tmp_path / "small", root, "--tile", "24")
    monkeypatch.setattr(label_files, "LARGE_PIXELS", 100)
    large = label(tmp_path / "large", root, "--tile", "24")
    for part in ("labels", "confidence"):
        assert sorted(path.name for path in (large / part).iterdir()) == [f"{name}.tif" for name in TRAIN]
        for name in TRAIN:
            assert np.array_equal(read(large / part / f"{name}.tif"), read(output / part / f"{name}.png"))
    masks = label(tmp_path / "mmseg", root, "--tile", "24", "--layout", "mmseg") / "ann_dir/train"
    assert np.array_equal(read(masks / "picture_0.png"), read(output / "labels/picture_0.png"))


def test_the_label_maps_of_the_crf_are_those_that_evaluation_scores(tmp_path, root):
    output = label(tmp_path, root, "--kind", "seg+crf", "--list", "val")
    config = build_config(helpers.values({"evaluate": {"crf": True}}, root=root), "the test")
    _, dataset = build_datasets(config.data)
    scored = evaluate_network(NETWORK, dataset, config, ALONE).tallies["seg+crf"]
    found = sum(np.bincount(read(path).ravel(), minlength=4) for path in (output / "labels").iterdir())
    assert found.tolist() == scored.matrix.counts.sum(0).tolist()


def test_without_image_labels_the_classes_are_those_that_the_classifier_finds(tmp_path, root):
    for path in (root / "labels.csv", root / "SegmentationClass" / "picture_0.png"):
        path.unlink()
    with pytest.raises(UserError, match="--unlabelled: pseudo labels show the classes of the image labels"):
        label(tmp_path, root, "--unlabelled")
    output = label(tmp_path, root, "--unlabelled", "--found")
    assert len(list((output / "labels").iterdir())) == 4


def test_an_interrupted_export_goes_on(tmp_path, root, monkeypatch):
    write, written = label_images._write_maps, []

    def stop_at_the_third(folder, part, name, maps):
        if len(written) == 2:
            written.append("stopped")
            raise KeyboardInterrupt
        written.append(name)
        write(folder, part, name, maps)

    monkeypatch.setattr(label_images, "_write_maps", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, root)
    output = label(tmp_path, root)
    assert sorted(written) == sorted([*TRAIN, "stopped"])
    lines = [json.loads(line) for line in (output / "images.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines[1:]) == TRAIN


def test_an_image_without_label_map_is_named(tmp_path, root):
    (root / "JPEGImages" / "picture_2.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 images have no label map; the first is 'picture_2'"):
        label(tmp_path, root)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 3


def test_what_failed_in_a_process_that_is_gone_and_was_mended_since_counts_no_more(tmp_path, root, monkeypatch):
    picture = root / "JPEGImages" / "picture_2.jpg"
    content = picture.read_bytes()
    picture.write_bytes(b"no picture")
    monkeypatch.setattr(Journal, "join", lambda journal: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, root)
    monkeypatch.undo()
    picture.write_bytes(content)
    (tmp_path / "out" / "images.0.partial.jsonl").rename(tmp_path / "out" / "images.1.partial.jsonl")
    label(tmp_path, root)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b", "a.png"], "'a.png' and 'a.jpg': their label maps would have the same name"),
        (["../a"], "leads out"),
    ],
)
def test_names_that_cannot_be_those_of_label_maps_are_refused(tmp_path, root, names, message):
    config = build_config(helpers.values(root=root), "the test")
    images = replace(build_datasets(config.data)[0], ids=Names(names))
    with pytest.raises(UserError, match=message):
        label_images.write_labels(NETWORK, images, config, ALONE, "pseudo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- test server


def voc_network():
    config = build_config(helpers.values(), "the test")
    torch.manual_seed(0)
    return build_network(config.model, VOC_CLASSES, config.data.image_size).eval()


@pytest.mark.parametrize("name", ["results.tar", "results.tgz"])
def test_the_archive_for_the_test_server_holds_every_image_of_the_list(tmp_path, root, name):
    path = checkpoint(tmp_path / "run", root, voc_network(), VOC_CLASSES)
    (root / "ImageSets/Segmentation/test.txt").write_text("picture_0\npicture_3\n")
    (root / "labels.csv").unlink()
    common = ["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--list", "test", "--unlabelled"]
    main([*common, "--kind", "seg", "--archive", str(tmp_path / name)])
    with tarfile.open(tmp_path / name) as archive:
        assert archive.getnames() == [f"{FOLDER}/picture_0.png", f"{FOLDER}/picture_3.png"]
        content = archive.extractfile(f"{FOLDER}/picture_3.png").read()
    assert content == (tmp_path / "out" / "labels" / "picture_3.png").read_bytes()
    assert read(io.BytesIO(content)).shape == (40, 36)
    with pytest.raises(UserError, match=r"--archive: .* exists; delete it or give another name"):
        main([*common, "--kind", "seg", "--archive", str(tmp_path / name)])


def test_an_archive_is_refused_where_the_server_would(tmp_path, root):
    archive = ["--archive", str(tmp_path / "results.tar")]
    for options, message in (
        (archive, "--archive: the test server scores segmentations"),
        ([*archive, "--kind", "seg"], "the network has 3 classes; the test server expects the 20"),
    ):
        with pytest.raises(UserError, match=message):
            label(tmp_path, root, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "1 images of the list are missing, the first is 'b'"),
        ("extra", "c.png does not belong to an image of the list"),
        ("size", "5 x 4 pixels, but the image has 4 x 5"),
        ("label", "holds the label 255, expected 0 to 20"),
        ("palette", "its palette is not PASCAL VOC's"),
        ("mode", "a picture of mode L, expected a palette"),
        ("damaged", "cannot be decoded"),
    ],
)
def test_a_faulty_archive_is_found_out(tmp_path, fault, message):
    sizes = {"a": (4, 5), "b": (4, 5)}
    labels = np.full((4, 5) if fault == "size" else (5, 4), 255 if fault == "label" else 20, np.uint8)
    for name in ("a", "b", "c"):
        save_palette_png(labels, tmp_path / f"{name}.png")
    if fault in ("palette", "mode"):
        picture = Image.fromarray(labels)
        if fault == "palette":
            picture.putpalette([7] * 768)
        picture.save(tmp_path / "b.png")
    if fault == "damaged":
        (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:50])
    names = {"missing": ["a"], "extra": ["a", "b", "c"]}.get(fault, ["a", "b"])
    path = tmp_path / "results.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(tmp_path / f"{name}.png", f"{FOLDER}/{name}.png")
    with path.open("rb") as file, pytest.raises(UserError, match=message):
        check_archive(file, path, sizes, 20)
    if fault not in ("missing", "extra"):
        with pytest.raises(UserError, match=message):
            write_archive(tmp_path / "new.tar", tmp_path, sizes, 20)
        assert not list(tmp_path.glob("*new.tar*")), "a faulty archive bears its name"


def test_eighty_one_classes_are_counted_and_written(tmp_path, root):
    config = build_config(helpers.values({"data": {"classes": list(COCO_CLASSES)}}, root=root), "the test")
    torch.manual_seed(0)
    network = build_network(config.model, COCO_CLASSES, config.data.image_size)
    path = checkpoint(tmp_path / "run", root, network, COCO_CLASSES)
    for name in helpers.CLASSES:  # the pictures show COCO's classes 1, 2 and 3
        csv = (root / "labels.csv").read_text()
        (root / "labels.csv").write_text(csv.replace(f"{name}", COCO_CLASSES[helpers.CLASSES.index(name)]))
    main(["--checkpoint", str(path), "--output", str(tmp_path / "out"), "--kind", "seg", "--unlabelled"])
    assert max(read(path).max() for path in (tmp_path / "out" / "labels").iterdir()) > 20
    _, dataset = build_datasets(config.data)
    found = evaluate_network(network.eval(), dataset, config, ALONE)
    assert found.tallies["seg"].matrix.counts.shape == (81, 81)
    assert len(found.results["seg"]["classes"]) == 81


def laid_out(text: str) -> dict[str, Any]:
    """Run the printed configuration, which is Python."""
    found: dict[str, Any] = {}
    exec(text[text.index("# mmsegmentation") :], found)
    return found


@pytest.mark.parametrize("mixed", [False, True])
def test_other_trainers_read_the_folder_without_renaming(tmp_path, root, capsys, mixed):
    plain = label(tmp_path / "plain", root) / "labels"
    if mixed:
        path = root / "JPEGImages" / f"{TRAIN[1]}.jpg"
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    capsys.readouterr()
    for _ in range(2):  # a second run goes on
        output = label(tmp_path, root, "--layout", "mmseg")
    printed = laid_out(capsys.readouterr().out.rpartition("confidence: ")[2])
    settings = printed["dataset"]
    assert settings["type"] == "BaseSegDataset"
    pictures = Path(settings["data_root"]) / settings["data_prefix"]["img_path"]
    masks = Path(settings["data_root"]) / settings["data_prefix"]["seg_map_path"]
    assert settings["img_suffix"] == (".png" if mixed else ".jpg")
    names = [file.name.removesuffix(settings["img_suffix"]) for file in pictures.iterdir()]
    assert sorted(names) == TRAIN
    for name in names:
        with Image.open(masks / f"{name}{settings['seg_map_suffix']}") as mask:
            assert mask.mode == "L"
            if not mixed:
                assert np.array_equal(np.asarray(mask), read(plain / f"{name}.png"))
            with Image.open(pictures / f"{name}{settings['img_suffix']}") as picture:
                assert picture.size == mask.size
    assert settings["metainfo"]["classes"] == ("background", *helpers.CLASSES)
    assert len(settings["metainfo"]["palette"]) == 4
    assert printed["data"]["train"] == {"images": str(pictures), "masks": str(masks)}
    assert printed["data"]["classes"] == dict(enumerate(settings["metainfo"]["classes"]))
    assert not (output / "labels").exists()


def test_a_picture_that_is_stored_turned_is_laid_out_upright(tmp_path, root):
    path = root / "JPEGImages" / f"{TRAIN[0]}.jpg"
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, exif=exif)
    (root / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()  # was drawn on the picture as stored
    output = label(tmp_path, root, "--layout", "mmseg")
    with (
        Image.open(output / f"img_dir/train/{TRAIN[0]}.png") as shown,
        Image.open(output / f"ann_dir/train/{TRAIN[0]}.png") as mask,
    ):
        assert shown.size == mask.size == picture.size[::-1]
