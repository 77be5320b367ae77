"""Everything that a ledger file holds, read as it is and changed in nothing."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bract.shared.errors import LedgerError
from bract.shared.privacy import entries
from bract.shared.privacy.ledger_file import (
    APPLICATION_ID,
    SCHEMA,
    SCHEMA_BY_KEY,
    leftovers,
    typed_errors,
)

_LOOKS, _LOOK_SECONDS = 30, 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """Everything in a ledger file, as bytes, not yet verified."""

    rows: dict[tuple[str, str], list[tuple[int, bytes, bytes]]]
    documents: dict[tuple[str, str], bytes]
    witnesses: dict[tuple[str, str, str], bytes]


def read(path: Path) -> Contents:
    """Returns what a ledger file holds, opened read-only.

    Raises:
        LedgerError: where the file is missing, is no ledger, or a write was interrupted.
    """
    # A commit is as long as a disk's breath; what was interrupted stays.
    for _ in range(_LOOKS):
        if not leftovers(path):
            break
        time.sleep(_LOOK_SECONDS)
    for leftover in leftovers(path):
        raise LedgerError(
            f"{leftover} holds an interrupted write: let the site finish, or start it once so that "
            "it is undone, and verify then"
        )
    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: name the .sqlite file")
    with typed_errors(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("BEGIN")  # one snapshot of entries and documents
            return _read(connection, path)
        finally:
            connection.close()


def _read(connection: sqlite3.Connection, path: Path) -> Contents:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise LedgerError(f"{path} is no bract ledger")
    if version != entries.SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has ledger schema {version}, this bract reads {entries.SCHEMA_VERSION}: "
            "use the bract that wrote it, or a newer one"
        )
    if _objects(connection) not in (_expected(SCHEMA), _expected(SCHEMA_BY_KEY)):
        raise LedgerError(f"{path} has other tables or triggers than a ledger")
    rows: dict[tuple[str, str], list[tuple[int, bytes, bytes]]] = {}
    for site, domain, sequence, text, signature in connection.execute(
        "SELECT site, domain, sequence, body, signature FROM entries ORDER BY 1, 2, 3"
    ):
        rows.setdefault((site, domain), []).append((sequence, text.encode(), signature))
    documents = {
        (kind, sha256): text.encode()
        for kind, sha256, text in connection.execute("SELECT kind, sha256, body FROM documents")
    }
    witnesses = {
        (site, domain, key): text.encode()
        for site, domain, key, text in connection.execute(
            "SELECT site, domain, key, body FROM witnesses"
        )
    }
    return Contents(rows=rows, documents=documents, witnesses=witnesses)


def _objects(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    return set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


@lru_cache(maxsize=2)
def _expected(schema: str) -> set[tuple[str, ...]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema)
        return _objects(connection)
    finally:
        connection.close()
