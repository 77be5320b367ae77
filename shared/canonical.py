"""One byte string for one value: canonical JSON, and hashes that say what they are of."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bract.shared.errors import VerificationFailed

_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def encode(value: Any) -> bytes:
    r"""Returns the canonical JSON of a value: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: for NaN or an infinity, which JSON has no word for.

    Example:
        >>> encode({"b": 1, "a": [0.5, "ε"]})
        b'{"a":[0.5,"\xce\xb5"],"b":1}'
    """
    return _ENCODER.encode(value).encode()


def decode(text: bytes) -> Any:
    """Returns the value of canonical JSON.

    Raises:
        VerificationFailed: where the bytes are not exactly the canonical form of their value,
            so that no second spelling of an entry verifies.
    """
    try:
        value = json.loads(text)
        canonical = encode(value)
    except (ValueError, RecursionError) as error:
        raise VerificationFailed("not canonical JSON") from error
    if canonical != text:
        raise VerificationFailed("not canonical JSON")
    return value


def finite(value: float | None) -> float | None:
    """Returns a number that JSON has a word for, or None where it has none.

    Example:
        >>> finite(1.5), finite(math.inf), finite(None)
        (1.5, None, None)
    """
    return value if value is not None and math.isfinite(value) else None


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tagged(tag: str, *parts: bytes | memoryview) -> bytes:
    """Returns SHA-256 over a tag and length-prefixed parts; different uses never collide."""
    digest = hashlib.sha256(b"bract/" + tag.encode() + b"\0")
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes a file so that after a crash it holds the old bytes or the new, never a part."""
    with replacing(path, data, mode=mode):
        pass


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that does not exist yet, whole or not at all.

    Raises:
        FileExistsError: where it does, even if another process made it just now.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_atomically(temporary, data)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path, data: bytes, *, mode: int = 0o644) -> Iterator[None]:
    """Has the new bytes of a file on the disk before a block, and in its place after it.

    Where the block raises, the file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left half written of the files of a name.

    Only for a folder or a file that one process at a time writes.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
