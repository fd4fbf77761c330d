"""Untrusted input: checkpoints and run folders may name anything, and nothing outside them is reached."""

import io
import json
import os
import re
import resource
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image

from fsr_fast.commands import export
from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.predict import main as predict
from fsr_fast.commands.pseudo_labels import main as label
from fsr_fast.commands.report import main as report
from fsr_fast.config import build_config
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.dataloading.stores import open_store
from fsr_fast.errors import UserError
from fsr_fast.models import load_network
from fsr_fast.models.folder import DESCRIPTION, WEIGHTS
from fsr_fast.models.pretrained import read_weights
from fsr_fast.reporting.record import read_run
from fsr_fast.runtime.checkpoint import FORMAT, write_checkpoint
from fsr_fast.runtime.run_folder import open_run_folder
from fsr_fast.train import main as train
from tests import helpers
from tests.test_fuzz import signed

pytestmark = pytest.mark.fuzz


class Reached(BaseException):
    """Something outside was reached; no handler for errors catches it."""


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the test on every connection and every opened address."""

    def reach(*arguments: object, **options: object) -> None:
        raise Reached(arguments)

    monkeypatch.setattr(socket, "socket", reach)
    monkeypatch.setattr(socket, "getaddrinfo", reach)
    monkeypatch.setattr(fsspec.core, "url_to_fs", reach)


def stranger(folder: Path, *changes: dict, **parts: object) -> Path:
    """Write a run folder whose configuration is changed after its network was built."""
    config = helpers.config()
    claimed = build_config(helpers.values(*changes, output=folder), "the test")
    open_run_folder(claimed)
    state = {
        "iteration": 1,
        "config": claimed.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": helpers.network(config).state_dict(),
        **parts,
    }
    write_checkpoint(folder, state)
    return folder


# --- addresses


@pytest.mark.parametrize(
    "address",
    [
        "reference://::file:///tmp/refs.json",
        "simplecache::reference://::file:///tmp/refs.json",
        "zip://a.tar::s3://bucket/x.zip",
        "dir::file:///tmp",
        "webhdfs://host/folder",
        "ftp://host/folder",
        "sftp://host/folder",
        "github://owner:name@main/folder",
        "S3://bucket",
        "data:,abc://",
        "://",
        "s3://bucket::file:///tmp",
    ],
)
@pytest.mark.usefixtures("sealed")
def test_no_address_but_that_of_a_store_is_opened(address):
    with pytest.raises(UserError, match=r"data\.root: .* leads through .*expected a folder, or an address such as"):
        open_store(address)


def test_a_folder_is_a_folder_whatever_its_name(tmp_path):
    (tmp_path / "reference::").mkdir()
    filesystem, folder = open_store(str(tmp_path / "reference::"))
    assert filesystem.isdir(folder)
    assert filesystem.protocol == ("file", "local")


@pytest.mark.parametrize("verb", ["evaluate", "pseudo-labels", "report"])
@pytest.mark.usefixtures("sealed")
def test_the_address_that_a_checkpoint_names_is_not_opened_unless_the_user_gives_it(tmp_path, verb):
    run = stranger(tmp_path / "run", {"data": {"dataset": "shards", "root": "https://example.org/x", "labels": "auto"}})
    command = {
        "evaluate": lambda *more: evaluate(["--checkpoint", str(run), "--output", str(tmp_path / "out"), *more]),
        "pseudo-labels": lambda *more: label(["--checkpoint", str(run), "--output", str(tmp_path / "out"), *more]),
        "report": lambda *more: report([str(run), *more]),
    }[verb]
    with pytest.raises(UserError, match=r"names the address 'https://example.org/x' .*--root"):
        command()
    with pytest.raises(Reached):
        command("--root", "https://example.org/x")


# --- weights


@pytest.mark.usefixtures("sealed")
def test_the_start_of_a_training_is_not_fetched_for_a_trained_network(tmp_path):
    change = {"model": {"pretrained": "hub", "initial": str(tmp_path / "elsewhere")}}
    assert load_network(stranger(tmp_path / "run", change)).classes == helpers.CLASSES


@pytest.mark.parametrize("option", ["pretrained", "scriptable", "features_only"])
@pytest.mark.usefixtures("sealed")
def test_the_backbone_takes_sizes_and_switches_alone(tmp_path, option):
    options = helpers.values()["model"]["backbone_options"] | {option: True}
    run = stranger(tmp_path / "run", {"model": {"backbone_options": options}})
    with pytest.raises(UserError, match=rf"model\.backbone_options: '{option}' is not an argument"):
        load_network(run)


# --- tensors and sizes that claim more than there is

STRANGE: dict[str, Any] = {
    "one element shown a trillion times": torch.zeros(1).expand(10**6, 10**6),
    "one element shown as often as the file has bytes": torch.zeros(1).expand(10**4),
    "sparse": torch.zeros(10**3, 10**3).to_sparse(),
    "without data": torch.zeros(10, device="meta"),
}


@pytest.mark.parametrize("tensor", STRANGE.values(), ids=STRANGE)
def test_a_tensor_that_is_more_than_its_bytes_is_refused_by_every_reader(tmp_path, tensor):
    torch.save({"w": tensor} if torch.is_tensor(tensor) else tensor, tmp_path / "weights.pth")
    for path in (stranger(tmp_path / "run", student={"w": tensor}), tmp_path / "weights.pth"):
        with pytest.raises(UserError, match=r"claims to hold|not plain|not this method's"):
            load_network(path)
    with pytest.raises(UserError, match=r"claims to hold|not plain"):
        read_weights(tmp_path / "weights.pth")


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="claims to hold"):
        read_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "model",
    [
        {"prototypes": 10**10},
        {"aggregator_blocks": 10**9},
        {"decoder_width": 2**17},
        {"backbone_options": {"depth": 10**9}},
    ],
)
def test_a_description_larger_than_its_weights_takes_no_memory(tmp_path, model):
    options = helpers.values()["model"]["backbone_options"] | model.get("backbone_options", {})
    config = helpers.config().model_dump(mode="json")
    config["model"] |= {**model, "backbone_options": options}
    run = stranger(tmp_path / "run", config=config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        load_network(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


def test_a_network_that_is_read_has_every_value_of_the_one_that_was_written_also_those_that_no_file_holds(tmp_path):
    expected = helpers.network(helpers.config())
    network = load_network(stranger(tmp_path / "run"))
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert values.keys() == {**dict(expected.named_parameters()), **dict(expected.named_buffers())}.keys()
    for name, value in (*expected.named_parameters(), *expected.named_buffers()):
        assert torch.equal(values[name], value), name


@pytest.mark.parametrize("iteration", [float("inf"), float("nan"), -1, "3", None, 2**63, True, [1]])
def test_an_iteration_that_is_no_number_of_iterations_is_refused(tmp_path, iteration):
    content = io.BytesIO()
    torch.save({"format": FORMAT, "iteration": iteration, "student": {}}, content)
    (tmp_path / "strange.pt").write_bytes(signed(content.getvalue()))
    with pytest.raises(UserError, match=r"not a readable checkpoint \(its iteration is"):
        load_network(tmp_path / "strange.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export.main(["--checkpoint", str(stranger(folder / "run")), "--output", str(folder / "network")])
    return folder / "network"


def header(text: bytes, length: int | None = None) -> Callable[[Path], Any]:
    """Write weights that begin with this header."""
    content = struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def described(**changes: Any) -> Callable[[Path], Any]:
    """Change the description."""

    def change(folder: Path) -> None:
        path = folder / DESCRIPTION
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


OVERLAP = {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a", "b")}
ATTACKS: dict[str, Callable[[Path], Any]] = {
    "header of 2^63 bytes": header(b"{}", 2**63),
    "header of 2^64 - 1 bytes": header(b"{}", 2**64 - 1),
    "header nested deep": header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "tensors that overlap": header(json.dumps(OVERLAP).encode()),
    "tensor beyond the end": header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
    "no image": described(image_size=0),
    "infinite image": described(image_size=10**12),
    "description nested deep": lambda folder: (folder / DESCRIPTION).write_text("[" * 100_000),
    "number of 5,000 digits": lambda folder: (folder / DESCRIPTION).write_text("9" * 5000),
    "weights that are a pipe": lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
    "description that is a pipe": lambda folder: ((folder / DESCRIPTION).unlink(), os.mkfifo(folder / DESCRIPTION)),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.usefixtures("sealed")
def test_an_exported_folder_that_lies_is_refused(tmp_path, exported, attack):
    folder = shutil.copytree(exported, tmp_path / "network")
    assert load_network(folder).classes == helpers.CLASSES
    attack(folder)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        load_network(folder)


@pytest.mark.parametrize("name", ["checkpoints/0000002.pt", "config.yaml", "metrics.jsonl", "summary.json"])
def test_a_pipe_in_a_run_folder_keeps_nobody_waiting(tmp_path, name):
    run = stranger(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert load_network(run).classes == helpers.CLASSES
    if name == "config.yaml":
        with pytest.raises(UserError, match="not a run"):
            report([str(run)])


def test_the_page_of_a_run_shows_no_file_from_outside_of_its_folder(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "secret.json").write_text('{"results": {}, "key": "hunter2"}')
    (secret / "secret.jsonl").write_text('{"iteration": 1, "wall_seconds": 1, "loss/hunter2": 1}\n')
    Image.new("RGB", (9, 9)).save(secret / "secret.png")
    root = helpers.write_dataset(tmp_path / "data", train=1, val=1)
    run = stranger(tmp_path / "run", {"data": {"root": str(root)}})
    (run / "pictures").mkdir()
    (run / "pictures" / "training_0000001.png").symlink_to(secret / "secret.png")
    os.mkfifo(run / "pictures" / "training_0000002.png")
    for name in ("environment.json", "summary.json", "metrics.jsonl"):
        (run / name).symlink_to(secret / f"secret.{name.partition('.')[2]}")
    report([str(run), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "hunter2" not in page
    assert read_run(run).pictures == []
    (secret / "secret.yaml").write_text("hunter2: {}")
    for text in (f"base: {secret}/secret.yaml\n", "base: ../secret/secret.yaml\n"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="the configuration of a run must not name another file") as caught:
            report([str(run)])
        assert "hunter2" not in str(caught.value)
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(secret / "secret.yaml")
    with pytest.raises(UserError, match="not a run"):
        report([str(run)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", '{"a":' * 100_000),
        ("summary.json", "[]"),
        ("summary.json", '{"iterations": "many"}'),
        ("summary.json", '{"results": {"seg": {"mean_iou": "<b>", "classes": {}}}}'),
        ("summary.json", '{"results": {"seg": {"mean_iou": 1.0}}}'),
        ("summary.json", '{"results": {"seg": {"mean_iou": 1.0, "classes": {"cat": 3}}}}'),
        ("summary.json", '{"labels": {"mean_ap": 1.0}}'),
        ("summary.json", '{"start_weights": {"name": "x", "more": 1}}'),
        ("environment.json", '{"packages": []}'),
        ("config.yaml", "data: [1]"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, name, text):
    run = stranger(tmp_path / "run")
    (run / name).write_text(text)
    for command in (lambda: report([str(run)]), lambda: export.main(["--checkpoint", str(run)])):
        with pytest.raises(UserError, match=re.escape(str(run / name))):
            command()


# --- names

NASTY = {
    "markup": "cup [/mug]",
    "open markup": "[red]cup",
    "HTML": "<script>alert(1)</script>",
    "table": "a | b",
    "path": "../../etc/cup",
    "quotes": "\"'`",
    "formula": "$\\frac$ x_y",
}
UNPRINTABLE = ["", "  ", "a\nb", "a\x00b", "\x1b[31mred", "x" * 101, "\u202eabc", "\ud800"]


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_names_of_classes_that_cannot_be_shown_are_refused_at_the_door(tmp_path, name):
    classes = [name, *helpers.CLASSES[1:]]
    with pytest.raises(UserError, match="is not a class name; expected 1 to 100 bytes of printable text"):
        load_network(stranger(tmp_path / "run", classes=classes))
    root = helpers.write_dataset(tmp_path / "data", train=1, val=1)
    with pytest.raises(UserError, match=r"data\.classes: .* is not a class name"):
        build_datasets(build_config(helpers.values({"data": {"classes": classes}}, root=root), "the test").data)
    with pytest.raises(UserError, match="is listed twice"):
        load_network(stranger(tmp_path / "twice", classes=["cup", "cup", "mug"]))


def test_names_of_classes_are_shown_as_they_are_everywhere(tmp_path, capsys):
    names = list(NASTY.values())
    root = helpers.write_dataset(tmp_path / "data", train=2, val=1)
    (root / "labels.csv").write_text(
        "image,labels\n" + "".join(f'picture_{n},"{names[n].replace(chr(34), chr(34) * 2)}"\n' for n in range(3))
    )
    recipe = helpers.values(
        {"data": {"classes": names, "labels": "masks"}, "optim": {"iterations": 2}}, root=root, output=tmp_path / "run"
    )
    train(["--config", str(helpers.write_config(tmp_path / "recipe.yaml", recipe))])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2
    run = str(tmp_path / "run")
    evaluate(["--checkpoint", run, "--output", str(tmp_path / "scores")])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    written = (tmp_path / "scores" / "report.md").read_text()
    assert "| a \\| b |" in written
    assert "<script>" not in written
    predict(["--checkpoint", run, str(root / "JPEGImages/picture_0.jpg"), "--output", str(tmp_path / "out")])
    assert {path.parent for path in (tmp_path / "out").rglob("*.png")} <= {
        tmp_path / "out" / part for part in ("masks", "overlays", "cams")
    }
    report([run, "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert(1)</script>" not in page
    assert "\\u003cscript" not in page, "plotly would read it as HTML"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    export.main(["--checkpoint", run, "--output", str(tmp_path / "network")])
    assert load_network(tmp_path / "network").classes == tuple(names)
    card = (tmp_path / "network" / "README.md").read_text()
    assert "<script>" not in card
    assert "| \\$\\\\frac\\$ x_y |" in card


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = helpers.network(helpers.config()).state_dict()
    weights["decoder.conv8.weight"][0] = value
    with pytest.raises(UserError, match=r"the weights 'decoder\.conv8\.weight' are not finite"):
        load_network(stranger(tmp_path / "run", student=weights))
