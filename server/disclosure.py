"""What an auditor may see of a run: its contract, and what sites showed this server.

All of it is read from the run folder as the last checkpoint left it, so that nothing is told which
a kill could take back. The server holds no site's ledger: of its entries it has hashes, and the
bodies of this run's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bract.server.received import Shelf
from bract.shared import canonical
from bract.shared.contract import Contract
from bract.shared.errors import BractError
from bract.shared.keys import SigningKey
from bract.shared.privacy import witness
from bract.shared.privacy.entries import Head
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Link, Witness


class Unknown(BractError):
    """An auditor asked for a site or an entry that this server has not seen."""


class Disclosure:
    """Answers an auditor's questions from a run folder.

    Args:
        out: the run folder.
        agreed: the contract that it is of.
        key: countersigns heads.
    """

    def __init__(self, out: Path, agreed: Contract, key: SigningKey) -> None:
        self._out, self._agreed, self._key = out, agreed, key
        self._shelf = Shelf(out)

    def contract(self) -> bytes:
        """Returns the signed contract."""
        return (self._out / "contract.json").read_bytes()

    def heads(self) -> list[Witness]:
        """Returns the newest durable head of each site, countersigned."""
        heads, _ = self._checkpoint()
        return [
            witness.sign(site, domain, head, self._key)
            for site, (domain, head) in sorted(heads.items())
        ]

    def entries(self, site: str) -> Iterator[Witness | tuple[int, Link]]:
        """Yields the links of a site's ledger by number, and first the witness they begin after.

        Raises:
            Unknown: where the site has no head yet.
        """
        heads, attempts = self._checkpoint()
        if site not in heads:
            raise Unknown(f"no update of a site {site!r} is in a completed round")
        _, head = heads[site]
        following: int | None = None
        for one in self._shelf.of(site, attempts=attempts):
            if not one.counted:
                continue  # of a void round, which no head was taken from
            since = one.ledger.since
            number = since.sequence + 1 if since else 0
            if following is None:
                following = number
                if since is not None:
                    yield since
            for link in one.ledger.links:
                # A site that missed a witness shows again what it showed before.
                if number == following and number <= head.sequence:
                    yield number, link
                    following += 1
                number += 1

    def updates(self, site: str) -> Iterator[Received]:
        """Yields what came with each update of a site.

        Raises:
            Unknown: where the contract lists no such site.
        """
        if self._agreed.site(site) is None:
            raise Unknown(f"the contract lists no site {site!r}")
        _, attempts = self._checkpoint()
        yield from self._shelf.of(site, attempts=attempts)

    def between(
        self, site: str, domain: str, first: int, second: int
    ) -> Iterator[tuple[int, Link]]:
        """Yields the links after one entry up to another, without their bodies.

        Raises:
            Unknown: where one of them was not seen here, or the second stands before the first.
        """
        heads, _ = self._checkpoint()
        known, head = heads.get(site, (None, None))
        if head is None or known != domain or not first <= second <= head.sequence:
            raise Unknown(f"no entries {first} to {second} of {site!r}, domain {domain!r}")
        for found in self.entries(site):
            if isinstance(found, Witness):
                if found.sequence > first:
                    raise Unknown(f"entry {first} is from before this server's first")
            elif first < found[0] <= second:
                yield found[0], Link(found[1].body_hash)

    def _checkpoint(self) -> tuple[dict[str, tuple[str, Head]], int]:
        """Returns the heads by site, and how many rounds were sent."""
        path = self._out / "checkpoint" / "state.json"
        facts: dict[str, Any] = canonical.decode(path.read_bytes()) if path.exists() else {}
        if facts.get("contract") != self._agreed.sha256:
            return {}, 0
        heads = {
            site: (head["domain"], Head(sequence=head["sequence"], hash=head["hash"]))
            for site, head in facts["heads"].items()
        }
        return heads, facts["attempts"]
