"""The audit of the dependencies passes, fails, or says that it is skipped."""

import os
import subprocess
from pathlib import Path

import pytest

AUDIT = Path(__file__).parent.parent / ".ci" / "audit"


def run(folder: Path, output: str | None, code: int = 0) -> subprocess.CompletedProcess:
    """Run the audit where `pip-audit` prints this, or is missing."""
    if output is not None:
        program = folder / "pip-audit"
        program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        program.chmod(0o755)
    tools = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run([AUDIT], env={**os.environ, **tools}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        (None, 0, (0, "SKIPPED: pip-audit is not installed")),
        ("No known vulnerabilities found", 0, (0, "No known vulnerabilities found")),
        ("Found 2 known vulnerabilities in 1 package", 1, (1, "Found 2 known vulnerabilities")),
        ("ConnectionError: no route to host", 1, (0, "SKIPPED: ConnectionError: no route to host")),
    ],
)
def test_an_audit_ends_as_its_report_says(tmp_path, output, code, expected):
    done = run(tmp_path, output, code)
    assert done.returncode == expected[0]
    assert expected[1] in done.stdout + done.stderr
