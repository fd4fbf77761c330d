"""Memory of freed tensors on the host."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from fsr_fast.runtime.allocator import keep_freed_memory
from fsr_fast.runtime.distributed import start_process
exec(sys.argv[1])
torch.ones(2**26)
began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""
LARGE_PAGES = 4 * 2**28 // 2**21
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def fresh_pages(preparation: str) -> int:
    """Pages, of any size, that four tensors of 256 MiB, one after another, took from the system."""
    command = [sys.executable, "-c", PAGES, preparation]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_process_on_the_cpu_keeps_the_memory_of_freed_tensors():
    assert fresh_pages("start_process('cpu')") < 20
    assert fresh_pages("") >= LARGE_PAGES


def test_freed_memory_is_given_back_again_where_that_is_asked_for():
    assert fresh_pages("keep_freed_memory(); keep_freed_memory(False)") >= LARGE_PAGES
