"""The C library's allocator, tuned for training on a CPU."""

import ctypes
import sys

# Of mallopt, from glibc's malloc.h, in bytes
_OPTIONS = {
    -3: 32 << 20,  # M_MMAP_THRESHOLD: tensors up to this come from the heap; the largest that glibc takes
    -1: 512 << 20,  # M_TRIM_THRESHOLD: free memory at its end that is kept
    -2: 64 << 20,  # M_TOP_PAD: what it grows by
}


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, where the C library is glibc.

    By default glibc gives every tensor of some size its own pages and returns them: each step then
    faults them in again. LeNets train a quarter to a third faster on a CPU without that. For the
    command line, which owns its process; a library must leave its host's allocator alone.

    Returns:
        whether it was done.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(option, value) for option, value in _OPTIONS.items())
