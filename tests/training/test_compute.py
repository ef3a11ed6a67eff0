"""How a training computes: what it tells the allocator."""

import platform

import pytest

from tests.training import processes

FREED = """
import ctypes, torch
from training import compute
compute.keep_memory()
libc = ctypes.CDLL("libc.so.6")
libc.sbrk.restype = ctypes.c_void_p
block = torch.empty(3 << 30, dtype=torch.uint8)
high = libc.sbrk(0)
del block
print(high - libc.sbrk(0), high > 3 << 30)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what it is about")
def test_memory_is_kept_however_large() -> None:
    """Blocks come from the heap, and its end does not move back when they are freed."""
    assert processes.succeed("-c", FREED).split() == ["0", "True"]
