"""One process at a time: a lock on a file that the kernel lets go of when its holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from bract.shared.errors import BractError

LOCK_SECONDS = 5.0


def hold(path: Path) -> None:
    """Returns once this process alone may use a lock's folder; held until the process ends.

    Raises:
        BractError: where another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while not _try(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise BractError(
                f"another process uses {path.parent}: one process at a time; stop the other"
            )
        time.sleep(0.05)


def is_held(path: Path) -> bool:
    """Returns whether some process holds a lock."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _try(descriptor)
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
