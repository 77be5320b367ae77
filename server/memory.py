"""A server that passes models around gives their memory back at once."""

from __future__ import annotations

import gc

from bract.shared import malloc

LARGE_BYTES = 1 << 20

# Blocks under it are used again from round to round: to map and fault in each piece of a message
# anew takes a fifth of a round of 25 MB.
_MAPPED_BYTES, _ARENAS = 32 << 20, 2


def settle() -> None:
    """Prepares a process that is up: what it holds now is not looked at by later collections.

    Large blocks go back to the system as they are freed; elsewhere than on glibc only the
    collector is prepared.
    """
    gc.collect()
    gc.freeze()
    malloc.give_back(from_bytes=_MAPPED_BYTES, arenas=_ARENAS)


def collect(handled_bytes: int) -> None:
    """Frees what a handled request leaves behind, where it was a large one.

    A request lies in a cycle with its body. Python's collector counts objects, not bytes: by
    itself it would let the bodies of a whole round gather.
    """
    if handled_bytes >= LARGE_BYTES:
        gc.collect()
