"""What glibc's allocator does with memory that was freed; elsewhere nothing is changed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_EVERY_BLOCK, _GREATEST_ONCE = 1 << 30, 32 << 20  # the latter is all that glibc before 2.35 takes


def keep_freed() -> None:
    """Lets this process keep what it frees, for the next step: to fault it in again costs time."""
    if not _set(_MMAP_THRESHOLD, _EVERY_BLOCK):
        _set(_MMAP_THRESHOLD, _GREATEST_ONCE)
    _set(_TRIM_THRESHOLD, _EVERY_BLOCK)


def give_back(*, from_bytes: int, arenas: int) -> None:
    """Gives blocks of so many bytes back at once, and keeps others in so many arenas.

    glibc by itself raises its threshold for mapped blocks to the largest block that was ever
    freed, and keeps what is below in the arena of each thread.
    """
    _set(_MMAP_THRESHOLD, from_bytes)
    _set(_ARENA_MAX, arenas)


def _set(option: int, value: int) -> bool:
    """Returns whether the allocator took the value."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(option, value))
