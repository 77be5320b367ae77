"""The public examples of a run, named by their hash: what a contract declares, a server holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bract.shared.data import load_public
from bract.shared.terms import DataTerms


def sha256(terms: DataTerms, where: Path | None) -> str:
    """Returns the SHA-256 of validation and test: types, shapes and bytes, in that order."""
    digest = hashlib.sha256(b"bract/public/1\0")
    for examples in load_public(terms, where):
        for values in (examples.inputs, examples.targets):
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
