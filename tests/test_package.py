"""What `import fsr_fast` offers, and what it leaves alone."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fsr_fast

ROOT = Path(__file__).parents[1]


def test_the_names_of_the_package_are_listed_and_lead_somewhere():
    assert {"load_network", "from_pretrained", "segment", "Network", "Prediction", "__version__"} <= set(dir(fsr_fast))
    assert all(getattr(fsr_fast, name) is not None for name in fsr_fast.__all__)
    assert fsr_fast.from_pretrained is fsr_fast.load_network
    assert fsr_fast.__version__ == metadata.version("fsr_fast")
    with pytest.raises(AttributeError, match="has no attribute 'segmnt'"):
        _ = fsr_fast.segmnt


def test_importing_the_package_imports_no_torch_and_using_a_network_no_training_tools():
    script = """
import sys
import fsr_fast
assert "torch" not in sys.modules
fsr_fast.segment, fsr_fast.load_network
import fsr_fast.commands.predict
tools = {"nvidia", "tensorboard", "webdataset", "fsspec", "pycocotools", "plotly", "xformers", "mlflow"}
heavy = tools & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (ROOT / "fsr_fast/py.typed").is_file()


def test_the_workflow_runs_the_checks_of_the_project():
    assert "run: .ci/run" in (ROOT / ".github/workflows/checks.yml").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
