"""keep_freed_memory: glibc takes every option, and freed tensors stay with the process."""

import os
import platform
import subprocess
import sys

import pytest

# Of eight tensors of 8 MB: the mapped bytes that freeing them gives back, and the bytes free in the heap then
PROGRAM = """
import ctypes, sys, torch
from vbdcompress.allocator import keep_freed_memory

class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
if sys.argv[1] == "keep":
    assert keep_freed_memory()
tensors = [torch.ones(2_000_000) for _ in range(8)]
held = mallinfo2()
del tensors
freed = mallinfo2()
print(held.hblkhd - freed.hblkhd, freed.fordblks - held.fordblks)
"""
TENSORS = 8 * 2_000_000 * 4


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33),
    reason="mallinfo2 is of glibc 2.33",
)
@pytest.mark.parametrize(("how", "unmapped"), [("keep", False), ("leave", True)])
def test_freed_tensors_stay_with_the_process(how: str, unmapped: bool) -> None:
    # whoever runs the tests may have tuned the allocator by the environment already
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    given_back, free_in_heap = map(int, done.stdout.split())
    assert (given_back >= 0.9 * TENSORS) == unmapped
    assert (free_in_heap >= 0.9 * TENSORS) == (not unmapped)
