"""Compile every shipped kernel configuration ahead of time and tabulate registers, spills and shared memory.

No GPU is needed. ``python -m tests.kernels.compile_table [module ...]`` prints the table; ``--json`` the rows;
``--loops`` the instructions of each loop that contains no other, in the machine code, instead.
"""

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine_code import read_loops, read_resources

TARGETS = (80, 90, 100)
Row = TypeVar("Row")


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
        for case in cases:
            targets = [target for target in TARGETS if target >= case.least] if case.main else [90]
            found += [(name, case.name, target) for target in targets]
    return found


def compile_job(job: tuple[str, str, int]) -> tuple[Any, Any]:
    """Compile one configuration for one target; return it and what Triton made of it."""
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
    return case, triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(job: tuple[str, str, int]) -> dict[str, Any]:
    """Compile one configuration for one target and read its resources from the cubin."""
    name, case_name, target = job
    case, compiled = compile_job(job)
    registers, stack = read_resources(compiled.asm["cubin"])
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


def count_loops(job: tuple[str, str, int]) -> str:
    """Compile one configuration and count the instructions of its innermost loops, and of the whole."""
    name, case_name, target = job
    places, loops = read_loops(compile_job(job)[1].asm["cubin"])
    inner = [loop for loop in loops if not any(loop[0] <= a and b < loop[1] for a, b in loops if (a, b) != loop)]
    counts = [sum(start <= place <= end for place in places) for start, end in inner]
    return f"{name:26} {case_name:44} sm_{target:<4} loops {counts}, all {len(places)}"


def rows(names: list[str], found: Callable[[tuple[str, str, int]], Row]) -> list[Row]:
    """What is found in each compiled configuration, in two processes, in order of the jobs."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(found, jobs(names)))


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
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or modules()
    if "--loops" in sys.argv:
        print("\n".join(rows(names, count_loops)))
        return
    found = rows(names, compile_one)
    print(json.dumps(found) if "--json" in sys.argv else table(found))


if __name__ == "__main__":
    main()
