"""What importing the package sets before torch is loaded."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.system() != "Linux", reason="torch has another OpenMP library")
@pytest.mark.parametrize(
    ("own", "shown"),
    [({}, "GOMP_SPINCOUNT = '10000'"), ({"GOMP_SPINCOUNT": "77"}, "= '77'"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")],
    ids=["default", "own number", "own policy"],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_otherwise(own, shown):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", "import fsr_fast, torch"],
        env={**environment, "OMP_DISPLAY_ENV": "verbose", **own},
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown in done.stderr
    assert ("'10000'" in done.stderr) == (not own)
