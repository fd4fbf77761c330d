"""What inference.txt installs is enough to use a network; what it leaves out is named where it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fsr_fast.config import build_config
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.run_folder import open_run_folder
from tests import helpers

LEFT_OUT = (
    *("nvidia.dali", "xformers", "pydensecrf", "tensorboard", "plotly", "scipy", "kornia"),
    *("pycocotools", "shtab", "webdataset"),
)
"""Modules of what setup.py requires for a training alone."""
SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in LEFT_OUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from fsr_fast import cli
from fsr_fast.reporting.demo import DemoServer
DemoServer.serve_forever = lambda self: print("serving")
sys.argv[0] = "fsr-fast"
cli.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("light")
    root = helpers.write_dataset(place / "data", train=2, val=2)
    config = build_config(helpers.values(root=root, output=place / "run"), "the test")
    open_run_folder(config)
    state = {
        "iteration": 1,
        "config": config.model_dump(mode="json"),
        "classes": list(helpers.CLASSES),
        "student": helpers.network(config).state_dict(),
    }
    write_checkpoint(place / "run", state)
    return place


def light(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"LEFT_OUT = {LEFT_OUT!r}\n{SCRIPT}"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=place)


@pytest.mark.parametrize("verb", ["predict", "serve", "export", "evaluate"])
def test_a_network_is_used_without_the_tools_of_a_training(place, verb):
    arguments = {"predict": ["data/JPEGImages"], "serve": ["--port", "0"]}.get(verb, [])
    result = light(place, verb, "--checkpoint", "run", *arguments)
    assert result.returncode == 0, result.stderr
    written = {
        "predict": "run/predictions/scores.json",
        "export": "run/exported/network/config.json",
        "evaluate": "run/metrics.json",
    }
    if verb in written:
        assert json.loads((place / written[verb]).read_text())


def test_a_verb_that_needs_more_names_the_package_and_how_to_install_it(place):
    result = light(place, "report", "run")
    assert result.returncode == 2
    assert result.stderr.startswith("error: this needs plotly, which is not installed")
    assert "pip install -c constraints.txt ." in result.stderr
    assert "Traceback" not in result.stderr
