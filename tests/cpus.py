"""Repeat the numerical tests with other processors' rounding: `python -m tests.cpus [pytest options]`.

Some settings make this processor use fewer of its instructions or other numbers of threads. `FSR_ROUNDING` rounds
otherwise on purpose, which stands for processors that are not at hand: see `rounding.py`.
"""

import os
import subprocess
import sys

import torch

FILES = (
    "tests/method",
    "tests/models",
    "tests/evaluation",
    "tests/parity",
    "tests/reference",
    "tests/reporting/test_analysis.py",
    "tests/runtime/test_sharding.py",
    "tests/test_distributed.py",
    "tests/test_end_to_end.py",
    "tests/test_engine_options.py",
    "tests/test_resume.py",
    *(f"tests/commands/test_{name}.py" for name in ("export", "export_formats", "predict", "serve")),
)
LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""Instructions for which torch has kernels, from few to many; one that the processor lacks would crash it."""
OTHERS = (
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "2"},
    {"FSR_ROUNDING": "1"},
    {"FSR_ROUNDING": "2"},
)
"""Each beside one thread and the processor's own instructions."""


def settings() -> list[dict[str, str]]:
    """Return the environment variables of every round that this processor supports."""
    own = torch.backends.cpu.get_cpu_capability()
    levels = LEVELS[: LEVELS.index(own) + 1] if own in LEVELS else ()
    return [*({"ATEN_CPU_CAPABILITY": level.lower()} for level in levels), *OTHERS]


def main() -> int:
    """Run all settings; return 1 if one of them fails."""
    failed = []
    for setting in settings():
        name = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"--- {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "auto", *FILES, *sys.argv[1:]]
        if subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ, **setting}).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "every setting passes")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
