"""The C library's allocator, told to give large blocks back."""

import ctypes

LARGE_BYTES = 8 * 2**20  # the buffers of a usual picture are smaller, and need not be fetched anew for each

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def return_large_blocks() -> None:
    """From now on a block of LARGE_BYTES or more goes back to the system when it is freed; for the whole process.

    By itself glibc raises that bound to 32 MB as blocks are freed, and what is smaller comes from heaps that pictures
    of many sizes leave full of holes. Up to twice as much is kept at a heap's end: glibc would do so too, had it raised
    the bound itself, and where it keeps next to nothing every picture's pages are fetched anew. With another C library
    nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
