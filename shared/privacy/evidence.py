"""What others saw of a ledger, held against it: witnesses, and receipts of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import entries, receipts, witness
from bract.shared.privacy.entries import Head, Release
from bract.shared.privacy.ledger import Contents
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Witness

Name = tuple[str, str]


def check_witnesses(held: Contents, contracts: Mapping[str, Contract]) -> dict[Name, int]:
    """Returns the last witnessed entry of each chain, every stored witness being in its chain.

    Raises:
        VerificationFailed: naming the chain whose witness does not hold.
    """
    found: dict[Name, int] = {}
    for (site, domain, key), text in held.witnesses.items():
        seen = witness.from_bytes(text)
        if (seen.site, seen.domain, seen.key) != (site, domain, key):
            raise VerificationFailed(f"{_named(site, domain)}: a witness of another chain")
        _check_witness(held, contracts, seen)
        found[site, domain] = max(seen.sequence, found.get((site, domain), -1))
    return found


def check_given(
    held: Contents, contracts: Mapping[str, Contract], witnesses: Sequence[Witness]
) -> dict[Name, int]:
    """Returns the last witnessed entry by witnesses that were kept elsewhere.

    Those of sites that the ledger does not hold are of another file.

    Raises:
        VerificationFailed: naming the chain whose witness does not hold.
    """
    found: dict[Name, int] = {}
    for seen in witnesses:
        name = (seen.site, seen.domain)
        if name in held.rows:
            _check_witness(held, contracts, seen)
            found[name] = max(seen.sequence, found.get(name, -1))
    return found


def check_received(
    held: Contents,
    contracts: Mapping[str, Contract],
    site_keys: Mapping[str, str],
    received: Sequence[Received],
) -> dict[Name, int]:
    """Returns how many received updates of each chain stand in it, behind their charges.

    That a release follows its charge is a rule of the chain, which must have been verified.

    Raises:
        VerificationFailed: naming the round of an update that no charge paid for.
    """
    counts = dict.fromkeys(held.rows, 0)
    if not received:
        return counts
    sites = {site for site, _ in held.rows}
    released = {name: _releases(rows) for name, rows in held.rows.items()}
    for one in received:
        receipt, name = one.receipt, (one.receipt.site, one.receipt.head_domain)
        if receipt.site not in sites:
            continue  # of another file
        which = f"{_named(*name)}: the update received of round {receipt.round}"
        one.verify(site_keys[receipt.site])
        if name not in held.rows or receipt.contract not in contracts:
            raise VerificationFailed(f"{which} is of a contract or domain that it never charged")
        if not _is_in(held, name, receipt.head):
            raise VerificationFailed(f"{which} names entry {receipt.head_sequence}, which is gone")
        if not any(
            number <= receipt.head_sequence and receipts.is_release(body, receipt)
            for number, body in released[name].get((receipt.contract, receipt.round), ())
        ):
            raise VerificationFailed(f"{which} stands behind no charge")
        counts[name] += 1
    return counts


def _check_witness(held: Contents, contracts: Mapping[str, Contract], seen: Witness) -> None:
    where = _named(seen.site, seen.domain)
    if seen.key not in {agreed.witness for agreed in contracts.values()}:
        raise VerificationFailed(f"{where}: a witness by a key that no contract names")
    seen.verify(seen.key)
    if not _is_in(held, (seen.site, seen.domain), seen.head):
        raise VerificationFailed(
            f"{where}: the witnessed entry {seen.sequence} is not in the chain"
        )


def _is_in(held: Contents, name: Name, head: Head) -> bool:
    rows = held.rows.get(name, [])
    return head.sequence < len(rows) and entries.hash_of(rows[head.sequence][1]) == head.hash


def _releases(
    rows: Sequence[tuple[int, bytes, bytes]],
) -> dict[tuple[str, int], list[tuple[int, Release]]]:
    found: dict[tuple[str, int], list[tuple[int, Release]]] = {}
    for number, text, _ in rows:
        body = entries.body(text)
        if isinstance(body, Release):
            found.setdefault((body.contract, body.round), []).append((number, body))
    return found


def _named(site: str, domain: str) -> str:
    return f"ledger of {site!r}, domain {domain!r}"
