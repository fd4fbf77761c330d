"""Damaged and unusual images in the stream of training: the same on both pipelines."""

import io
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_fast.config import AugmentConfig, DataConfig
from fsr_fast.dataloading import dali_pipeline
from fsr_fast.dataloading.batch import TrainLoader
from fsr_fast.dataloading.build import build_train_loader
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.stream import BadFiles
from fsr_fast.errors import UserError

COUNT, SIZE = 8, 16
WHOLE = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0)
PIPELINES = ("torch", "dali")

pytestmark = pytest.mark.faults


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight pictures, each of its own grey."""
    (tmp_path / "set/JPEGImages").mkdir(parents=True)
    (tmp_path / "set/ImageSets/Segmentation").mkdir(parents=True)
    names = [f"picture {number} ü" for number in range(COUNT)]
    for number, name in enumerate(names):
        write(tmp_path / "set/JPEGImages" / f"{name}.jpg", number)
    (tmp_path / "set/labels.csv").write_text("image,labels\n" + "".join(f"{name},ant\n" for name in names))
    for part in ("train_aug", "val"):
        (tmp_path / f"set/ImageSets/Segmentation/{part}.txt").write_text("\n".join(names))
    return tmp_path / "set"


def write(path: Path, number: int) -> None:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    pixels = (30 * number + rows + columns / 2).astype(np.uint8)
    Image.fromarray(np.stack([pixels] * 3, 2)).save(path, quality=95)


def picture(root: Path, number: int) -> Path:
    return root / "JPEGImages" / f"picture {number} ü.jpg"


def loader(root: Path, pipeline: str, *, augment: AugmentConfig = WHOLE, **changes: Any) -> TrainLoader:
    """A loader whose views are in levels of 8 bits."""
    keys = {"workers", "max_bad_fraction", "max_pixels"} & changes.keys()
    section = {"dataset": "voc", "root": root, "image_size": SIZE * 2, "workers": 0, "pipeline": pipeline}
    data = DataConfig.model_validate(section | {"classes": ["ant"]} | {key: changes.pop(key) for key in keys})
    options: dict[str, Any] = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 1}
    options |= {"mean": (0.0,) * 3, "std": (1 / 255,) * 3} | changes
    dataset = build_datasets(data.model_copy(update={"val_list": "train_aug"}))[0]
    return build_train_loader(dataset, data, augment, **options)


@pytest.fixture(autouse=True)
def _without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsr_fast.dataloading.layout.FolderFiles.has_mask", lambda *_: True)


def seen(batches: list[Any]) -> list[int]:
    return torch.cat([batch.indices for batch in batches]).tolist()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def damaged_png(_: bytes) -> bytes:
    """Intact at both ends: only decoding reveals the damage."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    content = bytearray(encoded(Image.fromarray(noise), "PNG"))
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = bytes(20)
    return bytes(content)


DAMAGE = {
    "damaged in the middle": damaged_png,
    "no image": lambda whole: b"no image",
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "damaged header": lambda whole: whole[:160] + bytes(60) + whole[220:],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_next_image_of_the_stream_stands_in_for_a_damaged_one(
    root: Path, pipeline: str, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = seen(list(islice(loader(root, "torch"), 4)))  # two epochs
    path = picture(root, 3)
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        batches = list(islice(loader(root, pipeline, bad_files=tmp_path / "bad_files.txt"), 4))
    expected = [order[place + 1] if index == 3 else index for place, index in enumerate(order)]
    assert seen(batches) == expected
    assert [len(batch.views[0]) for batch in batches] == [4] * 4
    named = [record for record in caplog.records if path.name in record.getMessage()]
    assert len(named) == 1
    lines = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 1
    assert path.name in lines[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_a_resume_replace_alike(root: Path, pipeline: str, workers: int) -> None:
    picture(root, 3).write_bytes(b"no image")
    augment = AugmentConfig(jitter=1.0)
    whole = list(islice(loader(root, pipeline, augment=augment, batch_size=3), 6))
    first = loader(root, pipeline, augment=augment, batch_size=3)
    list(islice(first, 2))
    second = loader(root, pipeline, augment=augment, batch_size=3, workers=workers)
    second.load_state_dict(first.state_dict())
    for left, right in zip(whole[2:], islice(second, 4), strict=True):
        assert torch.equal(left.indices, right.indices)
        assert all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))
    second.close()


def test_too_many_damaged_files_stop_the_run_with_the_list(root: Path, pipeline: str, tmp_path: Path) -> None:
    for number in (1, 4, 6):
        picture(root, number).write_bytes(b"no image")
    listed = tmp_path / "run/bad_files.txt"
    passed = loader(root, pipeline, max_bad_fraction=0.4, bad_files=listed)
    list(islice(passed, 4))  # 3 of 8
    assert len(listed.read_text().splitlines()) == 3
    stopped = loader(root, pipeline, max_bad_fraction=0.25, bad_files=listed, workers=1)
    with pytest.raises(UserError, match=r"3 of 8 training images are damaged; .* = 0\.25 allows 2;") as error:
        list(islice(stopped, 4))
    stopped.close()
    for number in (1, 4, 6):
        assert picture(root, number).name in str(error.value)
    assert str(listed) in str(error.value)
    assert "Traceback" not in str(error.value)


def test_one_damaged_file_is_let_pass_unless_none_may_be(root: Path, pipeline: str) -> None:
    picture(root, 2).unlink()
    picture(root, 2).symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="no image for the id 'picture 2 ü'"):
        loader(root, pipeline)
    picture(root, 2).unlink()
    picture(root, 2).write_bytes(b"")
    list(islice(loader(root, pipeline), 2))
    with pytest.raises(UserError, match="1 of 8 training images are damaged"):
        list(islice(loader(root, pipeline, max_bad_fraction=0.0), 2))


def test_a_set_without_a_sound_image_is_refused(root: Path, pipeline: str) -> None:
    for number in range(COUNT):
        picture(root, number).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no training image can be decoded; the last: .*\.jpg"):
        next(loader(root, pipeline, max_bad_fraction=1.0))


def test_one_sound_image_stands_in_for_all(root: Path, pipeline: str) -> None:
    for number in range(COUNT - 1):
        picture(root, number).write_bytes(b"no image")
    batches = loader(root, pipeline, max_bad_fraction=1.0)
    assert {int(index) for batch in islice(batches, 8) for index in batch.indices} == {COUNT - 1}


def test_ranks_count_together_and_a_new_start_forgets(tmp_path: Path) -> None:
    path = tmp_path / "run/bad_files.txt"
    ranks = [BadFiles(path, 1000, 0.002) for _ in range(2)]
    ranks[0].add({1: "a.jpg: damaged"})
    ranks[1].add({1: "a.jpg: damaged, as this rank words it", 2: "b.jpg:\ndamaged"})
    assert path.read_text().splitlines() == ["1\ta.jpg: damaged", "2\tb.jpg: damaged"]
    ranks[0].add({1: "a.jpg: damaged", 2: "b.jpg:\ndamaged"})
    with pytest.raises(UserError, match="3 of 1000 training images are damaged"):
        ranks[0].add({3: "c.jpg: damaged"})
    with pytest.raises(UserError, match="4 of 1000 training images are damaged"):
        ranks[1].add({4: "d.jpg: damaged"})
    again = BadFiles(path, 1000, 0.002)
    again.clear()
    again.add({5: "e.jpg: damaged"})
    assert path.read_text().splitlines() == ["5\te.jpg: damaged"]


def unusual() -> dict[str, bytes]:
    rows, columns = np.mgrid[:40, :64]
    grey = Image.fromarray((2 * rows + 2 * columns).astype(np.uint8))
    colour = Image.merge("RGB", (grey, grey.transpose(Image.Transpose.ROTATE_180), Image.new("L", grey.size, 90)))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "CMYK": encoded(colour.convert("CMYK"), "JPEG", quality=95),
        "grey JPEG": encoded(grey, "JPEG", quality=95),
        "progressive": encoded(colour, "JPEG", quality=95, progressive=True),
        "palette": encoded(colour.quantize(16), "PNG"),
        "transparent": encoded(colour.convert("RGBA"), "PNG"),
        "16 bits": encoded(deep, "PNG"),
        "EXIF": encoded(colour, "JPEG", quality=95, exif=exif),
        "PNG with EXIF": encoded(colour, "PNG", exif=exif),
        "1 x 1": encoded(colour.crop((0, 0, 1, 1)), "JPEG"),
        "long": encoded(colour.resize((20_000, 3)), "JPEG"),
        "no end mark": encoded(colour, "JPEG", quality=95)[:-2],
        "bytes after the end": encoded(colour, "JPEG", quality=95) + bytes(500),
        "PNG without end": encoded(colour, "PNG")[:-12],
    }


@pytest.mark.parametrize("case", unusual())
def test_unusual_images_are_read_alike_by_both_pipelines(root: Path, case: str) -> None:
    """Cropped, too: the size that the crop is drawn for is that of the upright image."""
    picture(root, 0).write_bytes(unusual()[case])
    augment = AugmentConfig(flip=0.0, jitter=0.0)
    batches = [next(loader(root, name, augment=augment, batch_size=COUNT, max_bad_fraction=0.0)) for name in PIPELINES]
    place = batches[0].indices.tolist().index(0)
    for first, second in zip(batches[0].views, batches[1].views, strict=True):
        assert (first[place] - second[place]).abs().mean() < 0.8
    assert case == "1 x 1" or batches[0].views[0][place].std() > 5


def test_what_dali_alone_cannot_decode_is_decoded_by_pillow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(root, 0).write_bytes(unusual()["PNG without end"])
    expected = list(islice(loader(root, "dali"), 4))
    monkeypatch.setattr(dali_pipeline, "_is_plain", lambda *_: True)
    found, decoders = loader(root, "dali", max_bad_fraction=0.0), []
    build = dali_pipeline.build_decoder
    monkeypatch.setattr(dali_pipeline, "build_decoder", lambda *given: decoders.append(given[1:]) or build(*given))
    for left, right in zip(expected, islice(found, 4), strict=True):
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.views[0], right.views[0])
    assert set(decoders) == {(found._graph["device_id"],)}  # the decoder that failed is the one that is asked


def test_sixteen_bits_keep_their_brightness(root: Path, pipeline: str) -> None:
    deep = Image.fromarray(np.full((20, 20), 100 * 257, np.uint16))
    picture(root, 0).write_bytes(encoded(deep, "PNG"))
    batch = next(loader(root, pipeline, batch_size=COUNT))
    view = batch.views[0][batch.indices.tolist().index(0)]
    torch.testing.assert_close(view, torch.full_like(view, 100.0), rtol=0, atol=0.01)


def test_a_photograph_is_turned_upright(root: Path, pipeline: str) -> None:
    rows = np.mgrid[:SIZE, :SIZE][0]
    exif = Image.Exif()
    exif[274] = 6  # shown turned by a quarter, clockwise
    image = Image.fromarray(np.stack([12 * rows] * 3, 2).astype(np.uint8))
    picture(root, 0).write_bytes(encoded(image, "JPEG", quality=95, exif=exif))
    batch = next(loader(root, pipeline, batch_size=COUNT))
    view = batch.views[0][batch.indices.tolist().index(0), 0]
    assert view.mean(0).diff().max() < 0  # from bright at the left to dark at the right
    assert view.std(0).max() < 3


def test_an_image_too_large_for_the_memory_is_skipped_undecoded(root: Path, pipeline: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16)).save(picture(root, 5))
    stream = loader(root, pipeline, bad_files=tmp_path / "bad_files.txt", max_pixels=300)
    assert 5 not in seen(list(islice(stream, 2)))
    assert (
        "more than 300 pixels; scale it down, take its id off the list, or raise --data.max_pixels"
        in (tmp_path / "bad_files.txt").read_text()
    )


def test_a_link_that_leads_out_of_the_data_set_is_refused(root: Path, pipeline: str) -> None:
    os.link(picture(root, 1), root.parent / "outside.jpg")
    picture(root, 1).unlink()
    picture(root, 1).symlink_to(root.parent / "outside.jpg")
    with pytest.raises(UserError, match="a symbolic link that leads out of"):
        loader(root, pipeline)
