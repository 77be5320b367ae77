"""One process at a time: a lock on a file that the kernel lets go of when its holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bract.shared.errors import BractError, UsageError

LOCK_SECONDS = 10.0  # orphans of a killed process notice within it that they are


def hold(path: Path, remedy: str) -> int:
    """Returns the descriptor of a lock; held until that is closed or the process ends.

    Args:
        path: the lock's file, in the folder that it guards; made where it is missing.
        remedy: what to do where another process holds it, as the refusal says it.

    Raises:
        BractError: where another process holds it.
        UsageError: where the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; mend its rights, or name another folder"
        ) from error
    deadline = time.monotonic() + LOCK_SECONDS
    while not _try(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise BractError(f"another process uses {path.parent}: {remedy}")
        time.sleep(0.05)
    return descriptor


@contextmanager
def held(path: Path, remedy: str) -> Iterator[None]:
    """Holds a lock while a block runs."""
    descriptor = hold(path, remedy)
    try:
        yield
    finally:
        os.close(descriptor)


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
