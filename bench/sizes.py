"""Measure the size of an installation on disk: ``python -m bench.sizes``.

``FSR_RECORD=1`` writes ``bench/results/<device>/sizes.json``, from which ``python -m bench.plot`` makes the table.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.harness import record

ROOT = Path(__file__).parents[1]
INSTALLATIONS = {
    "to use trained networks": (("-r", "inference.txt"), ("--no-deps", ".")),
    "everything": ((".",),),
    "with the development tools": ((".[dev]",),),
}
"""Arguments of each `pip install`."""


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder, without links."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def install(target: Path, *steps: tuple[str, ...]) -> int:
    """Install into a new environment, and return its size in bytes."""
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", str(target)], check=True, cwd=ROOT)
    command = [uv, "pip", "install", "--quiet", "--python", str(target / "bin/python"), "-c", "constraints.txt"]
    for arguments in steps:
        subprocess.run([*command, *arguments], check=True, cwd=ROOT)
    return size_of(target)


def main() -> None:
    """Measure and record every installation."""
    for name, steps in INSTALLATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            size = install(Path(folder) / "environment", *steps)
        print(f"{name}: {size / 1e9:.1f} GB")
        record(f"sizes {name}", torch.device("cpu"), {"installation": name, "bytes": size})


if __name__ == "__main__":
    main()
