"""What makes a file a ledger: its mark, its tables, and what can be wrong with it on a disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bract.shared.errors import LedgerBusy, LedgerError, LedgerUnwritable

APPLICATION_ID = 0x62726163  # "brac"

# Rows lie in the order of their coming: those of a commit are together, at the end of the file.
SCHEMA = """
CREATE TABLE entries (
    site TEXT NOT NULL, domain TEXT NOT NULL, sequence INTEGER NOT NULL,
    body TEXT NOT NULL, signature BLOB NOT NULL,
    PRIMARY KEY (site, domain, sequence)
) STRICT;
CREATE TABLE witnesses (
    site TEXT NOT NULL, domain TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (site, domain, key)
) STRICT;
CREATE TABLE documents (
    kind TEXT NOT NULL, sha256 TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (kind, sha256)
) STRICT;
"""
# What a file begun by an earlier bract has instead, and keeps: rows in the order of their keys,
# each of more than a kilobyte on a page of its own.
SCHEMA_BY_KEY = SCHEMA.replace("STRICT", "WITHOUT ROWID, STRICT")


def leftovers(path: Path) -> list[Path]:
    """Returns the journals that an interrupted write left, or one that is being made."""
    real = path.resolve()  # SQLite keeps its journal beside the file, not beside a link to it
    beside = [real.with_name(real.name + suffix) for suffix in ("-journal", "-wal")]
    return [file for file in beside if file.exists() and file.stat().st_size > 0]


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite says of a file into what is wrong with the ledger, and its remedy."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise LedgerBusy(
                f"another process is charging {path}: wait for it to end, then run again"
            ) from error
        if code.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
            raise LedgerUnwritable(
                f"cannot write {path} ({code}): free some space or fix its rights; "
                "nothing was charged"
            ) from error
        raise LedgerError(
            f"{path} cannot be used as a ledger: {error}; put back its newest copy"
        ) from error
