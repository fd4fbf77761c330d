"""Every shipped kernel configuration compiles for every target and keeps its values in registers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import compile_table

ROOT = Path(__file__).parents[2]
JOBS = compile_table.jobs(compile_table.modules())


def run_without_interpreter(module: str, *arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows of the table, compiled in one process that never saw the interpreter."""
    found = run_without_interpreter("compile_table", "--json")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + compile_table.table(found))
    return {(row["module"], row["case"], row["target"]): row for row in found}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job[0]}-{job[1]}-sm_{job[2]}")
def test_configuration_fits_the_registers(job: tuple[str, str, int], compiled: dict) -> None:
    module, case, target = job
    row = compiled[module, case, f"sm_{target}"]
    assert row["spill_bytes"] == 0 or row["spill_reason"], f"{row['spill_bytes']} bytes a thread are spilled"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job[0]}-{job[1]}-sm_{job[2]}")
def test_configuration_fits_the_shared_memory(job: tuple[str, str, int], compiled: dict) -> None:
    module, case, target = job
    limit = {80: 163, 90: 227, 100: 227}[target] * 1024  # CUDA programming guide, memory a block may opt in to
    assert compiled[module, case, f"sm_{target}"]["shared_bytes"] <= limit


def test_every_launch_can_be_lowered_whatever_its_sizes() -> None:
    found = run_without_interpreter("lowering")
    assert found["failures"] == []
    kernels = {case.kernel.__name__ for name in compile_table.modules() for case in cases_of(name)}
    assert found["made"].keys() == kernels


def cases_of(name: str) -> list[Any]:
    return list(importlib.import_module(f"fsr_fast.kernels.{name}").compile_cases())
