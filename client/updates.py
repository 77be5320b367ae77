"""Updates at rest: the bytes of the latest round, so that a lost reply is sent again, free."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from bract.shared import arrays, canonical
from bract.shared.arrays import Arrays
from bract.shared.errors import LedgerUnwritable, VerificationFailed


class Updates(Protocol):
    """Where a gate keeps what it releases."""

    def keep(self, values: Arrays) -> str:
        """Returns the update's hash."""

    def find(self, name: str) -> dict[str, arrays.Array] | None:
        """Returns the update of a hash, or None where it is not kept."""


class UpdateStore:
    """One site's stored update; only the latest is kept, since older rounds are never asked for.

    Args:
        folder: of this site alone; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def keep(self, values: Arrays) -> str:
        """Returns the update's hash once its bytes are durable; earlier updates are dropped.

        Raises:
            LedgerUnwritable: where the disk is full; the charge stands, nothing is released.
        """
        name = arrays.digest(values)
        path = self._path(name)
        try:
            canonical.write_atomically(path, arrays.to_bytes(values), mode=0o600)
        except OSError as error:
            raise LedgerUnwritable(
                f"cannot write {path}: {error.strerror}; free some space. The charge stands"
            ) from error
        for old in self._folder.glob("*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
        return name

    def find(self, name: str) -> dict[str, arrays.Array] | None:
        """Returns the stored update of a hash, or None where its bytes are gone or damaged."""
        path = self._path(name)
        try:
            values = arrays.from_bytes(path.read_bytes())
        except (OSError, VerificationFailed):
            return None
        return values if arrays.digest(values) == name else None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
