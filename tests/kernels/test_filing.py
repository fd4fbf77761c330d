"""Every operation is filed, ordered and registered in one way."""

import ast
from pathlib import Path

import pytest

from fsr_fast import kernels

FOLDER = Path(kernels.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))
OPERATIONS = [name for name in MODULES if name not in ("__init__", "bilinear", "dispatch")]
PARTS = ("kernel", "launch", "registration", "autograd", "public function")


def part_of(node: ast.stmt, module: str) -> str | None:
    """What a top-level statement belongs to; None for constants, types, and helpers of a part."""
    source = ast.unparse(node)
    if "register_autograd(" in source or getattr(node, "name", "") in ("_setup_context", "_backward"):
        return "autograd"
    if not isinstance(node, ast.FunctionDef):
        return None
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    if "triton.jit" in decorators:
        return "kernel"
    if "custom_op" in decorators or "register_fake" in decorators:
        return "registration"
    if module.endswith("_kernels") or node.name == "compile_cases" or node.name.startswith("launch_"):
        return "launch"
    return None if node.name.startswith("_") else "public function"


@pytest.mark.parametrize("module", OPERATIONS)
def test_a_file_has_the_one_order(module: str) -> None:
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    parts = [part for part in (part_of(node, module) for node in tree.body) if part]
    assert parts == sorted(parts, key=PARTS.index)
    allowed = PARTS[:2] if module.endswith("_kernels") else PARTS[2:] if f"{module}_kernels" in MODULES else PARTS
    assert set(parts) <= set(allowed)


@pytest.mark.parametrize("module", OPERATIONS)
def test_operators_are_registered_in_the_one_way(module: str) -> None:
    source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    assert "autograd.Function" not in source
    assert "triton_op" not in source
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and "custom_op" in ast.unparse(node):
            assert node.name.endswith("_op")
            assert f'custom_op("fsr::{node.name.removesuffix("_op")}", mutates_args=())' in source
            assert f"@{node.name}.register_fake" in source


def test_no_function_hides_a_module() -> None:
    assert not set(kernels.__all__) & set(MODULES)
    assert all(getattr(kernels, module).__name__.endswith(f".{module}") for module in OPERATIONS)
