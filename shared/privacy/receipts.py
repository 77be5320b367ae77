"""What a server keeps of every update it took: the site's receipt, and what its ledger grew by.

The arrays are no part of it. An auditor holds it against the site's ledger, or, without one,
against the links that the site showed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bract.shared import canonical, keys
from bract.shared.configuration import Frozen, parse
from bract.shared.contract import Contract
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.privacy import entries, witness
from bract.shared.privacy.entries import Charge, Evaluation, Head, Release
from bract.shared.privacy.witness import Extension, Link, Witness
from bract.shared.terms import Hex32, Name


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a site says of an update, signed by its ledger key: public facts alone.

    `evaluation` is (correct, total) of a local evaluation, both noised.
    """

    contract: str
    site: str
    round: int
    attempt: int
    update: str
    head_domain: str
    head_sequence: int
    head_hash: str
    evaluation: tuple[float, float] | None = None

    @property
    def head(self) -> Head:
        """The last entry of the site's ledger when it sent the update."""
        return Head(sequence=self.head_sequence, hash=self.head_hash)

    def digest(self) -> bytes:
        """Returns what the site signs."""
        return canonical.tagged("receipt/1", self.to_bytes())

    def facts(self) -> dict[str, Any]:
        """Returns what it says, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def to_bytes(self) -> bytes:
        """Returns its canonical JSON."""
        return canonical.encode(self.facts())


@dataclass(frozen=True, slots=True)
class Received:
    """The trace of one update that a server took.

    `attempt` counts the rounds that the server had sent by then; `counted` says whether the update
    is in the model: of a void round none is.
    """

    receipt: Receipt
    signature: bytes
    ledger: Extension
    attempt: int
    counted: bool

    def verify(self, key: str) -> None:
        """Returns where the site's key signed the receipt.

        Raises:
            VerificationFailed: otherwise.
        """
        keys.verify(key, self.signature, self.receipt.digest())

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON that travels and rests, without a line's end."""
        since = self.ledger.since
        return canonical.encode(
            {
                "receipt": self.receipt.facts(),
                "signature": self.signature.hex(),
                "attempt": self.attempt,
                "counted": self.counted,
                "since": since.model_dump(mode="json") if since else None,
                "links": [
                    {
                        "hash": link.body_hash.hex(),
                        "body": canonical.decode(link.body) if link.body else None,
                    }
                    for link in self.ledger.links
                ],
            }
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Where links lead: the hash of each entry by its number, from `since` on.

    `paid` says whether the update's release stands there after all that it costs, `charges` the
    numbers of all charges of the contract there, those of other rounds too.
    """

    heads: Mapping[int, str]
    paid: bool
    charges: tuple[int, ...]


def trace(receipt: Receipt, ledger: Extension, agreed: Contract) -> Trace:
    """Returns where the links that came with an update lead.

    Args:
        receipt: of the update.
        ledger: the links since the last witness; its signature is not looked at.
        agreed: says what a round costs, and an evaluation.

    Raises:
        VerificationFailed: where the links do not lead to the receipt's head.
    """
    since = ledger.since
    heads = {since.sequence: since.hash} if since else {}
    cost, asked = entries.event_for(agreed), agreed.evaluation
    cost_of_evaluation = None if asked is None else entries.evaluation_for(asked)
    charged = evaluated = released = False
    last, charges = since.head if since else None, list[int]()
    for head, body in witness.follow(ledger):
        heads[head.sequence], last = head.hash, head
        if isinstance(body, Charge) and body.contract == receipt.contract:
            charges.append(head.sequence)
        charged |= isinstance(body, Charge) and _is_paid(body, receipt, cost)
        if isinstance(body, Evaluation):
            evaluated |= charged and _is_paid(body, receipt, cost_of_evaluation)
        # A release counts only after all that it costs.
        paid = charged and evaluated == (receipt.evaluation is not None)
        released |= paid and isinstance(body, Release) and is_release(body, receipt)
    if last != receipt.head:
        raise VerificationFailed("the links do not lead to the head that the site signed")
    return Trace(heads=heads, paid=released, charges=tuple(charges))


def is_release(body: Release, receipt: Receipt) -> bool:
    """Returns whether a release is that of the update that a receipt is of."""
    evaluation = [value.hex() for value in receipt.evaluation] if receipt.evaluation else None
    return (
        body.contract,
        body.site,
        body.round,
        body.attempt,
        body.update,
        body.evaluation,
    ) == (
        receipt.contract,
        receipt.site,
        receipt.round,
        receipt.attempt,
        receipt.update,
        evaluation,
    )


def from_bytes(text: bytes) -> Received:
    """Returns what `to_bytes` wrote; no signature and no link is verified yet.

    Raises:
        VerificationFailed: for anything else, a second spelling of the same included.
    """
    value = canonical.decode(text)
    try:
        line = parse(_Line, value, source="receipt")
        found = Received(
            receipt=Receipt(**line.receipt.model_dump()),
            signature=bytes.fromhex(line.signature),
            ledger=Extension(
                since=line.since, links=tuple(_link(link.hash, link.body) for link in line.links)
            ),
            attempt=line.attempt,
            counted=line.counted,
        )
    except (UsageError, ValueError) as error:
        raise VerificationFailed("not a receipt of an update") from error
    if found.to_bytes() != text:
        raise VerificationFailed("a receipt is not in canonical form")
    return found


def read(path: Path) -> list[Received]:
    """Returns the receipts in a file, one a line.

    Raises:
        UsageError: where it cannot be read.
        VerificationFailed: naming the first line that is no receipt.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the receipts {path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(from_bytes(line))
        except VerificationFailed as error:
            raise VerificationFailed(f"{path}, line {number}: {error}") from error
    return found


def to_lines(found: Iterable[Received]) -> bytes:
    """Returns receipts as the lines of a file."""
    return b"".join(one.to_bytes() + b"\n" for one in found)


class _Facts(Frozen):
    contract: Hex32
    site: Name
    round: int = Field(ge=1)
    attempt: int = Field(ge=1)
    update: Hex32
    head_domain: Name
    head_sequence: int = Field(ge=0)
    head_hash: Hex32
    evaluation: tuple[float, float] | None


class _LineLink(Frozen):
    hash: Hex32
    body: dict[str, Any] | None


class _Line(Frozen):
    receipt: _Facts
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    attempt: int = Field(ge=1)
    counted: bool
    since: Witness | None
    links: tuple[_LineLink, ...]


def _link(hashed: str, body: dict[str, Any] | None) -> Link:
    return Link(bytes.fromhex(hashed), canonical.encode(body) if body is not None else b"")


def _is_paid(body: Charge | Evaluation, receipt: Receipt, cost: Mapping[str, Any] | None) -> bool:
    return (body.contract, body.site, body.domain, body.round, body.attempt, body.event) == (
        receipt.contract,
        receipt.site,
        receipt.head_domain,
        receipt.round,
        receipt.attempt,
        cost,
    )
