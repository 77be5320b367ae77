"""What glibc's allocator does with memory that was freed; elsewhere nothing is changed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_EVERY_BLOCK, _GREATEST_ONCE = 1 << 30, 32 << 20  # the latter is all that glibc before 2.35 takes
_DEFAULT = 128 << 10  # glibc's own, of both thresholds


def keep_freed() -> None:
    """Lets this process keep what it frees, for the next step: to fault it in again costs time."""
    if not _set(_MMAP_THRESHOLD, _EVERY_BLOCK):
        _set(_MMAP_THRESHOLD, _GREATEST_ONCE)
    _set(_TRIM_THRESHOLD, _EVERY_BLOCK)


@contextmanager
def kept() -> Iterator[None]:
    """Lets this process keep what it frees until the block ends, and gives all of it back then."""
    keep_freed()
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _DEFAULT)
        _set(_TRIM_THRESHOLD, _DEFAULT)
        _call("malloc_trim", 0)


def give_back(*, from_bytes: int, arenas: int) -> None:
    """Gives blocks of so many bytes back at once, and keeps others in so many arenas.

    glibc by itself raises its threshold for mapped blocks to the largest block that was ever
    freed, and keeps what is below in the arena of each thread.
    """
    _set(_MMAP_THRESHOLD, from_bytes)
    _set(_ARENA_MAX, arenas)


def _set(option: int, value: int) -> bool:
    """Returns whether the allocator took the value."""
    return _call("mallopt", option, value)


def _call(name: str, *values: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        function = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return False
    return bool(function(*values))
