"""Compile every shipped kernel configuration ahead of time and tabulate registers, spills and shared memory.

No GPU is needed. ``python -m tests.kernels.compile_table [module ...]`` prints the table; ``--json`` the rows.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100)


def modules() -> list[str]:
    """Names of the kernel modules that list their configurations in ``compile_cases()``."""
    import fsr_fast.kernels

    names = sorted(module.name for module in pkgutil.iter_modules(fsr_fast.kernels.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"fsr_fast.kernels.{name}"), "compile_cases")]


def jobs(names: list[str]) -> list[tuple[str, str, int]]:
    """(module, case, compute capability): the main cases for every target, the others for sm_90."""
    found = []
    for name in names:
        cases = list(importlib.import_module(f"fsr_fast.kernels.{name}").compile_cases())
        assert len({case.name for case in cases}) == len(cases), f"{name}: case names are not unique"
        found += [(name, case.name, target) for case in cases for target in (TARGETS if case.main else (90,))]
    return found


def compile_one(job: tuple[str, str, int]) -> dict[str, Any]:
    """Compile one configuration for one target and read its resources from the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, case_name, target = job
    module = importlib.import_module(f"fsr_fast.kernels.{name}")
    case = next(case for case in module.compile_cases() if case.name == case_name)
    order = case.kernel.arg_names
    unknown = [arg for arg in order if arg not in case.signature and arg not in case.constants]
    assert not unknown, f"{name}/{case_name}: no type and no value for {unknown}"
    signature = {
        arg: case.signature[arg].removesuffix(":16") if arg in case.signature else "constexpr" for arg in order
    }
    divisible = [arg for arg, kind in case.signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        case.kernel,
        signature=signature,
        constexprs=dict(case.constants),
        attrs={(order.index(arg),): [["tt.divisibility", 16]] for arg in divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _cubin_resources(compiled.asm["cubin"])
    return {
        "module": name,
        "case": case_name,
        "target": f"sm_{target}",
        "warps": case.num_warps,
        "stages": case.num_stages,
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "spill_reason": case.spill_reason,
    }


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes a thread). Kernels hold no local arrays, so a stack holds spilled registers alone."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, f"cuobjdump named no resources:\n{text}"
    return int(usage[1]), int(usage[2])


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Compile everything in two processes, in order of the jobs."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, jobs(names)))


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'module':26} {'case':44} {'target':7} warps stages registers spill B shared B"]
    for row in found:
        lines.append(
            f"{row['module']:26} {row['case']:44} {row['target']:7} {row['warps']:5} {row['stages']:6} "
            f"{row['registers']:9} {row['spill_bytes']:7} {row['shared_bytes']:8}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or the rows as JSON."""
    os.environ.pop("TRITON_INTERPRET", None)
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    found = rows(arguments or modules())
    print(json.dumps(found) if "--json" in sys.argv else table(found))


if __name__ == "__main__":
    main()
