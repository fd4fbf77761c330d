"""What strangers give: checkpoints and run folders may name anything, and nothing outside of them is reached."""

import socket
from pathlib import Path

import fsspec
import pytest

from fsr_fast.commands.evaluate import main as evaluate
from fsr_fast.commands.pseudo_labels import main as label
from fsr_fast.commands.report import main as report
from fsr_fast.config import build_config
from fsr_fast.dataloading.stores import open_store
from fsr_fast.errors import UserError
from fsr_fast.models import load_network
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.run_folder import open_run_folder
from tests import helpers

pytestmark = pytest.mark.fuzz


class Reached(BaseException):
    """Something outside was reached; no handler for errors catches it."""


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every connection and every address that is opened end the test."""

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
    with pytest.raises(UserError, match=rf"model\.backbone_options: '{option}' is no argument"):
        load_network(run)
