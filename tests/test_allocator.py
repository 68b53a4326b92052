"""keep_freed_memory: glibc takes every option, and a freed tensor's pages stay."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of 50 allocations of 40 MB, which glibc by itself maps anew each time
PROGRAM = """
import resource, sys, torch
from vbdcompress.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for number in range(60):
    if number == 10:  # what the first operations load is no question of the allocator
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000) + torch.ones(9_000_000).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_keep_freed_memory_spares_page_faults() -> None:
    # whoever runs the tests may have tuned the allocator by the environment already
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.5 * faults["leave"]
