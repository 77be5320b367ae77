"""The ledger on disk: an SQLite file that is only added to, one transaction for check and charge.

What makes a change show is the chain and its signatures, not the file: whoever has the file can
write to it.

journal_mode=TRUNCATE and synchronous=EXTRA: a committed charge survives a crash, and a copy of
the one file holds all of it (with a write-ahead log it would not).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

from bract.shared.errors import LedgerBusy, LedgerError, LedgerUnwritable, RolledBack
from bract.shared.keys import SigningKey
from bract.shared.privacy import entries, witness
from bract.shared.privacy.chain import Chain, RoundKey
from bract.shared.privacy.entries import Body, Entry, Head
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.witness import Witness

APPLICATION_ID = 0x62726163  # "brac"
# Of a file with many sites' chains so many stay folded with all their entries. Of so many others
# stays what continues them, at most 16 kB each; one beyond is read from the file again.
CHAINS_IN_MEMORY, ENDS_IN_MEMORY = 1024, 16_384
DocumentKind = Literal["contract", "policy"]
_LOOKS, _LOOK_SECONDS = 30, 0.05

# Rows lie in the order of their coming: those of a commit are together, at the end of the file.
_SCHEMA = """
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
_SCHEMA_BY_KEY = _SCHEMA.replace("STRICT", "WITHOUT ROWID, STRICT")


@dataclass(slots=True, eq=False)
class Transaction:
    """Sole writer of the file until it ends; nothing is kept unless it ends well."""

    _connection: sqlite3.Connection
    _chains: dict[tuple[str, str], Chain]
    _ends: dict[tuple[str, str], Chain]
    _seen: Mapping[tuple[str, str], Head]
    _kept: set[tuple[DocumentKind, str]]
    touched: set[tuple[str, str]] = field(default_factory=set)
    ahead: set[tuple[str, str]] = field(default_factory=set)

    def chain(
        self, site: str, domain: str, *, key: str, rounds: Collection[RoundKey] | None = None
    ) -> Chain:
        """Returns the verified chain of a domain, read on from where this process last saw it.

        Args:
            site: whose.
            domain: of the site.
            key: the site's.
            rounds: of which the chain must hold all entries; None for every round.

        Raises:
            VerificationFailed: where an entry was altered, or entries seen before are gone.
        """
        name = (site, domain)
        self.touched.add(name)
        chain = self._chains.pop(name, None) or self._ends.pop(name, None)
        found: list[Entry] = []
        if chain is not None and chain.knows(rounds):
            found = self._following(chain, key)
        if chain is None or not chain.knows(None if found else rounds):
            # Another writer may have added to a round whose entries are not held: read all of it.
            chain = Chain(site=site, domain=domain, key=key)
            found = self._following(chain, key)
        begun = chain.length > 1
        for entry in found:
            chain.extend_(entry)
        if not begun:
            self._check_witnesses(site, domain)
        self._chains[name] = chain
        return chain

    def _following(self, chain: Chain, key: str) -> list[Entry]:
        """Returns the entries that a file holds after those of a chain."""
        site, domain, start = chain.site, chain.domain, max(chain.length - 1, 0)
        rows = [
            (text.encode(), signature)
            for text, signature in self._connection.execute(
                "SELECT body, signature FROM entries WHERE site = ? AND domain = ?"
                " AND sequence >= ? ORDER BY sequence",
                (site, domain, start),
            )
        ]
        if chain.last is not None and rows[:1] == [chain.last] and chain.key == key:
            return [entries.read(*row, key=key) for row in rows[1:]]  # the first was read before
        found = [entries.read(*row, key=key) for row in rows]
        known = chain.head or self._seen.get((site, domain))
        if known and [known.hash] != [e.hash for e in found[known.sequence - start :][:1]]:
            raise RolledBack(_rolled_back(site, domain))
        return found[chain.length - start :]

    @contextmanager
    def part(self) -> Iterator[None]:
        """Runs a block whose failure undoes what it added, and nothing else of the transaction."""
        before, self.ahead = self.ahead, set()
        self._connection.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            for name in self.ahead:
                self._chains.pop(name, None)
            self._kept.clear()
            if self._connection.in_transaction:  # a full disk has undone all of it already
                self._connection.execute("ROLLBACK TO part")
                self._connection.execute("RELEASE part")
            raise
        else:
            self._connection.execute("RELEASE part")
        finally:
            self.ahead |= before

    def hash_at(self, site: str, domain: str, sequence: int) -> str | None:
        """Returns the hash of an entry, None where there is none of that number."""
        row = self._connection.execute(
            "SELECT body FROM entries WHERE site = ? AND domain = ? AND sequence = ?",
            (site, domain, sequence),
        ).fetchone()
        return entries.hash_of(row[0].encode()) if row else None

    def bodies_after(self, site: str, domain: str, sequence: int) -> list[bytes]:
        """Returns the bodies of the entries after one, in order."""
        rows = self._connection.execute(
            "SELECT body FROM entries WHERE site = ? AND domain = ? AND sequence > ?"
            " ORDER BY sequence",
            (site, domain, sequence),
        )
        return [text.encode() for (text,) in rows]

    def witness(self, site: str, domain: str, key: str) -> Witness | None:
        """Returns the newest witness that a key gave of a chain."""
        row = self._connection.execute(
            "SELECT body FROM witnesses WHERE site = ? AND domain = ? AND key = ?",
            (site, domain, key),
        ).fetchone()
        return witness.from_bytes(row[0].encode()) if row else None

    def keep_witness(self, seen: Witness) -> None:
        """Stores a witness in the place of an older one of the same key.

        Raises:
            RolledBack: where what was seen is not in the chain.
        """
        name = (seen.site, seen.domain)
        chain = self._chains.get(name) if name in self.touched else None
        at_head = chain is not None and chain.head == seen.head
        if not at_head and self.hash_at(*name, seen.sequence) != seen.hash:
            raise RolledBack(_rolled_back(seen.site, seen.domain))
        held = self.witness(seen.site, seen.domain, seen.key)
        if held is None or held.sequence < seen.sequence:
            self._connection.execute(
                "INSERT INTO witnesses VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET body = excluded.body",
                (seen.site, seen.domain, seen.key, seen.to_bytes().decode()),
            )

    def _check_witnesses(self, site: str, domain: str) -> None:
        for (text,) in self._connection.execute(
            "SELECT body FROM witnesses WHERE site = ? AND domain = ?", (site, domain)
        ):
            seen = witness.from_bytes(text.encode())
            seen.verify(seen.key)
            if self.hash_at(site, domain, seen.sequence) != seen.hash:
                raise RolledBack(_rolled_back(site, domain))

    def append(self, chain: Chain, body: Body, key: SigningKey) -> Entry:
        """Signs and adds the next entry of a chain."""
        self.ahead.add((chain.site, chain.domain))
        entry = entries.write(body, key)
        chain.extend_(entry)
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?)",
            (body.site, body.domain, body.sequence, entry.text.decode(), entry.signature),
        )
        return entry

    def document(self, kind: DocumentKind, sha256: str) -> bytes | None:
        """Returns a contract or policy that entries name, None where it is not stored."""
        row = self._connection.execute(
            "SELECT body FROM documents WHERE kind = ? AND sha256 = ?", (kind, sha256)
        ).fetchone()
        return row[0].encode() if row else None

    def keep(self, kind: DocumentKind, sha256: str, text: bytes) -> None:
        """Stores the contract or policy that entries name, so that the file explains itself."""
        # The contract of many sites is long, and each of them names it: to look for it is to read
        # all of it.
        if (kind, sha256) in self._kept:
            return
        known = "SELECT 1 FROM documents WHERE kind = ? AND sha256 = ?"
        if self._connection.execute(known, (kind, sha256)).fetchone() is None:
            self._connection.execute(
                "INSERT INTO documents VALUES (?, ?, ?)", (kind, sha256, text.decode())
            )
        self._kept.add((kind, sha256))


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
        with _typed_errors(path):
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
        with _typed_errors(self.path):
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
        with _typed_errors(target):
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
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {entries.SCHEMA_VERSION}")
            elif version != entries.SCHEMA_VERSION:
                raise LedgerError(
                    f"{self.path} has ledger schema {version}, this bract writes "
                    f"{entries.SCHEMA_VERSION}: use the bract that wrote it, or a newer one"
                )
            elif _leftovers(self.path):
                # A writer killed before its journal counted leaves bytes that SQLite passes over;
                # a write of what is there already clears them.
                connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """Everything in a ledger file, as bytes, not yet verified."""

    rows: dict[tuple[str, str], list[tuple[int, bytes, bytes]]]
    documents: dict[tuple[str, str], bytes]
    witnesses: dict[tuple[str, str, str], bytes]


def contents(path: Path) -> Contents:
    """Returns what a ledger file holds, opened read-only.

    Raises:
        LedgerError: where the file is missing, is no ledger, or a write was interrupted.
    """
    # A commit is as long as a disk's breath; what was interrupted stays.
    for _ in range(_LOOKS):
        if not _leftovers(path):
            break
        time.sleep(_LOOK_SECONDS)
    for leftover in _leftovers(path):
        raise LedgerError(
            f"{leftover} holds an interrupted write: let the site finish, or start it once so that "
            "it is undone, and verify then"
        )
    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: name the .sqlite file")
    with _typed_errors(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("BEGIN")  # one snapshot of entries and documents
            return _contents(connection, path)
        finally:
            connection.close()


def _leftovers(path: Path) -> list[Path]:
    real = path.resolve()  # SQLite keeps its journal beside the file, not beside a link to it
    beside = [real.with_name(real.name + suffix) for suffix in ("-journal", "-wal")]
    return [file for file in beside if file.exists() and file.stat().st_size > 0]


def _contents(connection: sqlite3.Connection, path: Path) -> Contents:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise LedgerError(f"{path} is no bract ledger")
    if version != entries.SCHEMA_VERSION:
        raise LedgerError(
            f"{path} has ledger schema {version}, this bract reads {entries.SCHEMA_VERSION}: "
            "use the bract that wrote it, or a newer one"
        )
    if _objects(connection) not in (_expected(_SCHEMA), _expected(_SCHEMA_BY_KEY)):
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


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
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


def _rolled_back(site: str, domain: str) -> str:
    return (
        f"ledger of {site!r}, domain {domain!r}: entries seen before are gone or changed; "
        "restore the newest copy, or close the domain with bract client SITE.toml --recover DOMAIN"
    )
