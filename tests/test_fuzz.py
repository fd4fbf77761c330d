"""Malformed input of every kind produces a result or one message, never another error."""

import csv
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsr_fast.config import Config, build_config, load_config, read_yaml
from fsr_fast.dataloading.coco import Instances
from fsr_fast.dataloading.datasets import open_split
from fsr_fast.dataloading.labels import TableLabels, read_csv, read_json
from fsr_fast.dataloading.layout import check_names, read_list
from fsr_fast.dataloading.pack import pack
from fsr_fast.dataloading.shard_reader import ShardDataset
from fsr_fast.errors import UserError
from fsr_fast.models.build import restore_network
from fsr_fast.reporting.tracking import read_metrics
from fsr_fast.runtime.checkpoint import read_checkpoint, write_checkpoint
from tests import helpers

pytestmark = pytest.mark.fuzz
fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(fuzz, max_examples=25)

VALUES = helpers.config().model_dump(mode="json")
nasty = st.sampled_from([float("inf"), float("nan"), 1e308, 10**30, -1, 0, "", "..", "/", "nul\0", [], {}])
plain = nasty | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def attempt(function, *arguments):
    """Return the result, or None if the input is refused with a message."""
    try:
        return function(*arguments)
    except UserError:
        return None


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes with some changed, cut off or doubled."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "double"]))
        if kind == "flip" and place < len(changed):
            changed[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 200))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=8))
        else:
            changed += changed[place : place + 50]
    return bytes(changed)


# --- configuration

keys = st.sampled_from([(section, key) for section, content in VALUES.items() for key in content])


@fuzz
@given(st.dictionaries(keys, anything, min_size=1, max_size=4))
def test_values_of_a_configuration(changes):
    values = {section: dict(content) for section, content in VALUES.items()}
    for (section, key), value in changes.items():
        values[section][key] = value
    assert isinstance(attempt(build_config, values, "the fuzz"), Config | None)


@fuzz
@given(st.dictionaries(st.sampled_from([*VALUES, "base", "rnu"]), anything))
def test_sections_of_a_configuration(values):
    assert isinstance(attempt(build_config, values, "the fuzz"), Config | None)


@fuzz
@given(damaged(yaml.safe_dump(VALUES).encode()) | st.binary(max_size=60))
def test_the_bytes_of_a_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert isinstance(attempt(read_yaml, path), dict | None)


@few
@given(keys, st.text(max_size=12) | st.sampled_from(["[", "{", "null", "1e999", "--", "[1,[2]]", "nan"]))
def test_a_command_line(key, value):
    assert isinstance(attempt(load_config, [f"--{'.'.join(key)}", value]), tuple | None)


# --- lists and labels

TABLE = "image,labels\na,red\nb,red green\n"
ENTRIES = [{"image": "a", "labels": ["red"]}, {"image": "b", "labels": ["red", "green"]}]
INSTANCES = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 8, "width": 9}],
    "annotations": [{"image_id": 7, "category_id": 2, "area": 4.0, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
    "categories": [{"id": 2, "name": "red"}],
}


def read_table(reader, path: Path) -> dict[str, list[int] | None]:
    table = TableLabels(path, reader(path), helpers.CLASSES)
    return {name: attempt(table, name) for name in [*table, "c"]}


rows = st.lists(st.lists(st.text(max_size=6), max_size=3), max_size=4)


@fuzz
@given(damaged(TABLE.encode()) | st.binary(max_size=40) | rows)
def test_a_label_table(tmp_path, content):
    path = tmp_path / "labels.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            csv.writer(file, escapechar="\\").writerows([["image", "labels"], *content])
    attempt(read_table, read_csv, path)


@fuzz
@given(
    damaged(json.dumps(ENTRIES).encode())
    | st.lists(st.fixed_dictionaries({}, optional={"image": anything, "labels": anything})).map(json.dumps)
    | anything.map(json.dumps)
)
def test_label_entries(tmp_path, content):
    path = tmp_path / "labels.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    attempt(read_table, read_json, path)


def read_instances(path: Path) -> None:
    instances = Instances(path, helpers.CLASSES, with_masks=True)
    for name in [*instances.listed(), "a"]:
        attempt(instances.labels, name)
        attempt(instances.mask, name)


@st.composite
def changed_instances(draw) -> bytes:
    content = json.loads(json.dumps(INSTANCES))
    section = draw(st.sampled_from(list(content)))
    if draw(st.booleans()):
        content[section] = draw(anything)
    else:
        key = draw(st.sampled_from(list(content[section][0])))
        content[section][0][key] = draw(anything)
    return json.dumps(content).encode()


@settings(fuzz, max_examples=400)
@given(damaged(json.dumps(INSTANCES).encode()) | changed_instances())
def test_an_instances_file(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    attempt(read_instances, path)


@fuzz
@given(damaged(b"first\nsecond\n") | st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")))
def test_a_list_of_images(tmp_path, content):
    path = tmp_path / "train.txt"
    path.write_bytes(content)

    def checked() -> list[str]:
        names = read_list(path, "data.train_list")
        check_names(names, path, "data.train_list")
        return names

    for name in attempt(checked) or []:
        inside = (tmp_path / "images" / name).resolve()
        assert inside.is_relative_to((tmp_path / "images").resolve())


# --- shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """Intact shards of four images with masks, by file name."""
    root = helpers.write_dataset(tmp_path_factory.mktemp("files"))
    folder = tmp_path_factory.mktemp("packed")
    split = open_split(build_config(helpers.values(root=root), "the test").data, training=False, with_masks=True)
    pack(split, str(folder), "val", with_masks=True, shard_bytes=10**6, track=lambda samples, *_: samples)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lay_out(folder: Path, files: dict[str, bytes]) -> str:
    """Write shards beside an unrelated file."""
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "secret.tar").write_bytes(files["val-000000.tar"])
    (folder / "secret.idx").write_bytes(files["val-000000.idx"])
    for name, content in files.items():
        (folder / "shards" / name).write_bytes(content)
    return str(folder / "shards")


def read_shards(root: str) -> int:
    """Read all there is; return the number of parts that could be read."""
    dataset = ShardDataset(root, "val")
    found = 0
    for index in range(min(len(dataset), 6)):
        readers = dataset.encoded, dataset.image, dataset.mask, dataset.ids.__getitem__
        found += sum(attempt(reader, index) is not None for reader in readers)
    return found


def test_sound_shards_are_read_whole(tmp_path, shards):
    assert read_shards(lay_out(tmp_path, shards)) == 4 * 4


@fuzz
@given(data=st.data())
def test_the_bytes_of_shards(tmp_path, shards, data):
    name = data.draw(st.sampled_from(sorted(shards)))
    attempt(read_shards, lay_out(tmp_path, {**shards, name: data.draw(damaged(shards[name]))}))


numbers = st.integers(-3, 10**4) | st.sampled_from([2**31, 2**47, 2**63, 10**30])
elsewhere = st.sampled_from(["../secret.tar", "..\\secret.tar", "/secret.tar", "", ".", "val-000000.tar"])


@fuzz
@given(data=st.data())
def test_the_index_of_shards(tmp_path, shards, data):
    index = json.loads(shards["val.json"])
    place = data.draw(st.sampled_from([index, index["shards"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(anything | numbers | elsewhere)
    attempt(read_shards, lay_out(tmp_path, {**shards, "val.json": json.dumps(index).encode()}))


@fuzz
@given(data=st.data())
def test_offsets_within_shards(tmp_path, shards, data):
    head, *lines = [line.split() for line in shards["val-000000.idx"].decode().splitlines()]
    line = data.draw(st.sampled_from(lines))
    line[data.draw(st.sampled_from(range(len(line))))] = str(data.draw(numbers | st.text(max_size=4)))
    index = json.loads(shards["val.json"])
    index["shards"][0]["bytes"] = data.draw(st.just(index["shards"][0]["bytes"]) | numbers)
    changed = {
        "val-000000.idx": "\n".join(" ".join(words) for words in (head, *lines)).encode("utf-8", "replace"),
        "val.json": json.dumps(index).encode(),
    }
    attempt(read_shards, lay_out(tmp_path, {**shards, **changed}))


@pytest.mark.parametrize("file", ["../secret.tar", "/secret.tar", "..\\secret.tar"])
def test_no_shard_lies_outside_of_its_folder(tmp_path, shards, file):
    index = json.loads(shards["val.json"])
    index["shards"][0]["file"] = str(tmp_path) + file if file[0] == "/" else file
    with pytest.raises(UserError, match=r"shards\.0\.file"):
        read_shards(lay_out(tmp_path, {**shards, "val.json": json.dumps(index).encode()}))


@fuzz
@given(labels=anything, name=anything)
def test_what_is_written_about_a_sample(tmp_path, shards, labels, name):
    tar = shards["val-000000.tar"]
    head, *lines = [line.split() for line in shards["val-000000.idx"].decode().splitlines()]
    about = json.dumps({"labels": labels, "name": name}).encode()
    place = lines[0].index("json")
    lines[0][place + 1 : place + 3] = [str(len(tar)), str(len(about))]
    index = json.loads(shards["val.json"])
    index["shards"][0]["bytes"] = len(tar) + len(about)
    changed = {
        "val-000000.tar": tar + about,
        "val-000000.idx": "\n".join(" ".join(words) for words in (head, *lines)).encode(),
        "val.json": json.dumps(index).encode(),
    }
    attempt(read_shards, lay_out(tmp_path, {**shards, **changed}))


# --- what a run has written

STATE = {"iteration": 3, "config": VALUES, "classes": list(helpers.CLASSES), "student": {"w": torch.ones(3)}}


def signed(content: bytes) -> bytes:
    """A checkpoint with a correct checksum, whatever its content."""
    body = content[:-2] + struct.pack("<H", 71)
    return body + b"sha256:" + hashlib.sha256(body).hexdigest().encode()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    """An intact checkpoint without its checksum."""
    return write_checkpoint(tmp_path_factory.mktemp("archive"), STATE).read_bytes()[:-71]


@fuzz
@given(data=st.data())
def test_the_bytes_of_a_checkpoint(tmp_path, archive, data):
    path = tmp_path / "broken.pt"
    content = data.draw(damaged(archive) | st.binary(max_size=60))
    path.write_bytes(signed(content) if data.draw(st.booleans()) else content)
    assert isinstance(attempt(read_checkpoint, path), dict | None)


@few
@given(st.sampled_from([*STATE, "none"]), anything, st.sampled_from([None, *VALUES]))
def test_the_content_of_a_checkpoint(key, value, section):
    state = {**STATE, key: value}
    if key == "config" and section:
        state["config"] = {**VALUES, section: value}
    attempt(restore_network, state, "the fuzz")


@fuzz
@given(damaged(b'{"iteration": 1, "wall_seconds": 0.5, "loss/total": 2.0}\n' * 3) | st.binary(max_size=60))
def test_the_metrics_of_a_run(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    for line in attempt(read_metrics, tmp_path) or []:
        assert isinstance(line["iteration"], int)
