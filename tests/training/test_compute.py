"""How a training computes: what it tells the allocator."""

import platform

import pytest

from tests.training import processes

FREED = """
import ctypes, pathlib, torch
from training import compute
libc = ctypes.CDLL("libc.so.6")
libc.sbrk.restype = ctypes.c_void_p

def resident_mb():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

before = resident_mb()
with compute.memory_kept(torch.device("cpu")):
    block = torch.empty(3 << 30, dtype=torch.uint8)
    high = libc.sbrk(0)
    del block
    print(high - libc.sbrk(0), high > 3 << 30)
    block = torch.ones(500 << 20, dtype=torch.uint8)
    del block
    print(resident_mb() - before > 400)
print(resident_mb() - before < 200)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what it is about")
def test_memory_is_kept_however_large_and_given_back_in_the_end() -> None:
    """Blocks come from the heap, and its end does not move back when they are freed."""
    assert processes.succeed("-c", FREED).split() == ["0", "True", "True", "True"]
