import ast
from pathlib import Path

import fsr_fast.reference

ALLOWED = {"torch", "math", "typing", "collections"}


def test_the_reference_imports_torch_and_itself_only():
    files = sorted(Path(fsr_fast.reference.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name}:{node.lineno} reaches outside the reference"
                names = [] if node.level else [node.module or ""]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= ALLOWED, f"{file.name}:{node.lineno} imports {names}"
