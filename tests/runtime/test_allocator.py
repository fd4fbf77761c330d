"""Memory of freed tensors on the host."""

import platform
import subprocess
import sys

import pytest

HELD = """
import resource, sys, torch
from pathlib import Path
from fsr_fast.runtime.allocator import keep_freed_memory
from fsr_fast.runtime.distributed import start_process

def size():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

exec(sys.argv[1])
torch.set_num_threads(1)
torch.ones(1)
before = size()
for _ in range(5):
    torch.ones(2**26)
    print(size() - before)
"""
TENSOR = 2**28  # bytes
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def held_after(preparation: str) -> list[int]:
    """Bytes of address space that a process holds after each of five tensors, one after another, was freed.

    Not its pages: of those the system may take some back by itself when memory is short.
    """
    command = [sys.executable, "-c", HELD, preparation]
    return [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def test_a_process_on_the_cpu_keeps_the_memory_of_freed_tensors():
    held = held_after("start_process('cpu')")
    assert TENSOR <= held[0] < 2 * TENSOR
    assert held == [held[0]] * 5, "and uses it again"


@pytest.mark.parametrize(
    "preparation", ["", "keep_freed_memory(); keep_freed_memory(False)"], ids=["default", "undone"]
)
def test_freed_memory_is_given_back_by_default_and_again_where_that_is_asked_for(preparation):
    assert max(held_after(preparation)) < TENSOR / 4
