"""Memory of freed tensors on the host."""

import platform
import subprocess
import sys

import pytest

HELD = """
import resource, sys, torch
from fsr_fast.runtime.allocator import keep_freed_memory
from fsr_fast.runtime.distributed import start_process

def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

exec(sys.argv[1])
torch.set_num_threads(1)
torch.ones(1)
before, held = size(), []
for _ in range(30):
    torch.ones(2**26)
    held.append(size() - before)
print(*held)
"""
TENSOR = 2**28  # bytes
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def held_after(preparation: str) -> list[int]:
    """Bytes of address space that a process holds after each of thirty tensors, one after another, was freed.

    Not its pages: of those the system may take some back by itself when memory is short.
    """
    command = [sys.executable, "-c", HELD, preparation]
    return [int(held) for held in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def test_a_process_on_the_cpu_keeps_the_memory_of_freed_tensors():
    held = held_after("start_process('cpu')")
    assert min(held) >= TENSOR
    assert max(held) <= 15 * TENSOR, "uses it again, unless a small allocation has taken a piece of it"


def test_freed_memory_is_given_back_again_where_that_is_asked_for():
    assert max(held_after("keep_freed_memory(); keep_freed_memory(False)")) < TENSOR / 4
