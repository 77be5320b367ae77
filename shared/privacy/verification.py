"""Is this ledger whole, signed, and within its contracts and policies? Offline, with no secrets.

Imports neither torch nor Opacus: an auditor's machine needs none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bract.shared import canonical, contract
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.policy import Policy
from bract.shared.privacy import conformity, entries, evidence, export
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.contents import Contents
from bract.shared.privacy.entries import Head
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Witness
from bract.shared.reports.audits import Ceiling


@dataclass(frozen=True, slots=True)
class Verified:
    """A chain that holds, and up to which entry an anchor excludes that its tail was cut.

    `anchor` is the number of the last entry that was seen elsewhere, None where none was: what
    came after it can have been cut off. `witnessed` is that of the last entry that a server whose
    key is pinned countersigned, None where none did; `received` counts the updates that a server
    took and that stand here behind a charge, None where no receipts were given.
    """

    chain: Chain
    anchor: int | None
    policies: Mapping[str, Policy]
    contracts: Mapping[str, Contract]
    witnessed: int | None = None
    received: int | None = None

    @property
    def policy(self) -> Policy:
        """The policy in force at the last entry."""
        return self.policies[self.chain.policies[-1][1]]

    @property
    def ceilings(self) -> list[Ceiling]:
        """Every ε that the domain was allowed, with the entry from which on."""
        found: list[Ceiling] = []
        for entry, name in self.chain.policies:
            epsilon = self.policies[name].domains[self.chain.domain].epsilon
            if not found or found[-1].epsilon != epsilon:
                found.append(Ceiling(entry=entry, epsilon=epsilon))
        return found

    @property
    def rows_per_person(self) -> int | None:
        """How many examples of a person any charge used at the most, None where one bounds none.

        Nor do contracts that tell persons apart by different columns bound the same persons' rows.
        """
        rows = [agreed.rows_per_person for agreed in self._charged]
        bounded = [row for row in rows if row is not None]
        alike = len({agreed.data.person_column for agreed in self._charged}) == 1
        return max(bounded) if alike and len(bounded) == len(rows) else None

    @property
    def rows_kept(self) -> int | None:
        """The fewest rows of a person that any charge kept, None where all used every row.

        Of a person with more, one row less lets another take its place.
        """
        rows = (agreed.rows_per_person for agreed in self._charged)
        return min((row for row in rows if row is not None), default=None)

    @property
    def _charged(self) -> list[Contract]:
        joined = {name for body in self.chain.joined for name in body.contracts}
        return [self.contracts[name] for name in {*self.chain.attempts, *joined}]

    @property
    def last_contract(self) -> Contract | None:
        """The contract of the last charge, None before the first."""
        last = self.chain.last_charge
        return self.contracts[last.contract] if last is not None else None


def verify(
    path: Path,
    *,
    site_keys: Mapping[str, str],
    anchors: Mapping[tuple[str, str], Head],
    witnesses: Sequence[Witness] = (),
    witness_keys: Collection[str] = (),
    received: Sequence[Received] | None = None,
) -> list[Verified]:
    """Returns the chains of a ledger file, or of an export, where every one of them holds.

    Args:
        path: the SQLite file, opened read-only, or its export.
        site_keys: the pinned public key of each site; from the contract or from `--site-key`,
            never from the ledger.
        anchors: heads by (site, domain), seen elsewhere; a chain must contain its anchor.
        witnesses: heads that a server countersigned, kept elsewhere; each is an anchor too.
        witness_keys: the pinned keys of servers; a site can have a key of its own countersign.
        received: what a server took; each update of these sites must stand behind a charge.

    Raises:
        VerificationFailed: naming the ledger, the entry and the fault. Any exception at all on
            the way means 'not verified'.
    """
    try:
        return verify_contents(
            export.contents(path),
            site_keys=site_keys,
            anchors=anchors,
            witnesses=witnesses,
            witness_keys=witness_keys,
            received=received,
        )
    except BractError as error:
        raise VerificationFailed(f"{path}: {error}") from error
    except Exception as error:
        raise VerificationFailed(f"{path}: not verified ({type(error).__name__})") from error


def verify_contents(
    held: Contents,
    *,
    site_keys: Mapping[str, str],
    anchors: Mapping[tuple[str, str], Head],
    witnesses: Sequence[Witness] = (),
    witness_keys: Collection[str] = (),
    received: Sequence[Received] | None = None,
) -> list[Verified]:
    """Returns the chains of a ledger that was read; see `verify`, which also names the file.

    Raises:
        VerificationFailed: naming the entry and the fault.
    """
    if not held.rows:
        raise VerificationFailed("the ledger is empty")
    contracts, policies = _documents(held)
    sites = {site for site, _ in held.rows}
    for site, domain in [*anchors, *((seen.site, seen.domain) for seen in witnesses)]:
        if site in sites and (site, domain) not in held.rows:
            raise VerificationFailed(
                f"ledger of {site!r}: holds no domain {domain!r}, but the anchor names it"
            )
    chains = {
        name: _chain(rows, name, site_keys, anchors) for name, rows in sorted(held.rows.items())
    }
    used: set[tuple[str, str]] = set()
    for chain in chains.values():
        used |= conformity.check_policies(chain, policies)
        used |= conformity.check_contracts(chain, contracts, policies)
    unused = sorted(set(held.documents) - used)
    if unused:
        raise VerificationFailed(f"{unused[0][0]} {unused[0][1]} is stored but no entry names it")
    conformity.check_overlaps(chains, policies)
    seen = evidence.check_witnesses(held, contracts, witnesses)
    countersigned = evidence.last_by([*seen.stored, *seen.given], witness_keys)
    given = {name: head.sequence for name, head in anchors.items()}
    for name, number in evidence.last_by(seen.given).items():
        given[name] = max(number, given.get(name, number))
    taken = evidence.check_received(held, contracts, site_keys, received or ())
    return [
        Verified(
            chain=chain,
            anchor=given.get(name),
            policies=policies,
            contracts=contracts,
            witnessed=countersigned.get(name),
            received=None if received is None else taken[name],
        )
        for name, chain in chains.items()
    ]


def _chain(
    rows: list[tuple[int, bytes, bytes]],
    name: tuple[str, str],
    site_keys: Mapping[str, str],
    anchors: Mapping[tuple[str, str], Head],
) -> Chain:
    site, domain = name
    key = site_keys.get(site)
    if key is None:
        raise VerificationFailed(
            f"key not pinned for the site {site!r}: give --site-key, or keep the ledger beside the "
            "contract that lists it"
        )
    chain, anchor = Chain(site=site, domain=domain, key=key), anchors.get(name)
    for sequence, text, signature in rows:
        try:
            entry = entries.read(text, signature, key=key)
        except VerificationFailed as error:
            raise VerificationFailed(
                f"ledger of {site!r}, domain {domain!r}, entry {sequence}: {error}"
            ) from error
        chain.extend_(entry)
        if sequence != entry.body.sequence:
            raise VerificationFailed(f"entry {sequence} is stored under another number")
        if anchor and entry.body.sequence == anchor.sequence and entry.hash != anchor.hash:
            raise VerificationFailed(
                f"ledger of {site!r}, domain {domain!r}, entry {sequence}: "
                "is not the entry that the anchor names"
            )
    if anchor and not 0 <= anchor.sequence < chain.length:
        raise VerificationFailed(
            f"ledger of {site!r}, domain {domain!r}: cut short, ends at entry {chain.length - 1} "
            f"but the anchor names entry {anchor.sequence}"
        )
    return chain


def _documents(held: Contents) -> tuple[dict[str, Contract], dict[str, Policy]]:
    contracts, policies = {}, {}
    for (kind, sha256), text in held.documents.items():
        document: Contract | Policy
        try:
            if kind == "contract":
                signed = contract.from_bytes(text)
                document = contracts[sha256] = signed.verify(signed.contract.coordinator)
            elif kind == "policy":
                document = policies[sha256] = parse(Policy, canonical.decode(text), source="policy")
                if document.to_bytes() != text:
                    raise VerificationFailed("is in a second spelling")
            else:
                raise VerificationFailed("unknown kind of document")
            if document.sha256 != sha256:
                raise VerificationFailed("is not what its hash says")
        except BractError as error:
            raise VerificationFailed(f"{kind} {sha256}: {error}") from error
    return contracts, policies
