"""What others saw of a ledger, held against it: witnesses, and receipts of updates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import entries, receipts, witness
from bract.shared.privacy.contents import Contents
from bract.shared.privacy.entries import Head, Release
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Witness

Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Seen:
    """The witnesses of a ledger's chains: stored in it, and kept elsewhere."""

    stored: tuple[Witness, ...]
    given: tuple[Witness, ...]


def check_witnesses(
    held: Contents, contracts: Mapping[str, Contract], given: Sequence[Witness]
) -> Seen:
    """Returns the witnesses of the chains that a ledger holds, each being in its chain.

    Those of sites that the ledger does not hold are of another file.

    Raises:
        VerificationFailed: naming the chain whose witness does not hold.
    """
    stored = []
    for (site, domain, key), text in held.witnesses.items():
        seen = witness.from_bytes(text)
        if (seen.site, seen.domain, seen.key) != (site, domain, key):
            raise VerificationFailed(f"{_named(site, domain)}: a witness of another chain")
        stored.append(seen)
    here = [seen for seen in given if (seen.site, seen.domain) in held.rows]
    for seen in [*stored, *here]:
        _check_witness(held, contracts, seen)
    return Seen(tuple(stored), tuple(here))


def last_by(seen: Iterable[Witness], keys: Collection[str] | None = None) -> dict[Name, int]:
    """Returns the number of the last entry of each chain that was witnessed by some keys, or any.

    A ledger names its witnesses itself: a site can propose a contract to itself, and be the server
    of it. So only who pins a server's key learns what that server saw.
    """
    found: dict[Name, int] = {}
    for one in seen:
        if keys is None or one.key in keys:
            name = (one.site, one.domain)
            found[name] = max(one.sequence, found.get(name, -1))
    return found


def check_forks(files: Mapping[str, Contents]) -> None:
    """Returns where no two files hold two histories of one chain; the older one may be shorter.

    Args:
        files: by what they are called in an error.

    Raises:
        VerificationFailed: naming two files and the entry at which they part.
    """
    known: dict[tuple[str, str, str], tuple[str, list[bytes]]] = {}
    for file, held in files.items():
        for (site, domain), rows in held.rows.items():
            texts = [text for _, text, _ in rows]
            name = (site, domain, entries.body(texts[0]).key)
            other, before = known.get(name, (file, texts))
            for number, (one, two) in enumerate(zip(before, texts, strict=False)):
                if one != two:
                    raise VerificationFailed(
                        f"{other} and {file}: two histories of {site!r}, domain {domain!r}, which "
                        f"part at entry {number}: neither counts what the other spent"
                    )
            known[name] = (file, texts) if len(texts) > len(before) else (other, before)


def check_received(
    held: Contents,
    contracts: Mapping[str, Contract],
    site_keys: Mapping[str, str],
    received: Sequence[Received],
) -> dict[Name, int]:
    """Returns how many received updates of each chain stand in it, behind their charges, once each.

    That a release follows its charge is a rule of the chain, which must have been verified.

    Raises:
        VerificationFailed: naming the round of an update that no charge paid for.
    """
    taken: dict[Name, set[tuple[str, int, str]]] = {name: set() for name in held.rows}
    sites = {site for site, _ in held.rows}
    released = {name: _releases(rows) for name, rows in held.rows.items()} if received else {}
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
        taken[name].add((receipt.contract, receipt.round, receipt.update))
    return {name: len(updates) for name, updates in taken.items()}


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
