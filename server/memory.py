"""A server that passes models around gives their memory back at once."""

from __future__ import annotations

import ctypes
import gc
import sys

LARGE_BYTES = 1 << 20

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h
# Blocks under it are used again from round to round: to map and fault in each piece of a message
# anew takes a fifth of a round of 25 MB.
_MAPPED_BYTES, _ARENAS = 32 << 20, 2


def settle() -> None:
    """Prepares a process that is up: what it holds now is not looked at by later collections.

    glibc raises its threshold for mapped blocks to the largest block that was ever freed, and
    keeps what is below in the arena of each thread; both are fixed here. Elsewhere than on glibc
    only the collector is prepared.
    """
    gc.collect()
    gc.freeze()
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)


def collect(handled_bytes: int) -> None:
    """Frees what a handled request leaves behind, where it was a large one.

    A request lies in a cycle with its body. Python's collector counts objects, not bytes: by
    itself it would let the bodies of a whole round gather.
    """
    if handled_bytes >= LARGE_BYTES:
        gc.collect()
