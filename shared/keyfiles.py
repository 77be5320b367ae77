"""New files of keys and certificates: all of them or none, and never over another."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from bract.shared import canonical
from bract.shared.errors import UsageError

PRIVATE, PUBLIC = 0o600, 0o644
logger = logging.getLogger("bract.keys")


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be made; its bytes, which may be a private key, are never shown."""

    path: Path
    data: bytes = field(repr=False)
    mode: int


def private(path: Path, data: bytes) -> NewFile:
    """Returns a file that only its owner may read."""
    return NewFile(path, data, PRIVATE)


def public(path: Path, data: bytes) -> NewFile:
    """Returns a file that anyone may read."""
    return NewFile(path, data, PUBLIC)


def openness(path: Path) -> str | None:
    """Returns why a private key's file is not private, None where its owner alone may use it."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return None  # whoever reads it says so
    return f"mode {mode:04o} opens it to others: chmod 600 {path}" if mode & 0o077 else None


@lru_cache(maxsize=64)  # once in a process
def warn_if_open(path: Path) -> None:
    """Notes in the log that others may read a private key."""
    if fault := openness(path):
        logger.warning("private key: %s", fault)


def create(files: Sequence[NewFile]) -> None:
    """Makes every file, durably, or none of them; a folder that is missing is made.

    Raises:
        UsageError: where one of them exists, or cannot be made.
    """
    for file in files:
        if os.path.lexists(file.path):
            raise _exists(file.path)
    made: list[Path] = []
    try:
        for file in files:
            _make_folder(file.path.parent)
            # O_EXCL again: between the look above and here another process may have made it.
            descriptor = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
            made.append(file.path)
            with os.fdopen(descriptor, "wb") as out:
                out.write(file.data)
                out.flush()
                os.fsync(out.fileno())
        for folder in {path.parent for path in made}:
            canonical.sync_folder(folder)
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _exists(Path(error.filename)) from error
        if isinstance(error, OSError):
            where = error.filename or made[-1]
            raise UsageError(f"cannot write {where}: {error.strerror}") from error
        raise


def _make_folder(folder: Path) -> None:
    # 0700: it will hold private keys. A folder that stands keeps the mode its owner chose.
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{folder} is a file: name a folder") from error


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists: keys are never overwritten; name another place")
