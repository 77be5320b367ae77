"""A transaction of a ledger: check and charge together, kept as a whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from bract.shared.errors import RolledBack
from bract.shared.keys import SigningKey
from bract.shared.privacy import entries, witness
from bract.shared.privacy.chain import Chain, RoundKey
from bract.shared.privacy.entries import Body, Entry, Head
from bract.shared.privacy.witness import Witness

DocumentKind = Literal["contract", "policy"]


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


def _rolled_back(site: str, domain: str) -> str:
    return (
        f"ledger of {site!r}, domain {domain!r}: entries seen before are gone or changed; "
        "restore the newest copy, or close the domain with bract client SITE.toml --recover DOMAIN"
    )
