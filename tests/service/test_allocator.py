"""Promise: a large block of memory goes back to the system when it is freed, whatever was freed before; others stay."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import ctypes, sys
from service import allocator

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info
if sys.argv[1] == "with":
    allocator.return_large_blocks()
libc.free(libc.malloc(30_000_000))  # glibc's own bound is at 30 MB from here on
before = libc.mallinfo2().hblkhd
block = libc.malloc(allocator.LARGE_BYTES)
print(libc.mallinfo2().hblkhd - before >= allocator.LARGE_BYTES)  # a mapping of its own, which ends with the block
small = libc.malloc(allocator.LARGE_BYTES // 2)
before = libc.mallinfo2().arena
libc.free(small)
print(libc.mallinfo2().arena == before)  # kept for the next picture
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc 2.33 or newer")
@pytest.mark.parametrize(("how", "told"), [("with", "True"), ("without", "False")])
def test_large_blocks_have_mappings_of_their_own_and_smaller_ones_stay(how: str, told: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == ([told, "True"], "")
