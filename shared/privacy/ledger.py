"""The ledger on disk: an SQLite file that is only added to, one transaction for check and charge.

What makes a change show is the chain and its signatures, not the file: whoever has the file can
write to it.

journal_mode=TRUNCATE and synchronous=EXTRA: a committed charge survives a crash, and a copy of
the one file holds all of it (with a write-ahead log it would not).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

from bract.shared.errors import LedgerError
from bract.shared.privacy import entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import Head
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.ledger_file import APPLICATION_ID, SCHEMA, leftovers, typed_errors
from bract.shared.privacy.transaction import DocumentKind, Transaction

# Of a file with many sites' chains so many stay folded with all their entries. Of so many others
# stays what continues them, at most 16 kB each; one beyond is read from the file again.
CHAINS_IN_MEMORY, ENDS_IN_MEMORY = 1024, 16_384


class Ledger:
    """A ledger file that may hold the chains of one site or of many.

    Args:
        path: the SQLite file; made where it is missing.
        timeout_seconds: how long to wait for another process that is charging.
        head_file: on another disk, keeps the last head of each chain; a ledger without it was put
            back to an older copy.
    """

    def __init__(
        self, path: Path, *, timeout_seconds: float = 30.0, head_file: HeadFile | None = None
    ) -> None:
        self.path, self._head_file = path, head_file
        self._chains: dict[tuple[str, str], Chain] = {}
        self._ends: dict[tuple[str, str], Chain] = {}
        self._seen: dict[tuple[str, str], Head] = head_file.read() if head_file else {}
        self._kept: set[tuple[DocumentKind, str]] = set()  # documents that the file holds
        with typed_errors(path):
            self._connection = sqlite3.connect(
                path, timeout=timeout_seconds, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = TRUNCATE")
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._create()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Runs a block as the only writer, then commits; any exception undoes all of it.

        Raises:
            LedgerBusy: another process held the file for longer than the time allowed.
            LedgerUnwritable: the disk is full or the file is read-only.
        """
        with typed_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(
                self._connection, self._chains, self._ends, self._seen, self._kept
            )
            try:
                yield transaction
                heads = self._heads_after(transaction)
                with self._noting(heads if transaction.ahead else None):
                    self._connection.execute("COMMIT")
                    self._saw(heads)
                if len(self._kept) > CHAINS_IN_MEMORY:
                    self._kept.clear()
                self._shorten()
            except BaseException:
                # A fold that was added to is ahead of the file now: read it anew next time, against
                # the last head that was committed, so that a cut file stays refused.
                for name in transaction.ahead:
                    self._chains.pop(name, None)
                self._kept.clear()
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _shorten(self) -> None:
        """Lets go of entries of the chains longest unused, then of all but the last's hash."""
        for name in [*islice(self._chains, max(0, len(self._chains) - CHAINS_IN_MEMORY))]:
            chain = self._ends[name] = self._chains.pop(name)
            chain.forget_()
        for name in [*islice(self._ends, max(0, len(self._ends) - ENDS_IN_MEMORY))]:
            del self._ends[name]

    def _heads_after(self, transaction: Transaction) -> dict[tuple[str, str], Head]:
        touched = transaction.touched & self._chains.keys()
        found = {name: head for name in touched if (head := self._chains[name].head)}
        return {**self._seen, **found}

    def _saw(self, heads: dict[tuple[str, str], Head]) -> None:
        self._seen = heads

    def _noting(self, heads: Mapping[tuple[str, str], Head] | None) -> AbstractContextManager[None]:
        if self._head_file is None or heads is None:
            return nullcontext()
        return self._head_file.replaced(heads)

    def copy_to(self, target: Path) -> None:
        """Writes a consistent copy of the file."""
        target.unlink(missing_ok=True)
        with typed_errors(target):
            copy = sqlite3.connect(target)
            try:
                self._connection.backup(copy)
            finally:
                copy.close()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _create(self) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {entries.SCHEMA_VERSION}")
            elif version != entries.SCHEMA_VERSION:
                raise LedgerError(
                    f"{self.path} has ledger schema {version}, this bract writes "
                    f"{entries.SCHEMA_VERSION}: use the bract that wrote it, or a newer one"
                )
            elif leftovers(self.path):
                # A writer killed before its journal counted leaves bytes that SQLite passes over;
                # a write of what is there already clears them.
                connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
