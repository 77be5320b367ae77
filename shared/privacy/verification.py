"""Is this ledger whole, signed, and within its contracts and policies? Offline, with no secrets.

Imports neither torch nor Opacus: an auditor's machine needs none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bract.shared import canonical, contract
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.errors import BractError, Refusal, VerificationFailed
from bract.shared.policy import Policy, check_charged
from bract.shared.privacy import accounting, budget, entries, evidence, export, sharing
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.contents import Contents
from bract.shared.privacy.entries import Charge, Evaluation, Head
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Witness
from bract.shared.reports.audits import Ceiling

# ε is a float that another version of an accountant may round differently.
TOLERANCE = 1e-6


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
        used |= _check_policies(chain, policies)
        used |= _check_contracts(chain, contracts, policies)
    unused = sorted(set(held.documents) - used)
    if unused:
        raise VerificationFailed(f"{unused[0][0]} {unused[0][1]} is stored but no entry names it")
    _check_overlaps(chains, policies)
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


def _check_policies(chain: Chain, policies: Mapping[str, Policy]) -> set[tuple[str, str]]:
    named = {sha256 for _, sha256 in chain.policies}
    for sha256 in sorted(named):
        policy = policies.get(sha256)
        if policy is None:
            raise VerificationFailed(f"the policy {sha256} that entries name is missing")
        if policy.site != chain.site or chain.domain not in policy.domains:
            raise VerificationFailed(f"the policy {sha256} is of another site or domain")
        fault = budget.genesis_fault(chain, policy)
        if fault:
            raise VerificationFailed(fault)
    for (_, before), (entry, now) in pairwise(chain.policies):
        fault = sharing.parted(chain.domain, policies[before], policies[now])
        if fault:
            raise VerificationFailed(f"ledger of {chain.site!r}, entry {entry}: {fault}")
    ceiling = accounting.lost(chain.events)
    if ceiling is not None and ceiling < budget.worst_case(chain, policies) * (1 - TOLERANCE):
        raise VerificationFailed(
            f"ledger of {chain.site!r}, domain {chain.domain!r}: recovered at epsilon {ceiling:g}, "
            "which is under what its policies allowed"
        )
    last_charges: dict[str, int] = {}
    for cost in chain.costs():
        last_charges[cost.policy] = max(cost.sequence, last_charges.get(cost.policy, 0))
    for sha256, last in last_charges.items():
        # Raising a ceiling is the operator's right, but not after it was passed.
        spent, domain = chain.events_until(last), policies[sha256].domains[chain.domain]
        if not accounting.is_unbounded(spent) and not budget.within(chain, spent, domain):
            raise VerificationFailed(
                f"ledger of {chain.site!r}, domain {chain.domain!r}: its charges up to entry "
                f"{last} are over the policy's epsilon {domain.epsilon}"
            )
    return {("policy", sha256) for sha256 in named}


def _check_contracts(
    chain: Chain, contracts: Mapping[str, Contract], policies: Mapping[str, Policy]
) -> set[tuple[str, str]]:
    used = set()
    for charges in chain.charges.values():
        for charge in charges:
            agreed = contracts.get(charge.contract)
            if agreed is None:
                raise VerificationFailed(f"the contract {charge.contract} of a charge is missing")
            fault = _departure(charge, agreed, policies[charge.policy]) or _misjudged(
                charge, chain.evaluations.get(charge.sequence), agreed
            )
            if fault:
                raise VerificationFailed(
                    f"ledger of {chain.site!r}, domain {chain.domain!r}, entry {charge.sequence}: "
                    f"{fault}"
                )
            used.add(("contract", charge.contract))
    for name in {name for body in chain.joined for name in body.contracts}:
        if name not in contracts:
            raise VerificationFailed(f"the contract {name} of charges that were joined is missing")
    for name, attempts in chain.attempts.items():
        if attempts > contracts[name].max_attempts:
            raise VerificationFailed(f"more charges than the contract {name} allows")
        if chain.evaluated[name] > contracts[name].max_evaluations:
            raise VerificationFailed(f"more evaluations than the contract {name} allows")
    return used


def _misjudged(charge: Charge, found: Evaluation | None, agreed: Contract) -> str | None:
    """Returns how the evaluation that stands beside a charge departs from the contract, or None."""
    asked = agreed.evaluation if agreed.evaluates(charge.round) else None
    if asked is None:
        return None if found is None else "an evaluation that the contract does not ask for"
    if found is None:
        return "the contract asks for an evaluation, and none is charged"
    if found.event != entries.evaluation_for(asked):
        return "the evaluation's event is not the contract's"
    return None


def _departure(charge: Charge, agreed: Contract, policy: Policy) -> str | None:
    """Returns how a charge departs from its contract or policy, or None."""
    terms = agreed.site(charge.site)
    if terms is None or terms.key != charge.key or terms.domain != charge.primary:
        return "the contract does not list this site, key and domain"
    if agreed.coordinator not in policy.coordinators:
        return "the contract's coordinator is not in the policy"
    try:
        check_charged(policy, agreed)
    except Refusal as refusal:
        return f"the policy does not allow the contract ({refusal.reason})"
    if charge.domain not in policy.charged_domains(charge.primary):
        return "charges a domain that the policy does not share"
    privacy = agreed.privacy
    expected = {
        "run": agreed.run,
        "event": entries.event_for(agreed),
        "clip_norm": privacy.clip_norm.hex(),
        "clipping": entries.clipping_for(agreed),
        "normaliser": agreed.normaliser(terms).hex(),
        "mechanism": privacy.mechanism,
        "randomness": privacy.randomness,
    }
    different = [name for name, value in expected.items() if getattr(charge, name) != value]
    if different:
        return f"{different[0]} is not the contract's"
    if charge.round > agreed.rounds:
        return f"round {charge.round} is over the contract's {agreed.rounds}"
    return None


def _check_overlaps(
    chains: Mapping[tuple[str, str], Chain], policies: Mapping[str, Policy]
) -> None:
    """Every charge stands equally often in its own domain and in all that share with it.

    And each of them counts what the others were charged before they shared examples.
    """
    held = {name: sharing.uses(chain) for name, chain in chains.items()}
    together: set[tuple[str, frozenset[str]]] = set()
    for (site, domain), uses in held.items():
        for use, charges in uses.items():
            _, _, primary, policy = use
            for other in policies[policy].charged_domains(primary):
                there = held.get((site, other), {}).get(use, [])
                if len(there) < len(charges):
                    raise VerificationFailed(
                        f"ledger of {site!r}, domain {domain!r}, entry "
                        f"{charges[len(there)].sequence}: has no counterpart in the domain "
                        f"{other!r}"
                    )
        if (last := chains[site, domain].last_charge) is not None:
            shared = policies[last.policy].charged_domains(last.primary)
            together.add((site, frozenset(shared)))
    for site, domains in sorted(together, key=repr):
        for domain in sharing.missing([chains[site, name] for name in sorted(domains)]):
            raise VerificationFailed(
                f"ledger of {site!r}, domain {domain!r}: does not count what the domains that "
                "share its examples were charged before; the next charge of a contract adds it"
            )
