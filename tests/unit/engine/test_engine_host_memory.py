"""Freed memory is used again, seen by the page faults of a process of its own."""

import subprocess
import sys

import pytest

from vitscale.engine import host_memory

SCRIPT = """
import ctypes, resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 << 20
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = min(faults() for _ in range(3))
kept = keep_freed_memory()
print(kept, first, min(faults() for _ in range(3)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_costs_no_page_faults_again():
    command = [sys.executable, "-c", SCRIPT, host_memory.__file__]
    kept, before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert kept == "True"
    assert int(before) > 1000  # with pages of 4 KB it is 16,384
    assert int(after) < 100
