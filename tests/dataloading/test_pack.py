import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from fsr_fast.commands.data import main
from fsr_fast.dataloading import pack as packing
from fsr_fast.dataloading.layout import Split
from fsr_fast.dataloading.names import Names
from fsr_fast.dataloading.notes import Notes
from fsr_fast.errors import UserError
from tests.dataloading.conftest import CLASSES, SHOWN

VOC = ("--classes", ",".join(CLASSES), "--labels", "csv")


def pack(root: Path, output: Path | str, *options: str) -> None:
    main(["pack", str(root), *VOC, "--output", str(output), *options])


def read(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the index and the samples of a list, part by part."""
    index = json.loads((folder / f"{name}.json").read_text())
    samples: dict[str, dict[str, Any]] = {}
    for shard in index["shards"]:
        with tarfile.open(folder / shard["file"]) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[ending] = content.read()
    return index, list(samples.values())


def test_samples_hold_the_file_the_labels_and_for_validation_the_mask(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "shards")
    for name, with_masks in (("train_aug", False), ("val", True)):
        ids = (folder / f"ImageSets/Segmentation/{name}.txt").read_text().split()
        index, samples = read(tmp_path / "shards", name)
        assert (index["version"], index["classes"], index["max_labels"]) == (1, list(CLASSES), 2)
        for image, sample in zip(ids, samples, strict=True):
            assert set(sample) == {"jpg", "json", "mask.png"} if with_masks else {"jpg", "json"}
            assert sample["jpg"] == (folder / f"JPEGImages/{image}.jpg").read_bytes()
            shown = sorted(value - 1 for value in SHOWN[image])
            assert json.loads(sample["json"]) == {"labels": shown, "name": image}
            if with_masks:
                stored = np.asarray(Image.open(folder / f"SegmentationClassAug/{image}.png"))
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["mask.png"]))), stored)


def test_shards_are_closed_at_their_size_and_the_index_describes_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsr_fast.commands.data.MEGABYTE", 2500)
    pack(folder, tmp_path / "shards", "--shard-size", "2")
    index, samples = read(tmp_path / "shards", "train_aug")
    assert [shard["file"] for shard in index["shards"]] == ["train_aug-000000.tar", "train_aug-000001.tar"]
    assert [shard["samples"] for shard in index["shards"]] == [2, 2]
    assert len(samples) == 4
    for shard in index["shards"]:
        content = (tmp_path / "shards" / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_the_index_for_dali_is_that_of_its_own_tool(folder: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="DALI's wds2idx is not installed")
    pack(folder, tmp_path / "shards")
    for name in ("train_aug", "val"):
        with wds2idx.IndexCreator(str(tmp_path / f"shards/{name}-000000.tar"), str(tmp_path / "idx"), False) as creator:
            creator.create_index()
        assert (tmp_path / f"shards/{name}-000000.idx").read_text() == (tmp_path / "idx").read_text()


def test_packing_twice_gives_the_same_bytes_and_a_seed_another_order(folder: Path, tmp_path: Path) -> None:
    for output, options in (("one", ()), ("two", ()), ("three", ("--shuffle", "5"))):
        pack(folder, tmp_path / output, *options)
    one, two, three = (
        json.loads((tmp_path / output / "train_aug.json").read_text()) for output in ("one", "two", "three")
    )
    assert one == two != three
    names = [json.loads(sample["json"])["name"] for sample in read(tmp_path / "three", "train_aug")[1]]
    assert sorted(names) == ["four", "one", "three", "two"] != names


def test_pngs_stay_and_other_formats_become_png(folder: Path, tmp_path: Path) -> None:
    image = Image.open(folder / "JPEGImages/one.jpg")
    image.save(folder / "JPEGImages/one.png")
    (folder / "JPEGImages/one.jpg").unlink()
    Image.open(folder / "JPEGImages/two.jpg").save(folder / "JPEGImages/two.jpg", "BMP")
    pack(folder, tmp_path / "shards")
    _, samples = read(tmp_path / "shards", "train_aug")
    assert samples[0]["png"] == (folder / "JPEGImages/one.png").read_bytes()
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(samples[1]["png"]))), np.asarray(Image.open(folder / "JPEGImages/two.jpg"))
    )


def test_shards_go_to_any_url_that_fsspec_knows(folder: Path) -> None:
    pack(folder, "memory://bucket/shards")
    files = fsspec.filesystem("memory")
    names = {path.rpartition("/")[2] for path in files.ls("/bucket/shards", detail=False)}
    assert names == {f"{name}{end}" for name in ("train_aug", "val") for end in ("-000000.tar", "-000000.idx", ".json")}
    with tarfile.open(fileobj=io.BytesIO(files.cat("/bucket/shards/val-000000.tar"))) as tar:
        assert tar.getnames() == [f"{key:09d}.{end}" for key in range(2) for end in ("jpg", "json", "mask.png")]
    files.rm("/bucket", recursive=True)


DAMAGE = {
    "damaged image": (lambda f: os.truncate(f / "JPEGImages/four.jpg", 500), "four.jpg: cannot be decoded"),
    "missing label": (
        lambda f: (f / "labels.csv").write_text((f / "labels.csv").read_text().replace("four,bee", "four,")),
        "the training image 'four' has no label",
    ),
    "name twice": (
        lambda f: (f / "ImageSets/Segmentation/train_aug.txt").write_text("one\none\n"),
        "'one' is listed twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_pack_that_fails_leaves_nothing(folder: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError, match=message):
        pack(folder, tmp_path / "shards")
    assert [path for path in (tmp_path / "shards").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_pack_leaves_nothing(
    folder: Path, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsr_fast.commands.data.MEGABYTE", 1)
    write, written = packing._Shards.write, []

    def stop(self: Any, sample: Any) -> None:
        write(self, sample)
        written.append(sample)
        if len(written) == 3:
            raise error("stop")

    monkeypatch.setattr(packing._Shards, "write", stop)
    with pytest.raises(error):
        pack(folder, tmp_path / "shards")
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.faults
def test_a_killed_pack_leaves_whole_shards_without_an_index_and_no_second_one_joins_them(
    folder: Path, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys; from fsr_fast.commands import data; from fsr_fast.dataloading import pack; "
        "data.MEGABYTE = 1; "
        "write = pack.TarWriter.write; "
        "pack.TarWriter.write = lambda self, sample: (os.kill(os.getpid(), signal.SIGKILL) "
        "if sample['__key__'].endswith('2') else None, write(self, sample)); data.main(sys.argv[1:])"
    )
    arguments = ["pack", str(folder), *VOC, "--output", str(tmp_path / "shards"), "--shard-size", "1"]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (tmp_path / "shards").iterdir()}
    assert left == {f"train_aug-00000{number}.{end}" for number in range(2) for end in ("tar", "idx")} | {
        "train_aug-000002.tar.partial"
    }
    for number in range(2):
        with tarfile.open(tmp_path / f"shards/train_aug-00000{number}.tar") as tar:
            assert len(tar.getnames()) == 2
    with pytest.raises(UserError, match="from another or an interrupted pack; delete train_aug"):
        pack(folder, tmp_path / "shards")


def test_a_pack_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "shards")
    before = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    with pytest.raises(UserError, match=r"holds train_aug-000000\.idx, from another"):
        pack(folder, tmp_path / "shards")
    assert {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == before
    for path in (tmp_path / "shards").glob("train_aug*"):
        path.unlink()
    with pytest.raises(UserError, match="holds val"):
        pack(folder, tmp_path / "shards")


def test_a_seed_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--shuffle: -1 is below 0"):
        pack(folder, tmp_path / "shards", "--shuffle", "-1")


def test_shards_bear_the_whole_name_of_their_list(folder: Path, tmp_path: Path) -> None:
    lists = folder / "ImageSets/Segmentation"
    shutil.copy(lists / "train_aug.txt", lists / "train.v2.txt")
    pack(folder, tmp_path / "shards", "--train", "train.v2")
    assert (tmp_path / "shards" / "train.v2.json").is_file()


def test_two_lists_of_one_name_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "ImageSets/Segmentation/train_aug.txt", tmp_path / "val.txt")
    with pytest.raises(UserError, match="both lists are called 'val'"):
        pack(folder, tmp_path / "shards", "--train", str(tmp_path / "val.txt"))
    assert not (tmp_path / "shards").exists()


class OneImage:
    """Files of a list in which every name is the same image."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def image_path(self, name: str) -> Path:
        return self.path


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.jpg", quality=95)
    peaks = []
    for count in (100, 1000):
        names = Names(f"{number}" for number in range(count))
        split = Split(tmp_path, names, ("a",), OneImage(tmp_path / "one.jpg"), lambda name: [0], Notes())  # type: ignore[arg-type]
        tracemalloc.start()
        index = packing.pack(
            split,
            str(tmp_path / f"{count}"),
            "train",
            with_masks=False,
            shard_bytes=10**6,
            track=lambda items, *_: items,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(shard["samples"] for shard in index["shards"]) == count
        shutil.rmtree(tmp_path / f"{count}")
    content = (tmp_path / "one.jpg").stat().st_size
    assert peaks[1] - peaks[0] < 100 * content  # of 900 more images
