"""Domains that come to share examples: what one was charged before, all of them count."""

from __future__ import annotations

from typing import Any

import pytest

from bract.client.permits import Permit
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, Refusal, UsageError, VerificationFailed
from bract.shared.policy import DomainPolicy, Filter, Policy
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.privacy import accounting, contents, entries, ledger, verification
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.verification import Verified
from bract.shared.terms import DataTerms, EvaluationTerms, SiteTerms

ROUND = PoissonGaussian(0.1, 1.5, 2)


def apart(world: Any, *, clinic: float = 8.0, **more: Any) -> Policy:
    """Returns the policy of two domains that share nothing."""
    ward = more.pop("ward", {})
    domains = {
        "ward": DomainPolicy(**{"epsilon": 8.0, "delta": 1e-5, **ward}),
        "clinic": DomainPolicy(epsilon=clinic, delta=1e-5),
    }
    policy: Policy = world.policy(domains=domains, **more)
    return policy


def together(world: Any, **more: Any) -> Policy:
    """Returns the policy of the same domains once the operator knows that they share examples."""
    return apart(world, ward={"overlaps": ("clinic",), **more.pop("ward", {})}, **more)


def contract(world: Any, domain: str = "ward", **changes: Any) -> SignedContract:
    site = SiteTerms(name="alpha", key=world.key.public, domain=domain, nominal_size=100)
    signed: SignedContract = world.sign(world.contract(cohort=(site,), **changes))
    return signed


def served(world: Any, policy: Policy, signed: SignedContract, *rounds: int) -> None:
    """Serves rounds by a process of its own."""
    gate = world.gate(policy=policy)
    for number in rounds:
        world.serve(gate, world.order(signed, number))
    gate.ledger.close()


def refused(world: Any, policy: Policy, signed: SignedContract) -> Reason:
    gate = world.gate(policy=policy)
    before = contents.read(world.ledger_path).rows
    with pytest.raises(Refusal) as refusal:
        gate.admit(world.order(signed))
    gate.ledger.close()
    assert contents.read(world.ledger_path).rows == before
    return refusal.value.reason


def verified(world: Any) -> dict[str, Verified]:
    found = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    return {one.chain.domain: one for one in found}


def steps(world: Any) -> dict[str, int]:
    """Returns the steps that each domain counts, by an auditor."""
    return {
        name: sum(event.steps for event in one.chain.events if isinstance(event, PoissonGaussian))
        for name, one in verified(world).items()
    }


def kinds(world: Any, domain: str) -> list[str]:
    rows = contents.read(world.ledger_path).rows["alpha", domain]
    return [entries.body(text).kind for _, text, _ in rows]


def test_a_domain_that_is_declared_late_counts_what_was_charged_before(world: Any) -> None:
    first, second = contract(world), contract(world)
    alone = world.policy()
    served(world, alone, first, 1, 2, 3)
    served(world, together(world), second, 1, 2)
    assert steps(world) == {"ward": 10, "clinic": 10}
    assert kinds(world, "clinic") == ["genesis", "joined", "charge", "charge"]
    clinic = verified(world)["clinic"].chain
    assert [(body.others, body.contracts) for body in clinic.joined] == [
        (["ward"], [first.contract.sha256])
    ]
    assert clinic.events_until(1) == (PoissonGaussian(0.1, 1.5, 6),)


def test_domains_that_were_charged_apart_count_each_others_charges(world: Any) -> None:
    """The same kind of step in both: what they count of it is the sum, not the greater."""
    served(world, apart(world), contract(world), 1, 2)
    served(world, apart(world), contract(world, "clinic"), 1, 2)
    assert steps(world) == {"ward": 4, "clinic": 4}
    served(world, together(world), contract(world, "clinic"), 1)
    assert steps(world) == {"ward": 10, "clinic": 10}
    served(world, together(world), contract(world), 1, 2)
    assert steps(world) == {"ward": 14, "clinic": 14}
    assert [kinds(world, name).count("joined") for name in ("ward", "clinic")] == [1, 1]


def test_a_contract_that_runs_while_its_domain_is_joined_counts_its_rounds_once(
    world: Any,
) -> None:
    signed = contract(world)
    served(world, apart(world), signed, 1, 2)
    served(world, together(world), signed, 3, 4)
    assert steps(world) == {"ward": 8, "clinic": 8}


def test_a_third_domain_brings_its_own_charges_and_gets_all(world: Any) -> None:
    served(world, apart(world), contract(world), 1)
    served(world, together(world), contract(world), 1)
    lab = DomainPolicy(epsilon=8.0, delta=1e-5)
    alone = world.policy(domains={**together(world).domains, "lab": lab})
    served(world, alone, contract(world, "lab"), 1, 2)
    assert steps(world) == {"ward": 4, "clinic": 4, "lab": 4}
    shared = lab.model_copy(update={"overlaps": ("clinic",)})
    every = world.policy(domains={**together(world).domains, "lab": shared})
    served(world, every, contract(world, "lab"), 1)
    assert steps(world) == {"ward": 10, "clinic": 10, "lab": 10}


def test_evaluations_that_were_charged_before_count_too(world: Any) -> None:
    asked = EvaluationTerms(every=1, noise_multiplier=4.0)
    served(world, apart(world, evaluation=True), contract(world, evaluation=asked), 1, 2)
    served(world, together(world, evaluation=True), contract(world), 1)
    found = verified(world)
    assert found["clinic"].chain.events == found["ward"].chain.events
    assert PoissonGaussian(1.0, 4.0, 2) in found["clinic"].chain.events


def test_what_was_charged_before_must_fit_the_domain_that_is_joined(world: Any) -> None:
    first = contract(world)
    served(world, world.policy(), first, 1, 2, 3)
    cost = {n: accounting.filter_epsilon([ROUND] * n, 1e-5, 8) for n in (7, 10)}
    between = (cost[7] + cost[10]) / 2  # room for a contract's attempts, not for three rounds more
    for limit, reason in ((between, Reason.BUDGET_EXHAUSTED), (cost[10] + 0.01, None)):
        clinic = DomainPolicy(epsilon=limit, delta=1e-5, composition=Filter(order=8))
        policy = world.policy(domains={**together(world).domains, "clinic": clinic})
        if reason is not None:
            assert refused(world, policy, contract(world)) is reason
        else:
            served(world, policy, contract(world), 1)


def test_domains_that_shared_examples_share_them_for_good(world: Any) -> None:
    signed = contract(world)
    served(world, together(world), signed, 1)
    gone = apart(world), world.policy()
    for policy in gone:
        gate = world.gate(policy=policy)
        with pytest.raises(UsageError, match=r"'ward' shared its examples with 'clinic', .* back"):
            gate.check_ledger()
        gate.ledger.close()
        assert refused(world, policy, contract(world)) is Reason.LEDGER_UNAVAILABLE
    served(world, together(world, clinic=9.0), signed, 2)
    assert steps(world) == {"ward": 4, "clinic": 4}


def of_persons(rows: int) -> DataTerms:
    """Returns a table in which a person has up to so many rows."""
    table = Table(
        columns=(Numeric(name="age", low=20, high=80),),
        target=Target(name="ill", classes=("no", "yes")),
        group="patient",
        rows_per_group=rows,
    )
    return DataTerms(name="table", shape=(1,), classes=2, preparation=table)


def test_a_persons_rows_are_those_of_joined_contracts_too(world: Any) -> None:
    named = {"person_column": "patient"}
    served(world, world.policy(domain=named), contract(world, data=of_persons(5)), 1)
    served(world, together(world, ward=named), contract(world, data=of_persons(2)), 1)
    bounds = {name: one.rows_per_person for name, one in verified(world).items()}
    assert bounds == {"ward": 5, "clinic": 5}
    assert {name: one.rows_kept for name, one in verified(world).items()} == dict.fromkeys(
        bounds, 2
    )


def rewritten(world: Any, edit: Any) -> None:
    """Has the site write its own entries anew, as `edit` returns their values, or leaves them out.

    The ledger is signed and linked as ever: what a dishonest site would show.
    """
    held = contents.read(world.ledger_path)
    world.ledger_path.unlink()
    with ledger.Ledger(world.ledger_path).transaction() as transaction:
        for (kind, sha256), text in held.documents.items():
            transaction.keep(kind, sha256, text)
        for (site, domain), rows in held.rows.items():
            chain = transaction.chain(site, domain, key=world.key.public)
            for _, text, _ in rows:
                values = edit(entries.body(text).model_dump())
                if values is None:
                    continue
                place = {
                    "sequence": chain.length,
                    "previous": chain.head.hash if chain.head else entries.NO_PREVIOUS,
                    "genesis": chain.genesis_hash or entries.NO_PREVIOUS,
                }
                body = type(entries.body(text)).model_validate({**values, **place})
                transaction.append(chain, body, world.key)


def smaller(values: dict[str, Any]) -> dict[str, Any]:
    if values["kind"] == "joined":
        values["events"] = [{**event, "steps": event["steps"] - 1} for event in values["events"]]
    return values


@pytest.mark.parametrize(
    "edit",
    [lambda values: None if values["kind"] == "joined" else values, smaller],
    ids=["left out", "a step less"],
)
def test_a_ledger_that_leaves_earlier_charges_out_is_refused(world: Any, edit: Any) -> None:
    served(world, world.policy(), contract(world), 1)
    served(world, together(world), contract(world), 1)
    rewritten(world, lambda values: values)
    assert steps(world) == {"ward": 4, "clinic": 4}
    rewritten(world, edit)
    with pytest.raises(VerificationFailed, match="'clinic': does not count what the domains that"):
        verified(world)


def test_the_next_contract_mends_a_ledger_that_left_them_out(world: Any) -> None:
    """As one does that was written before charges were joined."""
    served(world, world.policy(), contract(world), 1)
    served(world, together(world), contract(world), 1)
    rewritten(world, lambda values: None if values["kind"] == "joined" else values)
    served(world, together(world), contract(world), 1)
    assert steps(world) == {"ward": 6, "clinic": 6}


def test_a_policy_that_parts_domains_again_is_found_by_an_auditor(world: Any) -> None:
    parting, other = apart(world), contract(world)
    served(world, together(world), contract(world), 1)
    gate = world.gate(policy=together(world))
    with gate.ledger.transaction() as transaction:  # what no gate does
        transaction.keep("policy", parting.sha256, parting.to_bytes())
    permit = gate.admit(world.order(other))
    assert isinstance(permit, Permit)
    gate.ledger.close()

    def parted(values: dict[str, Any]) -> dict[str, Any] | None:
        if values.get("contract") == other.contract.sha256:
            return {**values, "policy": parting.sha256} if values["domain"] == "ward" else None
        return values

    rewritten(world, parted)
    with pytest.raises(VerificationFailed, match=r"entry 3: domain 'ward' shared its examples"):
        verified(world)
