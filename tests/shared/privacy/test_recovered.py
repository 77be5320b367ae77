"""A ledger that lost entries: its domain is closed at the most that it may have cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.client import installed
from bract.client.gate import Gate
from bract.shared import contract as contracts
from bract.shared import keys
from bract.shared.errors import Reason, Refusal, RolledBack, UsageError, VerificationFailed
from bract.shared.messages import TrainReply
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.privacy import (
    accounting,
    contents,
    entries,
    events,
    forecast,
    prv,
    verification,
)
from bract.shared.privacy.entries import Body, Charge, Head, Recovered
from bract.shared.privacy.events import PoissonGaussian, Spent, Unbounded
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.ledger import Ledger
from bract.shared.reports import schema
from bract.simulations.federations import loopback

Bract = Callable[..., Any]
STEP = PoissonGaussian(0.1, 1.5, 2)


# The event


def test_a_ceiling_is_the_whole_of_epsilon_whatever_else_is_on_record() -> None:
    for beside in ([], [STEP], [STEP, Spent(3.0)]):
        lost = [*beside, Spent(8.0)]
        assert accounting.epsilon(lost, 1e-5) == 8.0
        assert accounting.filter_epsilon(lost, 1e-5, 8) == 8.0
        assert accounting.lost(lost) == 8.0
        assert not accounting.fits(lost, limit=100.0, delta=1e-5, order=8)
        assert prv.epsilon_prv(lost, 1e-5) is None
    assert accounting.lost([STEP]) is None
    assert accounting.fits([STEP], limit=8.0, delta=1e-5, order=8)


def test_a_ceiling_bounds_nothing_where_a_release_had_no_noise() -> None:
    both = [Unbounded(), Spent(8.0)]
    assert accounting.epsilon(both, 1e-5) == float("inf")
    assert accounting.filter_epsilon(both, 1e-5, 8) == float("inf")
    assert prv.epsilon_prv(both, 1e-5) is None


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ceiling_out_of_range_cannot_be_made_or_read(value: float) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        Spent(value)
    with pytest.raises(VerificationFailed):
        events.decode({"type": "spent", "epsilon": value.hex()})


def test_a_ceiling_survives_the_codec_in_one_spelling() -> None:
    written = events.encode(Spent(8.1))
    assert events.decode(written) == Spent(8.1)
    for other in ({"type": "spent"}, {**written, "more": 1}, {**written, "epsilon": "0X1.0P+3"},
                  {**written, "epsilon": 8.1}):  # fmt: skip
        with pytest.raises(VerificationFailed):
            events.decode(other)


# The gate


@pytest.fixture
def recovered(world: Any) -> Any:
    """A site that served two rounds, lost the second's entries, and was recovered."""
    world.signed = world.sign(world.contract())
    gate = world.gate()
    world.first = world.serve(gate, world.order(world.signed, 1))
    gate.ledger.close()
    older = world.ledger_path.read_bytes()
    gate = world.gate()
    world.second = world.serve(gate, world.order(world.signed, 2))
    gate.ledger.close()
    world.ledger_path.write_bytes(older)
    world.lost = Head(world.second.receipt.head_sequence, world.second.receipt.head_hash)
    gate = world.gate()
    world.spent = gate.recover("ward", world.lost)
    gate.ledger.close()
    return world


def verify(world: Any, path: Path | None = None) -> verification.Verified:
    (found,) = verification.verify(
        path or world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    return found


def refused(gate: Gate, order: Any) -> Reason:
    with pytest.raises(Refusal) as refusal:
        gate.admit(order)
    return refusal.value.reason


def test_a_recovered_domain_has_spent_its_ceiling_and_says_what_was_lost(recovered: Any) -> None:
    assert recovered.spent == 8.0
    found = verify(recovered)
    chain = found.chain
    assert chain.recovered is not None
    assert (chain.recovered.lost_sequence, chain.recovered.lost_hash) == (
        recovered.lost.sequence,
        recovered.lost.hash,
    )
    assert accounting.epsilon(chain.events, 1e-5) == 8.0
    assert accounting.lost(chain.events) == 8.0
    limits = recovered.policy().domains["ward"]
    assert forecast.more_rounds(chain, limits, found.last_contract) == 0


def test_nothing_more_is_charged_to_a_recovered_domain_whatever_epsilon_is_allowed(
    recovered: Any,
) -> None:
    before = contents.read(recovered.ledger_path).rows
    for epsilon in (8.0, 800.0):
        gate = recovered.gate(policy=recovered.policy(domain={"epsilon": epsilon}))
        for signed, number in (
            (recovered.signed, 2),
            (recovered.signed, 3),
            (recovered.sign(recovered.contract(rounds=1, max_attempts=1)), 1),
        ):
            with pytest.raises(Refusal, match="lost entries") as refusal:
                gate.admit(recovered.order(signed, number))
            assert refusal.value.reason is Reason.BUDGET_EXHAUSTED
        gate.ledger.close()
    assert contents.read(recovered.ledger_path).rows == before
    assert recovered.opened == 0


def test_a_domain_that_shares_examples_with_a_recovered_one_is_closed_with_it(world: Any) -> None:
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=9.0, delta=1e-5),
        "garden": DomainPolicy(epsilon=9.0, delta=1e-5),
    }
    gate = world.gate(policy=world.policy(domains=domains))
    assert gate.recover("clinic", None) == 9.0
    agreed = world.contract()
    assert refused(gate, world.order(world.sign(agreed))) is Reason.BUDGET_EXHAUSTED
    elsewhere = agreed.cohort[0].model_copy(update={"domain": "garden"})
    world.serve(gate, world.order(world.sign(world.contract(cohort=(elsewhere,)))))
    gate.ledger.close()
    found = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    assert [one.chain.domain for one in found] == ["clinic", "garden"]


def test_what_was_released_before_is_still_sent_again_for_nothing(world: Any) -> None:
    gate, order = world.gate(), world.order(world.sign(world.contract()))
    first = world.serve(gate, order)
    gate.recover("ward", None)
    again = gate.admit(order)
    assert isinstance(again, TrainReply)
    assert again.receipt.update == first.receipt.update
    assert verify(world).chain.recovered is not None


def test_a_domain_is_recovered_once(recovered: Any) -> None:
    gate = recovered.gate()
    head = verify(recovered).chain.head
    for known in (None, head):
        with pytest.raises(UsageError, match="closed already"):
            gate.recover("ward", known)
    # The head file still names what was lost: the process ended before it could be told.
    assert gate.recover("ward", recovered.lost) == 8.0
    assert verify(recovered).chain.head == head


def test_an_epsilon_that_was_lowered_since_makes_no_lost_charge_smaller(world: Any) -> None:
    gate = world.gate(policy=world.policy(domain={"epsilon": 9.5}))
    world.serve(gate, world.order(world.sign(world.contract())))
    gate.ledger.close()
    low = world.policy(domain={"epsilon": 0.25})
    gate = world.gate(policy=low)
    assert gate.recover("ward", None) == 9.5
    gate.ledger.close()
    assert accounting.epsilon(verify(world).chain.events, 1e-5) == 9.5


def test_a_domain_that_was_never_charged_can_be_closed_too(world: Any) -> None:
    gate = world.gate()
    assert gate.recover("ward", Head(7, "ab" * 32)) == 8.0
    assert refused(gate, world.order(world.sign(world.contract()))) is Reason.BUDGET_EXHAUSTED
    gate.ledger.close()
    chain = verify(world).chain
    assert chain.length == 2
    assert accounting.epsilon(chain.events, 1e-5) == 8.0


# What a dishonest site could write


def forged(world: Any, made: type[Any], **changes: Any) -> Path:
    """Returns the ledger with one more entry, which the site signed, past its gate."""
    path: Path = world.folder / "copy.sqlite"
    shutil.copyfile(world.ledger_path, path)
    gate = world.gate(ledger=Ledger(path))
    with gate.ledger.transaction() as transaction:
        chain = transaction.chain("alpha", "ward", key=world.key.public)
        facts: dict[str, Any] = {"kind": made.__name__.lower(), **changes}
        body: Body = made.model_validate(
            {**gate.book.common(chain, facts.pop("attempt", 0)), **facts}
        )
        entry = entries.write(body, world.key)
        transaction._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?)",
            ("alpha", "ward", chain.length, entry.text.decode(), entry.signature),
        )
        transaction.keep("policy", world.policy().sha256, world.policy().to_bytes())
    gate.ledger.close()
    return path


def closing(epsilon: float, **changes: Any) -> dict[str, Any]:
    lost = {"lost_sequence": None, "lost_hash": None}
    return {**lost, "event": events.encode(Spent(epsilon)), **changes}


def a_charge(world: Any) -> dict[str, Any]:
    held = contents.read(world.ledger_path).rows["alpha", "ward"]
    bodies = [json.loads(text) for _, text, _ in held]
    charge = next(body for body in bodies if body["kind"] == "charge")
    fields = set(Charge.model_fields) - set(Recovered.model_fields) | {"kind", "event"}
    return {name: value for name, value in charge.items() if name in fields}


def test_a_charge_after_the_loss_is_refused_by_the_verifier(recovered: Any) -> None:
    for changes in ({"round": 2, "attempt": 1}, {"round": 1, "attempt": 2}):
        path = forged(recovered, Charge, **{**a_charge(recovered), **changes})
        with pytest.raises(VerificationFailed, match="a charge after entries were lost"):
            verify(recovered, path)


def test_that_charge_holds_where_nothing_was_lost_so_that_it_fails_for_the_loss(world: Any) -> None:
    gate = world.gate()
    world.serve(gate, world.order(world.sign(world.contract())))
    gate.ledger.close()
    path = forged(world, Charge, **{**a_charge(world), "round": 2, "attempt": 1})
    assert verify(world, path).chain.length == 4


@pytest.fixture
def served(world: Any) -> Any:
    """A site that served one round; nothing was lost."""
    gate = world.gate()
    world.serve(gate, world.order(world.sign(world.contract())))
    gate.ledger.close()
    return world


@pytest.mark.parametrize("epsilon", [1e-9, 0.1, 7.99])
def test_a_loss_below_what_the_policy_allowed_is_refused_by_the_verifier(
    served: Any, epsilon: float
) -> None:
    """Else one cheap entry would hide whatever the charges before it cost."""
    assert verify(served, forged(served, Recovered, **closing(8.0)))
    path = forged(served, Recovered, **closing(epsilon))
    with pytest.raises(VerificationFailed, match="under what its policies allowed"):
        verify(served, path)


def test_a_loss_below_what_an_earlier_policy_allowed_is_refused_too(world: Any) -> None:
    high: Policy = world.policy(domain={"epsilon": 9.5})
    gate = world.gate(policy=high)
    world.serve(gate, world.order(world.sign(world.contract())))
    gate.ledger.close()
    with pytest.raises(VerificationFailed, match="under what its policies allowed"):
        verify(world, forged(world, Recovered, **closing(8.0)))
    assert verify(world, forged(world, Recovered, **closing(9.5)))


def test_a_second_loss_cannot_lower_the_first(recovered: Any) -> None:
    for epsilon in (8.0, 0.1):
        path = forged(recovered, Recovered, **closing(epsilon))
        with pytest.raises(VerificationFailed, match="recovered a second time"):
            verify(recovered, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"event": events.encode(STEP)},
        {"event": events.encode(Unbounded())},
        {"event": {"type": "spent"}},
        {"lost_sequence": 3},
        {"lost_hash": "ab" * 32},
    ],
    ids=["steps", "unbounded", "no event", "a number alone", "a hash alone"],
)
def test_a_loss_of_another_form_is_refused_by_the_verifier(
    served: Any, changes: dict[str, Any]
) -> None:
    with pytest.raises(VerificationFailed):
        verify(served, forged(served, Recovered, **closing(8.0, **changes)))


def test_a_charge_cannot_cost_a_ceiling(served: Any) -> None:
    changes = {"round": 2, "attempt": 1, "event": events.encode(Spent(8.0))}
    path = forged(served, Charge, **{**a_charge(served), **changes})
    with pytest.raises(VerificationFailed, match="charges a ceiling"):
        verify(served, path)


# The command, on a site as it is laid out


def process(layout: loopback.Layout) -> Gate:
    """Returns the gate of the site, as a process that starts opens it."""
    chosen = installed.settings.read(layout.site("alpha"))
    return installed._gate(chosen, installed.head_file_of(chosen))


def serve(world: Any, layout: loopback.Layout, *rounds: int) -> None:
    gate, signed = process(layout), contracts.read(layout.contract)
    for number in rounds:
        world.serve(gate, world.order(signed, number))
    gate.ledger.close()


def put_back(layout: loopback.Layout, older: bytes | None) -> None:
    if older is None:
        layout.ledger("alpha").unlink()
    else:
        layout.ledger("alpha").write_bytes(older)


@pytest.mark.parametrize("lost", ["tail", "file"])
def test_a_site_whose_ledger_lost_entries_is_recovered_by_its_operator(
    world: Any, layout: loopback.Layout, bract: Bract, lost: str
) -> None:
    serve(world, layout, 1)
    older = layout.ledger("alpha").read_bytes() if lost == "tail" else None
    serve(world, layout, 2)
    put_back(layout, older)
    gate = process(layout)
    with pytest.raises(RolledBack):
        gate.check_ledger()
    gate.ledger.close()

    done = bract("client", str(layout.site("alpha")), "--recover", "alpha", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, schema("client-recover"))
    assert report == {"domain": "alpha", "epsilon": 8.0}

    gate = process(layout)
    gate.check_ledger()
    order = world.order(contracts.read(layout.contract), 3)
    assert refused(gate, order) is Reason.BUDGET_EXHAUSTED
    gate.ledger.close()
    site = layout.site("alpha").parent
    key = keys.load(site / "ledger.pem").public
    words = (str(layout.ledger("alpha")), "--site-key", key)
    audited = bract("audit", "verify", *words, "--head", str(site / "head.json"))
    assert "anchored" in audited.stdout
    spent = json.loads(bract("audit", "budget", *words, "--json").stdout)["domains"][0]
    facts = {name: spent[name] for name in ("epsilon", "epsilon_prv", "left", "limit")}
    assert facts == {"epsilon": 8.0, "epsilon_prv": None, "left": 0.0, "limit": 8.0}
    assert "entries were lost" in spent["note"]
    told = json.loads(bract("client", str(layout.site("alpha")), "--status", "--json").stdout)
    assert (told["domains"]["alpha"]["epsilon"], told["domains"]["alpha"]["left"]) == (8.0, 0.0)


def test_a_recovery_that_was_killed_before_the_head_file_goes_on(
    world: Any, layout: loopback.Layout, bract: Bract
) -> None:
    serve(world, layout, 1)
    older = layout.ledger("alpha").read_bytes()
    serve(world, layout, 2)
    put_back(layout, older)
    heads = layout.site("alpha").parent / "head.json"
    before = heads.read_bytes()
    words = ("client", str(layout.site("alpha")), "--recover", "alpha")
    assert bract(*words).returncode == 0
    length = len(contents.read(layout.ledger("alpha")).rows["alpha", "alpha"])
    heads.write_bytes(before)
    with pytest.raises(RolledBack):
        process(layout).check_ledger()
    done = bract(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "counts as spent" in done.stdout
    process(layout).check_ledger()
    assert len(contents.read(layout.ledger("alpha")).rows["alpha", "alpha"]) == length
    again = bract(*words)
    assert (again.returncode, "closed already" in again.stderr) == (2, True)


def test_an_epsilon_that_was_put_back_with_the_ledger_is_known_by_the_head_file(
    world: Any, layout: loopback.Layout, bract: Bract
) -> None:
    serve(world, layout, 1)
    toml, older = layout.site("alpha"), layout.ledger("alpha").read_bytes()
    settings = toml.read_text()
    assert settings.count("epsilon = 8.0") == 1
    toml.write_text(settings.replace("epsilon = 8.0", "epsilon = 11.5"))
    serve(world, layout, 2)  # charged where 11.5 was allowed
    put_back(layout, older)
    toml.write_text(settings)
    done = bract("client", str(toml), "--recover", "alpha")
    assert (done.returncode, "ε 11.5 counts as spent" in done.stdout) == (0, True)
    key = keys.load(toml.parent / "ledger.pem").public
    said = bract("audit", "verify", str(layout.ledger("alpha")), "--site-key", key).stdout
    assert "entries were lost: its whole ceiling counts as spent" in said


def test_each_domain_that_lost_entries_is_recovered_for_itself(
    world: Any, layout: loopback.Layout, bract: Bract
) -> None:
    toml = layout.site("alpha")
    more = (
        '\n[domains.garden]\nepsilon = 5.0\ndelta = 1e-5\ndata = {name = "digits", part = "2/10"}'
    )
    toml.write_text(toml.read_text() + more)
    gate = process(layout)
    gate.recover("garden", None)  # something that both domains' heads are kept of
    gate.ledger.close()
    serve(world, layout, 1)
    layout.ledger("alpha").unlink()
    assert bract("client", str(toml), "--recover", "alpha").returncode == 0
    with pytest.raises(RolledBack, match="'garden'"):
        process(layout).check_ledger()
    assert bract("client", str(toml), "--recover", "garden").returncode == 0
    process(layout).check_ledger()
    heads = HeadFile(toml.parent / "head.json").read()
    assert {domain for _, domain in heads} == {"alpha", "garden"}


def test_a_domain_that_does_not_exist_names_the_nearest(
    layout: loopback.Layout, bract: Bract
) -> None:
    done = bract("client", str(layout.site("alpha")), "--recover", "alpa")
    assert done.returncode == 2
    assert "unknown domain 'alpa': did you mean 'alpha'?" in done.stderr
    assert not layout.ledger("alpha").exists()
    both = bract("client", str(layout.site("alpha")), "--recover", "alpha", "--status")
    assert (both.returncode, "one at a time" in both.stderr) == (2, True)
