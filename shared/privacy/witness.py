"""Witnesses: a server countersigns the head of a site's ledger, and sees only that it grows.

Entries are hashed as H(previous ‖ H(body)), so a site can show that its head extends what the
server saw by the hashes of the bodies alone. Bodies are shown for the server's own run and for no
other. A ledger that was put back to an older copy cannot be extended to what was witnessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field

from bract.shared import canonical, keys
from bract.shared.configuration import Frozen, parse
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.privacy import entries
from bract.shared.privacy.entries import NO_PREVIOUS, Body, Head
from bract.shared.terms import Hex32, Name


class Witness(Frozen):
    """A head that a server saw, and its signature of it by the key that the contract names."""

    schema_version: Literal[1] = 1
    site: Name
    domain: Name
    sequence: int = Field(ge=0, lt=2**63)  # what a table of the ledger can hold
    hash: Hex32
    key: Hex32
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @property
    def head(self) -> Head:
        """The entry that was seen."""
        return Head(sequence=self.sequence, hash=self.hash)

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON that travels and rests."""
        return self._text

    @cached_property
    def _text(self) -> bytes:
        return canonical.encode(self.model_dump(mode="json"))

    def verify(self, key: str) -> None:
        """Returns where the pinned key signed it.

        Raises:
            VerificationFailed: otherwise.
        """
        if self.key != key:
            raise VerificationFailed("witness is signed by another key than the pinned")
        keys.verify(key, bytes.fromhex(self.signature), self._signed)

    @cached_property
    def _signed(self) -> bytes:
        return _digest(self.model_dump(mode="json", exclude={"signature"}))


def sign(site: str, domain: str, head: Head, key: keys.SigningKey) -> Witness:
    """Returns the countersignature of a head."""
    facts: dict[str, Any] = {
        "schema_version": 1,
        "site": site,
        "domain": domain,
        "sequence": head.sequence,
        "hash": head.hash,
        "key": key.public,
    }
    return Witness(**facts, signature=key.sign(_digest(facts)).hex())


@lru_cache(maxsize=1024)  # a site reads it as it comes, as it rests, and as it shows it
def from_bytes(text: bytes) -> Witness:
    """Returns the witness in canonical JSON; its signature is not yet verified.

    Raises:
        VerificationFailed: for anything else, a second spelling of the same witness included.
    """
    try:
        found = parse(Witness, canonical.decode(text), source="witness")
    except UsageError as error:
        raise VerificationFailed("not a witness") from error
    if found.to_bytes() != text:
        raise VerificationFailed("a witness is not in canonical form")
    return found


@dataclass(frozen=True, slots=True)
class Link:
    """One entry as a site shows it: the hash of its body; the body where it is of this run."""

    body_hash: bytes
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Extension:
    """The entries after a witnessed head, up to the head that a receipt names.

    `since` is the witness that the site holds of this server, None before the first.
    """

    since: Witness | None
    links: tuple[Link, ...]


NOTHING = Extension(since=None, links=())


def follow(extension: Extension) -> Iterator[tuple[Head, Body | None]]:
    """Yields each entry's head, and its body where it is shown, from the one after `since`.

    Raises:
        VerificationFailed: where a shown body is not the one that was hashed, or names another
            place than its own.
    """
    since = extension.since
    previous = since.hash if since else NO_PREVIOUS
    number = since.sequence + 1 if since else 0
    for link in extension.links:
        if link.body and entries.body_hash(link.body) != link.body_hash:
            raise VerificationFailed("a ledger entry's body is not the one that was hashed")
        shown = entries.body(link.body) if link.body else None
        if shown is not None and (shown.sequence, shown.previous) != (number, previous):
            raise VerificationFailed("a ledger entry that stands in another place")
        previous = entries.link(previous, link.body_hash)
        yield Head(number, previous), shown
        number += 1


def show(since: Witness | None, bodies: Sequence[bytes], *, contract: str) -> Extension:
    """Returns what a server may see of the bodies after a witness: hashes, and its own run's."""
    return Extension(
        since=since,
        links=tuple(
            Link(
                body_hash=entries.body_hash(text),
                body=text if getattr(entries.body(text), "contract", None) == contract else b"",
            )
            for text in bodies
        ),
    )


def _digest(facts: dict[str, Any]) -> bytes:
    return canonical.tagged("witness/1", canonical.encode(facts))
