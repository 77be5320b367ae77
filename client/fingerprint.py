"""Has the data of a domain changed? Known to the site alone, and it never refunds anything."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np

from bract.shared import canonical
from bract.shared.data import Examples


class Fingerprints:
    """Keyed fingerprints of a site's data, in its local state.

    HMAC-SHA256 under a key that never leaves: a plain hash could be tried against guessed data.
    They stand in no ledger and no message.

    Args:
        folder: of this site alone; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def changed(self, domain: str, examples: Examples) -> bool:
        """Returns whether a domain's data differ from when they were last opened.

        Looked at once in a process; the first look ever has nothing to differ from.
        """
        if domain in self._looked:
            return False
        self._looked.add(domain)
        path = self._folder / f"{canonical.sha256(domain.encode())}.fingerprint"
        now = self._fingerprint(examples)
        before = path.read_bytes() if path.exists() else now
        if before != now or not path.exists():
            canonical.write_atomically(path, now, mode=0o600)
        return not hmac.compare_digest(before, now)

    def _fingerprint(self, examples: Examples) -> bytes:
        path = self._folder / "key"
        if not path.exists():
            canonical.write_atomically(path, os.urandom(32), mode=0o600)
        digest = hmac.new(path.read_bytes(), digestmod=hashlib.sha256)
        for values in (examples.inputs, examples.targets):
            digest.update(f"{values.dtype}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.digest()
