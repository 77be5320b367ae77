"""What the server saw of each site's ledger: it only ever grows, and pays before it releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bract.shared.contract import Contract
from bract.shared.errors import RolledBack, VerificationFailed
from bract.shared.keys import SigningKey
from bract.shared.messages import SignedReceipt
from bract.shared.privacy import receipts, witness
from bract.shared.privacy.entries import Head
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.witness import Witness


class WitnessDesk:
    """The newest head seen of each site, checked against every update and countersigned.

    Args:
        key: countersigns; None where the contract names no witness.
        kept: holds the heads over runs, so that a ledger that was put back between two of them is
            noticed; None in a simulation, whose ledgers are at hand.
    """

    def __init__(self, key: SigningKey | None, kept: HeadFile | None = None) -> None:
        self._key, self._kept = key, kept
        self._seen: dict[str, tuple[str, Head]] = {}
        self._earlier = kept.read() if kept else {}

    def remember(self, heads: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the heads of a saved checkpoint: only what is durable here is countersigned.

        Args:
            heads: {SITE: {domain, sequence, hash}}.
        """
        self._seen = {
            site: (head["domain"], Head(sequence=head["sequence"], hash=head["hash"]))
            for site, head in heads.items()
        }
        seen = {(site, domain): head for site, (domain, head) in self._seen.items()}
        if self._kept is not None and not seen.items() <= self._earlier.items():
            self._earlier = {**self._earlier, **seen}
            self._kept.write(self._earlier)

    def witness(self, site: str | None) -> Witness | None:
        """Returns the countersignature of the newest head of a site."""
        seen = self._seen.get(site or "")
        if self._key is None or site is None or seen is None:
            return None
        return witness.sign(site, *seen, self._key)

    def check(self, reply: SignedReceipt, domain: str, agreed: Contract) -> tuple[int, ...]:
        """Returns the numbers of the contract's charges that an update's links show.

        Its ledger extends what was seen then, and holds a charge before the update.

        Args:
            reply: the update.
            domain: whose ledger the contract names.
            agreed: says what a round costs, and an evaluation.

        Raises:
            RolledBack: where entries that were seen are gone.
            VerificationFailed: where the links do not lead to the receipt's head, or no charge
                stands before the update's release.
        """
        if self._key is None:
            return ()
        receipt, since = reply.receipt, reply.ledger.since
        if receipt.head_domain != domain:
            raise VerificationFailed("a head of another domain than the contract's")
        if since is not None:
            since.verify(self._key.public)
            if (since.site, since.domain) != (receipt.site, domain):
                raise VerificationFailed("a witness of another ledger")
        found = receipts.trace(receipt, reply.ledger, agreed)
        _, seen = self._seen.get(receipt.site, (domain, None))
        for known in (seen, self._earlier.get((receipt.site, domain))):
            # A newer witness is this server's own word, given in another run that it carries.
            newer = since is not None and known is not None and since.sequence > known.sequence
            if known and not newer and found.heads.get(known.sequence) != known.hash:
                raise RolledBack(
                    f"the ledger of {receipt.site!r} does not extend what was witnessed"
                )
        if not found.paid:
            raise VerificationFailed("no charge stands before the update's release")
        return found.charges
