"""A new file of a user's, who named it: whole or not at all, and never over another."""

from __future__ import annotations

import os
from pathlib import Path

from bract.shared import canonical
from bract.shared.errors import UsageError


def check(path: Path) -> None:
    """Returns where a file can be written without overwriting one.

    Raises:
        UsageError: otherwise.
    """
    if os.path.lexists(path):
        raise _exists(path)
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} to write {path.name} into: make it first")


def write(content: bytes, path: Path) -> None:
    """Makes a file, durably; where that fails no part of it stays, so that it can be tried again.

    Raises:
        UsageError: where it exists by now, or cannot be written.
    """
    try:
        # Between a look and here another process may have made it; a link to nothing is one too.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _unwritten(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        canonical.sync_folder(path.parent)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritten(path, error) from error
        raise


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists: nothing is overwritten; name another file")


def _unwritten(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror}")
