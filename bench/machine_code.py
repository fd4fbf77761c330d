"""What a GPU's machine code holds: registers, instructions, loops. NVIDIA's disassembler comes with Triton."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def read_loops(cubin: bytes) -> tuple[list[int], list[tuple[int, int]]]:
    """Places of the instructions in the machine code, and the first and last place of each loop, in order."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", _dump(cubin, "-sass"), re.MULTILINE)
    places = [int(place, 16) for place, _ in lines]
    loops = []
    for end, (_, instruction) in zip(places, lines, strict=True):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < end:
            loops.append((int(jump[1], 16), end))
    return places, sorted(loops)


def read_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes per thread). Kernels have no local arrays, so a stack only holds spilled registers."""
    text = _dump(cubin, "-res-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, f"cuobjdump named no resources:\n{text}"
    return int(usage[1]), int(usage[2])


def _dump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
