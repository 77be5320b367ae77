"""The witness desk: a ledger only grows, pays before it releases, and is countersigned when saved.

Real gates answer; what is forged is what a site, which holds its own key, could sign.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bract.client.gate import Gate
from bract.server.witnesses import WitnessDesk
from bract.shared import arrays, canonical, keys
from bract.shared.errors import RolledBack, VerificationFailed
from bract.shared.messages import TrainReply
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import entries, witness
from bract.shared.privacy.entries import Head
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.receipts import Receipt
from bract.shared.privacy.witness import Extension, Link, Witness
from bract.shared.updates import ProtectedUpdate


@pytest.fixture
def town(world: Any) -> Any:
    """A site and a server whose key its contract names as the witness."""
    world.server = keys.generate()
    world.agreed = world.contract(witness=world.server.public)
    world.signed = world.sign(world.agreed)
    world.desk = WitnessDesk(world.server)
    world.site = world.gate()
    return world


def asked(town: Any, number: int, *, gate: Gate | None = None) -> TrainReply:
    """Returns the site's answer to an order as the desk would have it sent."""
    order = replace(town.order(town.signed, number), witness=town.desk.witness("alpha"))
    reply: TrainReply = town.serve(gate or town.site, order)
    return reply


def check(town: Any, reply: TrainReply, desk: WitnessDesk | None = None) -> None:
    (desk or town.desk).check(reply, "ward", town.agreed)


def heads(reply: TrainReply) -> dict[str, dict[str, Any]]:
    receipt = reply.receipt
    return {
        receipt.site: {
            "domain": receipt.head_domain,
            "sequence": receipt.head_sequence,
            "hash": receipt.head_hash,
        }
    }


def test_round_after_round_a_ledger_grows_and_is_countersigned(town: Any) -> None:
    for number in range(1, 5):
        reply = asked(town, number)
        check(town, reply)
        since = reply.ledger.since
        assert (since.sequence if since else None) == (2 * number - 2 if number > 1 else None)
        town.desk.remember(heads(reply))
        seen = town.desk.witness("alpha")
        assert seen is not None
        seen.verify(town.server.public)
        assert seen.head == Head(reply.receipt.head_sequence, reply.receipt.head_hash)


def test_nothing_is_countersigned_before_it_is_remembered(town: Any) -> None:
    check(town, asked(town, 1))
    assert town.desk.witness("alpha") is None
    first = asked(town, 2)
    town.desk.remember(heads(first))
    later = asked(town, 3)
    check(town, later)
    seen = town.desk.witness("alpha")
    assert seen is not None
    assert seen.sequence == first.receipt.head_sequence < later.receipt.head_sequence
    assert town.desk.witness("beta") is None
    assert town.desk.witness(None) is None
    assert town.desk.witness("") is None


def test_without_a_key_nothing_is_countersigned_and_nothing_asked(town: Any) -> None:
    reply, bare = asked(town, 1), WitnessDesk(None)
    bare.remember(heads(reply))
    assert bare.witness("alpha") is None
    check(town, replace(reply, ledger=witness.NOTHING), bare)


def test_a_site_that_missed_a_witness_or_two_still_extends_what_was_seen(town: Any) -> None:
    first = asked(town, 1)
    town.desk.remember(heads(first))
    second = asked(town, 2)  # this order brought a witness
    town.desk.remember(heads(second))
    # The third order's witness was lost on its way: the site shows more than was needed.
    third = town.serve(town.site, town.order(town.signed, 3))
    assert third.ledger.since.head == Head(first.receipt.head_sequence, first.receipt.head_hash)
    check(town, third)


def test_a_server_that_forgot_takes_what_the_sites_witness_says(town: Any) -> None:
    town.desk.remember(heads(asked(town, 1)))
    second = asked(town, 2)
    check(town, second, WitnessDesk(town.server))


def test_a_stored_update_that_is_sent_again_is_taken(town: Any) -> None:
    first = asked(town, 1)
    check(town, first)
    # The server was killed before it saved the round: it asks again and knows nothing of it.
    again = town.site.admit(town.order(town.signed, 1))
    assert isinstance(again, TrainReply)
    assert again.receipt == first.receipt
    check(town, again)
    town.desk.remember(heads(first))
    second = asked(town, 2)
    after = town.site.admit(replace(town.order(town.signed, 2), witness=town.desk.witness("alpha")))
    assert isinstance(after, TrainReply)
    assert after.receipt == second.receipt
    check(town, after)


@pytest.mark.parametrize("fill", [0.0, 0.5], ids=["stored still", "stored no more"])
def test_a_round_asked_again_after_another_run_charged_the_domain_is_taken(
    town: Any, fill: float
) -> None:
    first = asked(town, 1)
    other = town.sign(town.contract(run="another"))
    town.serve(town.site, town.order(other, fill=fill))
    again = asked(town, 1, gate=town.gate()) if fill else town.site.admit(town.order(town.signed))
    # Only the latest bytes are stored: without them the round is trained and charged anew.
    assert again.receipt.attempt == first.receipt.attempt + (1 if fill else 0)
    assert b"another" not in repr(again.ledger).encode()
    check(town, again)


def test_a_ledger_that_was_put_back_is_refused(town: Any) -> None:
    first = asked(town, 1)
    older = town.ledger_path.read_bytes()
    second = asked(town, 2)
    town.desk.remember(heads(second))
    copy = town.folder / "older.sqlite"
    copy.write_bytes(older)
    gate = town.gate(ledger=Ledger(copy))
    reply = town.serve(gate, town.order(town.signed, 3))  # no witness warned the site
    with pytest.raises(RolledBack, match="does not extend what was witnessed"):
        check(town, reply)
    anew = town.gate(ledger=Ledger(town.folder / "anew.sqlite"))
    with pytest.raises(RolledBack):
        check(town, town.serve(anew, town.order(town.signed, 3)))
    town.desk.remember(heads(first))
    check(town, reply)  # the negative control: of the older state it is the extension


# What a site that holds its own key could sign


def resigned(town: Any, reply: TrainReply, **changes: Any) -> TrainReply:
    """Returns a reply whose receipt says something else, signed by the site."""
    facts = {name: getattr(reply.receipt, name) for name in Receipt.__dataclass_fields__}
    receipt = Receipt(**{**facts, **changes})
    return replace(reply, receipt=receipt, signature=town.key.sign(receipt.digest()))


def led(town: Any, reply: TrainReply, links: list[Link], since: Witness | None) -> TrainReply:
    """Returns a reply whose links are others and whose head is where they lead."""
    extension = Extension(since=since, links=tuple(links))
    previous = since.hash if since else entries.NO_PREVIOUS
    for link in links:
        previous = entries.link(previous, link.body_hash)
    number = (since.sequence if since else -1) + len(links)
    forged = resigned(town, reply, head_sequence=number, head_hash=previous)
    return replace(forged, ledger=extension)


def hidden(link: Link) -> Link:
    return replace(link, body=b"")


def body(link: Link, **changes: Any) -> Link:
    text = canonical.encode({**json.loads(link.body), **changes})
    return Link(entries.body_hash(text), text)


def test_the_links_as_the_site_gave_them_are_taken_so_that_forgeries_fail_for_theirs(
    town: Any,
) -> None:
    reply = asked(town, 1)
    check(town, led(town, reply, list(reply.ledger.links), None))


FORGED: dict[str, Any] = {
    "no links": lambda links: [],
    "no charge": lambda links: [links[0], links[2]],
    "no release": lambda links: links[:2],
    "a charge that is not shown": lambda links: [links[0], hidden(links[1]), links[2]],
    "a release that is not shown": lambda links: [links[0], links[1], hidden(links[2])],
    "a release before its charge": lambda links: [links[0], links[2], links[1]],
    "a charge of another round": lambda links: [links[0], body(links[1], round=2), links[2]],
    "a charge of another attempt": lambda links: [links[0], body(links[1], attempt=2), links[2]],
    "a charge of another domain": lambda links: [
        links[0], body(links[1], domain="clinic"), links[2]],
    "a charge of another site": lambda links: [links[0], body(links[1], site="beta"), links[2]],
    "a charge of another run": lambda links: [
        links[0], body(links[1], contract="a" * 64), links[2]],
    "a cheaper charge": lambda links: [
        links[0],
        body(links[1], event={**json.loads(links[1].body)["event"], "steps": 1}),
        links[2]],
    "a release of another update": lambda links: [
        links[0], links[1], body(links[2], update="a" * 64)],
    "a release of another round": lambda links: [links[0], links[1], body(links[2], round=2)],
    "a body that was changed": lambda links: [
        links[0], replace(links[1], body=links[1].body.replace(b"trial", b"trick")), links[2]],
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_links_without_the_updates_charge_before_its_release_are_refused(
    town: Any, case: str
) -> None:
    reply = asked(town, 1)
    forged = led(town, reply, FORGED[case](list(reply.ledger.links)), None)
    forged.verify(town.key.public)  # the site signed it
    with pytest.raises(VerificationFailed):
        check(town, forged)


@pytest.mark.parametrize(
    "changes",
    [{"head_hash": "a" * 64}, {"head_sequence": 1}, {"head_sequence": 3}, {"head_domain": "x"}],
    ids=["hash", "lower", "higher", "domain"],
)
def test_a_head_to_which_the_links_do_not_lead_is_refused(
    town: Any, changes: dict[str, Any]
) -> None:
    reply = asked(town, 1)
    with pytest.raises(VerificationFailed):
        check(town, resigned(town, reply, **changes))


@pytest.mark.parametrize("case", ["cut", "swapped", "repeated", "another hash"])
def test_links_other_than_the_signed_heads_are_refused(town: Any, case: str) -> None:
    reply = asked(town, 1)
    links = list(reply.ledger.links)
    changed = {
        "cut": links[1:],
        "swapped": [links[1], links[0], links[2]],
        "repeated": [links[0], *links],
        "another hash": [replace(links[0], body_hash=bytes(32)), *links[1:]],
    }[case]
    with pytest.raises(VerificationFailed):
        check(town, replace(reply, ledger=Extension(since=None, links=tuple(changed))))


def test_a_witness_that_this_server_did_not_give_for_this_ledger_starts_nothing(
    town: Any,
) -> None:
    town.desk.remember(heads(asked(town, 1)))
    reply = asked(town, 2)
    since = reply.ledger.since
    assert since is not None
    given = {
        "another key": witness.sign("alpha", "ward", since.head, keys.generate()),
        "another site": witness.sign("beta", "ward", since.head, town.server),
        "another domain": witness.sign("alpha", "clinic", since.head, town.server),
        "changed": since.model_copy(update={"sequence": 0}),
        "a later head": since.model_copy(update={"hash": "a" * 64}),
    }
    for other in given.values():
        with pytest.raises(VerificationFailed):
            check(town, replace(reply, ledger=replace(reply.ledger, since=other)))
    check(town, reply)


def test_a_charge_in_a_chain_that_is_not_the_contracts_is_no_charge(world: Any) -> None:
    """Both chains hold the charge; the receipt must be of the one that the contract names."""
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=9.0, delta=1e-5),
    }
    server = keys.generate()
    agreed = world.contract(witness=server.public)
    gate = world.gate(policy=world.policy(domains=domains))
    reply = world.serve(gate, world.order(world.sign(agreed)))
    desk = WitnessDesk(server)
    desk.check(reply, "ward", agreed)
    with pytest.raises(VerificationFailed, match="another domain"):
        desk.check(reply, "clinic", agreed)
    with gate.ledger.transaction() as transaction:
        bodies = transaction.bodies_after("alpha", "clinic", -1)
    shown = witness.show(None, bodies, contract=agreed.sha256)
    forged = led(world, reply, list(shown.links), None)
    with pytest.raises(VerificationFailed, match="no charge"):
        desk.check(forged, "ward", agreed)


def test_a_ledger_that_was_put_back_between_two_runs_is_refused_in_the_second(
    town: Any, tmp_path: Path
) -> None:
    kept = HeadFile(tmp_path / "heads.json")
    first = WitnessDesk(town.server, kept)
    backup = tmp_path / "backup.sqlite"
    for number in (1, 2):
        order = replace(town.order(town.signed, number), witness=first.witness("alpha"))
        reply = town.serve(town.site, order)
        check(town, reply, first)
        first.remember(heads(reply))
        if number == 1:
            first_reply = reply
            town.site.ledger.copy_to(backup)

    def second_run(gate: Gate) -> None:
        agreed = town.contract(witness=town.server.public)  # by another nonce
        reply = town.serve(gate, town.order(town.sign(agreed)))
        WitnessDesk(town.server, kept).check(reply, "ward", agreed)

    restored = town.gate(ledger=Ledger(backup))
    with pytest.raises(RolledBack, match="does not extend what was witnessed"):
        second_run(restored)
    second_run(town.site)
    # A file that is older than what this server countersigned starts no alarm.
    kept.write({("alpha", "ward"): Head(2, heads(first_reply)["alpha"]["hash"])})
    reply = asked(town, 3)
    assert reply.ledger.since is None or reply.ledger.since.sequence >= 2
    check(town, reply, WitnessDesk(town.server, kept))


def test_a_run_goes_on_after_another_of_the_same_server_went_further(town: Any) -> None:
    """Its desk knows an older head than the site can show links from."""
    first = WitnessDesk(town.server)
    reply = asked(town, 1)
    check(town, reply, first)
    first.remember(heads(reply))
    between, other = WitnessDesk(town.server), town.contract(witness=town.server.public)
    signed = town.sign(other)
    for number in (1, 2):
        order = replace(town.order(signed, number), witness=between.witness("alpha"))
        served = town.serve(town.site, order)
        between.check(served, "ward", other)
        between.remember(heads(served))
    town.site.keep_witness(signed, between.witness("alpha"))
    order = replace(town.order(town.signed, 2), witness=first.witness("alpha"))
    check(town, town.serve(town.site, order), first)


def test_the_update_is_the_one_that_was_released(town: Any) -> None:
    reply = asked(town, 1)
    other = {name: value + 1 for name, value in reply.update.arrays.items()}
    swapped = replace(
        resigned(town, reply, update=arrays.digest(other)), update=ProtectedUpdate(other)
    )
    swapped.verify(town.key.public)
    with pytest.raises(VerificationFailed, match="no charge stands before"):
        check(town, swapped)
