"""Arrows point one way: a room imports itself and the floors below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsr_fast

PACKAGE = Path(fsr_fast.__file__).parent
ROOT = PACKAGE.parent
FLOORS = [
    {"errors"},
    {"options", "cli"},  # the command line names its verbs by strings and imports none
    {"config", "config_fields", "config_method", "config_sections", "plugins", "recipes"},
    {"runtime", "dataloading"},
    {"models"},
    {"method"},
    {"evaluation"},
    {"reporting"},
    {"engine"},
    {"trainer"},
    {"commands", "train"},
    {"__init__", "__main__"},
]
"""From the ground up; the rooms of one floor may import each other."""
APART = {"kernels": {"torch", "triton"}, "reference": {"torch"}}
"""What these rooms import besides the standard library and themselves."""
KNOWS_KERNELS = {"dataloading", "models", "method", "evaluation", "reporting"}
KNOWS_THE_REFERENCE = {"method/reference_step.py"}


def modules() -> list[Path]:
    folders = [PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_dir() and entry.name != "configs")]
    return sorted(file for folder in folders for file in folder.glob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Yield whole names: a function's own imports too, relative ones from the root."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(file: Path) -> str:
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else file.stem


def floor(name: str) -> int:
    (number,) = (number for number, rooms in enumerate(FLOORS) if name in rooms)
    return number


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_arrow_climbs(file):
    here, place = room(file), str(file.relative_to(PACKAGE))
    for name in imports(file):
        top, *rest = name.split(".")
        assert top not in {"bench", "tests"}, f"{place} imports {name}"
        if here in APART:
            foreign = rest[0] != here if top == "fsr_fast" else top not in APART[here] | sys.stdlib_module_names
            assert not foreign, f"{place} imports {name}"
        elif top == "fsr_fast":
            target = rest[0] if (PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").is_file() else "__init__"
            if target == "kernels":
                assert here in KNOWS_KERNELS, f"{place} imports {name}"
            elif target == "reference":
                assert place in KNOWS_THE_REFERENCE, f"{place} imports {name}"
            else:
                assert floor(target) <= floor(here), f"{place} imports {name}"


@pytest.mark.parametrize("file", sorted((ROOT / "bench").glob("*.py")), ids=lambda file: file.name)
def test_no_bench_imports_a_test(file):
    assert not [name for name in imports(file) if name.split(".")[0] == "tests"]
