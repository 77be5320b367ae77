"""Large blocks go back to the system when they are freed."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h
_THRESHOLD_BYTES, _ARENAS = 1 << 20, 2


def return_freed_blocks() -> None:
    """Sets glibc's threshold for mapped blocks to 1 MiB, and its arenas to two.

    By itself it raises the threshold to the largest block that was ever freed, and keeps what is
    below in the arena of each thread: a server that passes models around would hold on to several
    copies of them between rounds. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)
