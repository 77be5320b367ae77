"""Witnesses: what a server may see of a ledger, and that no other ledger leads to the same head."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.client.permits import Permit
from bract.shared import canonical, keys
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, Refusal, RolledBack, VerificationFailed
from bract.shared.keys import SigningKey
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import contents, entries, ledger, verification, witness
from bract.shared.privacy.entries import NO_PREVIOUS, Charge, Genesis, Head, Release
from bract.shared.privacy.witness import Extension, Link, Witness

KEY, OTHER, SITE = keys.generate(), keys.generate(), keys.generate()
WARD = ("alpha", "ward")
HEAD = Head(sequence=4, hash="ab" * 32)


def facts(**changes: Any) -> dict[str, Any]:
    return {**witness.sign("alpha", "ward", HEAD, KEY).model_dump(mode="json"), **changes}


# The countersignature


def test_a_witness_holds_by_the_pinned_key_and_by_no_other() -> None:
    seen = witness.sign("alpha", "ward", HEAD, KEY)
    seen.verify(KEY.public)
    assert seen.head == HEAD
    assert witness.from_bytes(seen.to_bytes()) == seen
    for key in (OTHER.public, "", "0" * 64):
        with pytest.raises(VerificationFailed, match="another key"):
            seen.verify(key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", "beta"),
        ("domain", "clinic"),
        ("sequence", 5),
        ("hash", "ac" * 32),
        ("signature", "0" * 128),
    ],
)
def test_a_witness_changed_in_any_fact_does_not_hold(name: str, value: Any) -> None:
    forged = witness.from_bytes(canonical.encode(facts(**{name: value})))
    with pytest.raises(VerificationFailed, match="signature"):
        forged.verify(KEY.public)


def test_a_witness_signed_by_another_under_the_pinned_name_does_not_hold() -> None:
    forged = witness.sign("alpha", "ward", HEAD, OTHER).model_copy(update={"key": KEY.public})
    with pytest.raises(VerificationFailed, match="signature"):
        forged.verify(KEY.public)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'"\\ud800"',
        canonical.encode(facts(more=1)),
        canonical.encode(facts(sequence=-1)),
        canonical.encode(facts(sequence=2**63)),
        canonical.encode(facts(sequence="4")),
        canonical.encode(facts(sequence=4.0)),
        canonical.encode(facts(sequence=True)),
        canonical.encode(facts(schema_version=2)),
        canonical.encode(facts(hash="AB" * 32)),
        canonical.encode({k: v for k, v in facts().items() if k != "schema_version"}),
        json.dumps(facts()).encode(),
        canonical.encode(facts()) + b"\n",
    ],
    ids=[
        "nothing", "no facts", "a list", "null", "no text", "half a character", "a further fact",
        "before the first", "beyond a table", "number as text", "number as a fraction",
        "number as truth", "another schema", "upper case", "a fact missing", "spaces", "a line end",
    ],
)  # fmt: skip
def test_what_is_no_witness_or_a_second_spelling_of_one_is_refused(text: bytes) -> None:
    assert witness.from_bytes(canonical.encode(facts()))
    with pytest.raises(VerificationFailed):
        witness.from_bytes(text)


# What a server follows


def _bodies() -> list[bytes]:
    """Returns the bodies of a chain of two runs: genesis, then charge and release of each."""
    common = {"schema_version": 1, "site": "alpha", "key": SITE.public, "domain": "ward",
              "policy": "d" * 64}  # fmt: skip
    genesis = {"kind": "genesis", "nonce": "0" * 32, "simulation": False, "unit": "example",
               "adjacency": "add-or-remove-one", "delta": (1e-5).hex(), "attempt": 0,
               "composition": {"rule": "filter", "order": 8}}  # fmt: skip
    charge = {"kind": "charge", "attempt": 1, "run": "trial", "round": 1, "primary": "ward",
              "weights": "e" * 64, "event": {"type": "unbounded"}, "clip_norm": (1.0).hex(),
              "clipping": "flat-l2", "normaliser": (1.0).hex(), "sampler": "poisson",
              "mechanism": "dp-sgd", "randomness": "csprng", "versions": {}}  # fmt: skip
    release = {"kind": "release", "attempt": 1, "round": 1, "update": "f" * 64}
    ours, theirs = {"contract": "1" * 64}, {"contract": "2" * 64}
    written, previous, first = [], NO_PREVIOUS, NO_PREVIOUS
    parts = [genesis, charge | theirs, release | theirs, charge | ours, release | ours]
    for number, part in enumerate(parts):
        kind: Any = {"genesis": Genesis, "charge": Charge, "release": Release}[part["kind"]]
        place = {"sequence": number, "previous": previous, "genesis": first}
        entry = entries.write(kind.model_validate({**common, **part, **place}), SITE)
        written.append(entry.text)
        previous, first = entry.hash, entry.hash if number == 0 else first
    return written


BODIES = _bodies()
OURS, THEIRS = "1" * 64, "2" * 64


def last(extension: Extension) -> Head:
    """Returns the head that an extension leads to."""
    heads = [head for head, _ in witness.follow(extension)]
    return heads[-1]


TRUE = Head(len(BODIES) - 1, entries.hash_of(BODIES[-1]))


def seen_at(number: int) -> Witness:
    return witness.sign("alpha", "ward", Head(number, entries.hash_of(BODIES[number])), KEY)


@pytest.mark.parametrize("number", range(-1, 4))
def test_links_after_any_witness_lead_to_the_same_head(number: int) -> None:
    since = seen_at(number) if number >= 0 else None
    extension = witness.show(since, BODIES[number + 1 :], contract=OURS)
    assert last(extension) == TRUE
    numbers = [head.sequence for head, _ in witness.follow(extension)]
    assert numbers == list(range(number + 1, len(BODIES)))


def test_nothing_after_a_witness_is_nothing_to_follow() -> None:
    assert list(witness.follow(witness.show(seen_at(4), [], contract=OURS))) == []
    assert list(witness.follow(witness.NOTHING)) == []


def test_bodies_are_shown_for_one_run_and_for_no_other() -> None:
    for contract, shown in ((OURS, [3, 4]), (THEIRS, [1, 2]), ("3" * 64, []), ("", [])):
        extension = witness.show(None, BODIES, contract=contract)
        bodies = [number for number, link in enumerate(extension.links) if link.body]
        assert bodies == shown
        kinds = [type(body) for _, body in witness.follow(extension) if body is not None]
        assert kinds == ([Charge, Release] if shown else [])
        for number, link in enumerate(extension.links):
            assert link.body in (b"", BODIES[number])
            assert link.body_hash == entries.body_hash(BODIES[number])


def test_what_is_shown_of_another_run_is_a_hash_and_none_of_its_words() -> None:
    other = witness.show(None, BODIES, contract="3" * 64)
    told = repr(other).encode()
    for word in (b"trial", b"genesis", b"composition", SITE.public.encode(), OURS.encode()):
        assert word not in told


Change = st.tuples(
    st.sampled_from(["body", "hash", "swap", "cut", "repeat", "splice", "hide and change"]),
    st.integers(0, len(BODIES) - 1),
    st.integers(0, len(BODIES) - 1),
    st.integers(0, 10_000),
    st.integers(1, 255),
)


def changed(links: Sequence[Link], change: tuple[str, int, int, int, int]) -> list[Link]:
    """Returns links with one thing altered; the same where it alters nothing."""
    kind, at, to, place, bits = change
    found, link = list(links), links[at]
    if kind == "swap":
        found[at], found[to] = found[to], found[at]
    elif kind == "cut":
        del found[at]
    elif kind == "repeat":
        found.insert(to, link)
    elif kind == "splice":
        found[at] = links[to]
    elif kind == "hash":
        flipped = bytearray(link.body_hash)
        flipped[place % 32] ^= bits
        found[at] = replace(link, body_hash=bytes(flipped))
    else:
        text = bytearray(link.body or BODIES[at])
        text[place % len(text)] ^= bits
        body = bytes(text)
        hidden = Link(entries.body_hash(body), b"")
        found[at] = hidden if kind == "hide and change" else replace(link, body=body)
    return found


@settings(max_examples=300, deadline=None)
@given(change=Change)
def test_any_change_of_body_order_cut_or_splice_leads_to_no_head_that_was_signed(
    change: tuple[str, int, int, int, int],
) -> None:
    whole = witness.show(None, BODIES, contract=OURS)
    links = changed(whole.links, change)
    same = links == list(whole.links)
    try:
        found = last(Extension(since=None, links=tuple(links)))
    except VerificationFailed:
        assert not same
        return
    assert (found == TRUE) == same


@given(number=st.integers(0, 3), other=st.integers(-1, 3))
def test_links_lead_to_the_head_from_the_witness_they_follow_alone(number: int, other: int) -> None:
    since = seen_at(other) if other >= 0 else None
    extension = replace(
        witness.show(seen_at(number), BODIES[number + 1 :], contract=OURS), since=since
    )
    try:
        found = last(extension)
    except VerificationFailed:
        found = None  # a shown body names the place where it stands
    assert (found == TRUE) == (number == other)


def test_a_shown_body_names_the_place_where_it_stands() -> None:
    for places in ((1,), (0, 2), (0, 0), (0, 1, 1)):
        shown = tuple(Link(entries.body_hash(BODIES[at]), BODIES[at]) for at in places)
        with pytest.raises(VerificationFailed, match="another place"):
            list(witness.follow(Extension(since=None, links=shown)))


def test_a_body_that_is_no_entry_is_refused_though_its_hash_fits() -> None:
    for text in (b"{}", b"x", canonical.encode({**json.loads(BODIES[3]), "more": 1})):
        link = Link(entries.body_hash(text), text)
        with pytest.raises(VerificationFailed):
            list(witness.follow(Extension(since=None, links=(link,))))


# Witnesses at rest in a ledger


@pytest.fixture
def witnessed(world: Any) -> Any:
    """A site that served three rounds of a contract; its second reply's head was countersigned."""
    world.server = keys.generate()
    world.agreed = world.contract(witness=world.server.public)
    gate, signed = world.gate(), world.sign(world.agreed)
    world.signed = signed
    for number in (1, 2):
        world.reply = world.serve(gate, world.order(signed, number))
    world.seen = countersigned(world)
    world.serve(gate, replace(world.order(signed, 3), witness=world.seen))
    gate.ledger.close()
    return world


def countersigned(world: Any, **changes: Any) -> Witness:
    receipt = world.reply.receipt
    facts = {"site": "alpha", "domain": "ward", "key": world.server, **changes}
    head = facts.pop("head", Head(receipt.head_sequence, receipt.head_hash))
    return witness.sign(facts["site"], facts["domain"], head, facts["key"])


def verify(
    world: Any, path: Path | None = None, server: SigningKey | None = None
) -> verification.Verified:
    (found,) = verification.verify(
        path or world.ledger_path,
        site_keys={"alpha": world.key.public},
        anchors={},
        witness_keys=[(server or world.server).public],
    )
    return found


def edited(world: Any, statement: str, values: Sequence[Any] = ()) -> Path:
    path: Path = world.folder / "copy.sqlite"
    shutil.copyfile(world.ledger_path, path)
    connection = sqlite3.connect(path)
    changed = connection.execute(statement, values).rowcount
    connection.commit()
    connection.close()
    assert changed
    return path


def test_a_verifier_says_up_to_which_entry_a_ledger_was_witnessed(witnessed: Any) -> None:
    assert verify(witnessed).witnessed == witnessed.reply.receipt.head_sequence == 4
    bare = edited(witnessed, "DELETE FROM witnesses")
    assert verify(witnessed, bare).witnessed is None


def test_only_what_a_pinned_key_countersigned_counts(witnessed: Any) -> None:
    """A second run has its own server; it may be the site itself, who can be anybody's server."""
    other = keys.generate()
    signed = witnessed.sign(witnessed.contract(witness=other.public))
    gate = witnessed.gate()
    reply = witnessed.serve(gate, witnessed.order(signed))
    receipt = reply.receipt
    head = Head(receipt.head_sequence, receipt.head_hash)
    gate.keep_witness(signed, witness.sign("alpha", "ward", head, other))
    gate.ledger.close()
    assert len(contents.read(witnessed.ledger_path).witnesses) == 2
    assert verify(witnessed, server=other).witnessed == receipt.head_sequence == 8
    assert verify(witnessed).witnessed == 4
    assert verify(witnessed, server=keys.generate()).witnessed is None


@pytest.mark.parametrize("column", ["site", "domain", "key"])
def test_a_witness_kept_under_another_name_is_refused(witnessed: Any, column: str) -> None:
    value = {"site": "beta", "domain": "clinic", "key": OTHER.public}[column]
    path = edited(witnessed, f"UPDATE witnesses SET {column} = ?", [value])  # noqa: S608
    with pytest.raises(VerificationFailed, match="a witness of another chain"):
        verify(witnessed, path)


def forged(world: Any, case: str) -> bytes:
    seen: Witness = world.seen
    match case:
        case "another head":
            return countersigned(world, head=Head(4, "0" * 64)).to_bytes()
        case "beyond the end":
            return countersigned(world, head=Head(40, seen.hash)).to_bytes()
        case "a changed number":
            return seen.model_copy(update={"sequence": 3}).to_bytes()
        case "no signature":
            return seen.model_copy(update={"signature": "0" * 128}).to_bytes()
        case "another spelling":
            return json.dumps(seen.model_dump(mode="json")).encode()
        case "another type":
            return canonical.encode({**seen.model_dump(mode="json"), "sequence": "4"})
    return b"{}"


@pytest.mark.parametrize(
    "case",
    [
        "another head",
        "beyond the end",
        "a changed number",
        "no signature",
        "another spelling",
        "another type",
        "no witness",
    ],
)
def test_a_witness_that_was_altered_at_rest_is_refused_by_auditor_and_site(
    witnessed: Any, case: str
) -> None:
    text = forged(witnessed, case).decode()
    path = edited(witnessed, "UPDATE witnesses SET body = ?", [text])
    with pytest.raises(VerificationFailed):
        verify(witnessed, path)
    with pytest.raises(VerificationFailed):
        witnessed.gate(ledger=ledger.Ledger(path)).check_ledger()


def test_a_witness_by_a_key_that_no_contract_names_is_refused(witnessed: Any) -> None:
    stranger = countersigned(witnessed, key=OTHER)
    insert = "INSERT INTO witnesses VALUES ('alpha', 'ward', ?, ?)"
    path = edited(witnessed, insert, [OTHER.public, stranger.to_bytes().decode()])
    with pytest.raises(VerificationFailed, match="by a key that no contract names"):
        verify(witnessed, path)


def test_every_value_of_every_table_is_in_a_signed_body_or_compared(witnessed: Any) -> None:
    """Each column of each row, changed alone: nothing in the file is beside the point."""
    connection = sqlite3.connect(witnessed.ledger_path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
    columns = {
        (table, column[1])
        for table in tables
        for column in connection.execute(f"PRAGMA table_info({table})")
    }
    connection.close()
    assert {table for table, _ in columns} == {"entries", "witnesses", "documents"}
    verify(witnessed)
    for table, column in sorted(columns):
        change = {"sequence": f"{column} + 70", "signature": "zeroblob(64)"}.get(
            column, f"{column} || 'x'"
        )
        path = edited(witnessed, f"UPDATE {table} SET {column} = {change}")  # noqa: S608
        with pytest.raises(VerificationFailed):
            verify(witnessed, path)


# What a site does with them


def cut(world: Any, last: int) -> Path:
    """Returns the ledger as it was after an entry, its witnesses of that time with it."""
    path = edited(world, "DELETE FROM entries WHERE sequence > ?", [last])
    return path


def refused(call: Any) -> Reason:
    with pytest.raises(Refusal) as refusal:
        call()
    return refusal.value.reason


def test_a_ledger_put_back_is_refused_by_a_new_process_through_the_witness_it_holds(
    witnessed: Any,
) -> None:
    whole = witnessed.gate(ledger=ledger.Ledger(cut(witnessed, 4)))
    whole.check_ledger()  # the witness is of entry 4: an unwitnessed tail may be gone
    gate = witnessed.gate(ledger=ledger.Ledger(cut(witnessed, 3)))
    with pytest.raises(RolledBack, match="restore the newest copy"):
        gate.check_ledger()
    before = contents.read(gate.ledger.path).rows
    order = witnessed.order(witnessed.sign(witnessed.contract()), 1)
    assert refused(lambda: gate.admit(order)) is Reason.LEDGER_ROLLED_BACK
    assert contents.read(gate.ledger.path).rows == before
    assert witnessed.opened == 0


@pytest.mark.parametrize("lost", ["tail", "file"])
def test_a_ledger_put_back_is_refused_by_the_witness_that_an_order_brings(
    witnessed: Any, lost: str
) -> None:
    path = edited(witnessed, "DELETE FROM witnesses")
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM entries WHERE sequence > ?", [2 if lost == "tail" else -1])
    connection.commit()
    connection.close()
    gate = witnessed.gate(ledger=ledger.Ledger(path))
    gate.check_ledger()  # alone the site cannot know
    before = contents.read(path).rows
    order = replace(witnessed.order(witnessed.signed, 3), witness=witnessed.seen)
    assert refused(lambda: gate.admit(order)) is Reason.LEDGER_ROLLED_BACK
    close = lambda: gate.keep_witness(witnessed.signed, witnessed.seen)  # noqa: E731
    assert refused(close) is Reason.LEDGER_ROLLED_BACK
    assert contents.read(path).rows == before
    # the negative control: without the witness nothing would have been noticed
    assert isinstance(gate.admit(replace(order, witness=None)), Permit)


def test_a_witness_that_the_contracts_key_did_not_sign_is_refused_before_the_ledger(
    witnessed: Any,
) -> None:
    gate, order = witnessed.gate(), witnessed.order(witnessed.signed, 4)
    before = contents.read(witnessed.ledger_path).rows
    for seen in (
        countersigned(witnessed, key=OTHER),
        countersigned(witnessed, site="beta"),
        countersigned(witnessed, domain="clinic"),
        witnessed.seen.model_copy(update={"sequence": 1}),
        countersigned(witnessed, key=OTHER).model_copy(update={"key": witnessed.server.public}),
    ):
        assert refused(lambda: gate.admit(replace(order, witness=seen))) is Reason.WITNESS_INVALID  # noqa: B023
        assert refused(lambda: gate.keep_witness(witnessed.signed, seen)) is Reason.WITNESS_INVALID  # noqa: B023
    assert contents.read(witnessed.ledger_path).rows == before
    assert isinstance(gate.admit(replace(order, witness=witnessed.seen)), Permit)


def test_a_contract_without_a_witness_takes_no_witness_at_all(world: Any) -> None:
    gate, signed = world.gate(), world.sign(world.contract())
    head = Head(0, "0" * 64)
    for key in (world.coordinator, world.key, OTHER):
        order = replace(world.order(signed), witness=witness.sign("alpha", "ward", head, key))
        assert refused(lambda: gate.admit(order)) is Reason.WITNESS_INVALID  # noqa: B023


def test_an_older_witness_neither_replaces_the_newer_nor_is_refused(witnessed: Any) -> None:
    gate = witnessed.gate()
    older = countersigned(witnessed, head=Head(2, entry_hash(witnessed, 2)))
    reply = witnessed.serve(gate, replace(witnessed.order(witnessed.signed, 4), witness=older))
    assert reply.ledger.since == witnessed.seen
    held = contents.read(witnessed.ledger_path).witnesses
    assert held == {("alpha", "ward", witnessed.server.public): witnessed.seen.to_bytes()}


def entry_hash(world: Any, number: int) -> str:
    rows = contents.read(world.ledger_path).rows[WARD]
    return entries.hash_of(rows[number][1])


def test_a_refused_order_keeps_no_witness(witnessed: Any) -> None:
    gate = witnessed.gate()
    newest = countersigned(witnessed, head=Head(6, entry_hash(witnessed, 6)))
    order = replace(witnessed.order(witnessed.signed, 2, fill=0.5), witness=newest)
    assert refused(lambda: gate.admit(order)) is Reason.WEIGHTS_CHANGED
    (text,) = contents.read(witnessed.ledger_path).witnesses.values()
    assert text == witnessed.seen.to_bytes()


def test_a_witness_of_a_run_that_charged_nothing_here_is_not_kept(witnessed: Any) -> None:
    """Kept, its key would be one that no contract in the ledger names: nothing would verify."""
    other = keys.generate()
    signed: SignedContract = witnessed.sign(witnessed.contract(witness=other.public))
    seen = countersigned(witnessed, key=other)
    gate = witnessed.gate()
    assert refused(lambda: gate.keep_witness(signed, seen)) is Reason.WITNESS_INVALID
    assert verify(witnessed).witnessed == 4


# What a reply shows


def test_a_reply_shows_what_its_ledger_grew_by_since_the_last_witness(witnessed: Any) -> None:
    gate = witnessed.gate()
    reply = witnessed.serve(gate, witnessed.order(witnessed.signed, 4))
    assert reply.ledger.since == witnessed.seen
    numbers = [head.sequence for head, _ in witness.follow(reply.ledger)]
    assert numbers == [5, 6, 7, 8]
    head = Head(reply.receipt.head_sequence, reply.receipt.head_hash)
    assert last(reply.ledger) == head == Head(8, entry_hash(witnessed, 8))
    gate.keep_witness(witnessed.signed, countersigned(witnessed, head=head))
    again = gate.admit(witnessed.order(witnessed.signed, 4))
    assert again.ledger.links == ()  # type: ignore[union-attr]
    assert again.ledger.since.head == head  # type: ignore[union-attr]


def test_a_reply_shows_no_body_of_another_run_nor_of_another_domain(witnessed: Any) -> None:
    gate = witnessed.gate()
    signed = witnessed.sign(witnessed.contract(run="another", witness=OTHER.public))
    reply = witnessed.serve(gate, witnessed.order(signed))
    assert reply.ledger.since is None  # the other server's witness is not this one's affair
    shown = {head.sequence: body for head, body in witness.follow(reply.ledger) if body}
    assert sorted(shown) == [7, 8]
    assert {body.contract for body in shown.values()} == {signed.contract.sha256}  # type: ignore[union-attr]
    assert len(reply.ledger.links) == 9
    assert b"trial" not in repr(reply.ledger).encode()


def test_with_domains_that_share_examples_the_links_are_of_the_contracts_own(world: Any) -> None:
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=9.0, delta=1e-5),
    }
    gate = world.gate(policy=world.policy(domains=domains))
    server = keys.generate()
    signed = world.sign(world.contract(witness=server.public))
    reply = world.serve(gate, world.order(signed))
    assert {body.domain for _, body in witness.follow(reply.ledger) if body} == {"ward"}
    assert reply.receipt.head_domain == "ward"
