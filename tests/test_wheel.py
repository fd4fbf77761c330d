"""The wheel contains everything that a training needs: built, installed outside the source, used in an empty folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = (
    *("--optim.iterations=2", "--optim.batch_size=2", "--optim.warmup=0", "--evaluate.limit=2"),
    *("--loss.segmentation_start=0", "--run.device=cpu"),
)
SCRIPT = """
import sys
from pathlib import Path
from fsr_fast import cli
from fsr_fast.dataloading.synthetic import generate

assert Path(cli.__file__).is_relative_to(sys.argv[1]), cli.__file__
generate(Path("data/synthetic"), train=8, val=2, processes=1)
import fsr_fast.dataloading.synthetic as synthetic
synthetic.ensure = lambda root: None
cli.dispatch(["train", *sys.argv[2:]])
cli.dispatch(["report", "runs/synthetic", "--limit", "2", "--rows", "1"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):  # a copy: a build leaves its traces beside setup.py
        path = ROOT / name
        if not name or name.startswith(("tests/", "docs/", "bench/")) or not (path.is_file() or path.is_symlink()):
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            (source / name).symlink_to(os.readlink(path))
        else:
            (source / name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_recipe_and_template(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fsr_fast/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.yaml", "*.html", "*.css", "*.js")
        for path in (ROOT / "fsr_fast").rglob(pattern)
    }
    for linked in ("kernels", "dataloading", "configs"):
        files |= {f"fsr_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / linked).glob("*.py")}
    assert files <= held
    assert "fsr_fast/py.typed" in held
    assert {f"fsr_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= held


def test_the_wheel_requires_all_that_a_training_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", archive.read(name).decode(), re.MULTILINE)
    assert {"torch", "triton", "timm", "xformers", "nvidia-dali-cuda130", "pydensecrf2", "tensorboard"} <= {*required}
    inference = re.findall(r"^([\w-]+)", (ROOT / "inference.txt").read_text(), re.MULTILINE)
    assert len(inference) > 10
    assert {*inference} < {*required}


def test_a_training_and_its_report_work_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    target, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    assert (target / "bin/fsr-fast").is_file()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target), *SHORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((folder / "runs/synthetic/summary.json").read_text())["iterations"] == 2
    assert (folder / "runs/synthetic/report.html").is_file()
