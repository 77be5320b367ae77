"""What is changed, cut, reordered, spliced or signed anew is refused, in a ledger or its export.

`BRACT_CASES=1500 pytest tests/shared/privacy/test_falsified.py` tries over 10,000 in its seven
properties together; without it each tries fewer, so that a suite stays short.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from bract.shared import canonical, keys
from bract.shared.errors import BractError
from bract.shared.privacy import contents, entries, export, verification, witness
from bract.shared.privacy.contents import Contents
from bract.shared.privacy.entries import NO_PREVIOUS, Head
from bract.shared.terms import EvaluationTerms

CASES = int(os.environ.get("BRACT_CASES", "100"))
NAME = ("alpha", "ward")
BOUNDED = settings(
    max_examples=CASES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # one case refutes: no time for smaller ones
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# A failure shows its ledger, which is long.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
Row = tuple[int, bytes, bytes]


@dataclass(frozen=True)
class Record:
    """A verified ledger, another of the same site, and one of another site under the same name."""

    held: Contents
    again: Contents
    stranger: Contents
    key: str
    text: bytes

    @property
    def rows(self) -> list[Row]:
        return self.held.rows[NAME]

    @property
    def head(self) -> Head:
        number, text, _ = self.rows[-1]
        return Head(number, entries.hash_of(text))

    def with_rows(self, rows: list[Row]) -> Contents:
        return Contents({NAME: rows}, self.held.documents, self.held.witnesses)

    def accepts(self, held: Contents, anchor: Head | None = None) -> bool:
        try:
            verification.verify_contents(
                held, site_keys={"alpha": self.key}, anchors={NAME: anchor or self.head}
            )
        except BractError:
            return False
        return True

    def accepts_export(self, held: Contents, anchor: Head | None = None) -> bool:
        """Returns whether an export that a forger wrote, its heads and all, is accepted."""
        try:
            text = export.to_bytes(held)
        except BractError:
            return False
        return self.accepts_text(text, anchor)

    def accepts_text(self, text: bytes, anchor: Head | None = None) -> bool:
        try:
            held = export.from_bytes(text)
        except BractError:
            return False
        return self.accepts(held, anchor)


@pytest.fixture(scope="module")
def record(new_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Two runs of a site, one evaluated and with a crashed round, and witnessed in between."""
    coordinator, site, server = keys.generate(), keys.generate(), keys.generate()

    def made(key: keys.SigningKey) -> Contents:
        folder = tmp_path_factory.mktemp("record")
        world = new_world(folder=folder, coordinator=coordinator, key=key)
        gate = world.gate(policy=world.policy(evaluation=True, domain={"epsilon": 20.0}))
        first = world.contract(
            witness=server.public, evaluation=EvaluationTerms(every=2, noise_multiplier=4.0)
        )
        signed, seen = world.sign(first), None
        for number in (1, 2):
            gate.admit(replace(world.order(signed, number), witness=seen))
            reply = world.serve(gate, replace(world.order(signed, number), witness=seen))
            seen = witness.sign(*NAME, reply.receipt.head, server)
        world.serve(gate, replace(world.order(world.sign(world.contract()), 1)))
        gate.ledger.close()
        return contents.read(world.ledger_path)

    held = made(site)
    return Record(held, made(site), made(keys.generate()), site.public, export.to_bytes(held))


def test_what_the_forgeries_start_from_holds_and_so_does_its_export(record: Record) -> None:
    assert record.accepts(record.held)
    assert record.accepts_text(record.text)
    assert len(record.rows) == 11
    assert parts(export.from_bytes(record.text)) == parts(record.held)
    assert record.accepts(record.again, _head_of(record.again.rows[NAME]))
    kinds = {entries.body(text).kind for _, text, _ in record.rows}
    assert kinds == {"genesis", "charge", "evaluation", "release"}
    assert record.held.witnesses


def parts(held: Contents) -> Any:
    return held.rows, held.documents, held.witnesses


def _head_of(rows: list[Row]) -> Head:
    return Head(rows[-1][0], entries.hash_of(rows[-1][1]))


# A changed entry


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**40) | st.text(max_size=12) | st.floats(-2, 2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, nested ones too."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*path, name))
    return found


def near(old: Any, step: int, digit: str, other: Any) -> Any:
    """Returns a value that a forger would like to stand there."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + step
    if isinstance(old, str) and old:
        place = step % len(old)
        return old[:place] + digit + old[place + 1 :]
    return other


@BOUNDED
@given(
    number=st.integers(0, 10),
    place=st.integers(0, 40),
    action=st.sampled_from(["near", "any", "drop", "add"]),
    step=st.integers(-3, 64),
    digit=st.sampled_from("0123456789abcdef"),
    name=st.text(min_size=1, max_size=8),
    other=JSON,
)
def test_no_value_of_an_entry_can_be_changed(
    record: Record,
    number: int,
    place: int,
    action: str,
    step: int,
    digit: str,
    name: str,
    other: Any,
) -> None:
    sequence, text, signature = record.rows[number]
    body = json.loads(text)
    found = places(body)
    *path, last = found[place % len(found)]
    where = body
    for part in path:
        where = where[part]
    if action == "drop":
        del where[last]
    elif action == "add":
        where[name] = other
    else:
        where[last] = near(where[last], step, digit, other) if action == "near" else other
    forged = canonical.encode(body)
    assume(forged != text)
    rows = list(record.rows)
    rows[number] = (sequence, forged, signature)
    held = record.with_rows(rows)
    assert not record.accepts(held)
    assert not record.accepts_export(_named_as_told(held))


def _named_as_told(held: Contents) -> Contents:
    """Returns rows as an export would give them: each under the names that its body tells."""
    rows: dict[Any, list[Row]] = {}
    for _, text, signature in held.rows[NAME]:
        body = json.loads(text)
        name = (str(body.get("site")), str(body.get("domain")))
        rows.setdefault(name, []).append((body.get("sequence"), text, signature))
    return Contents(rows, held.documents, held.witnesses)


@BOUNDED
@given(data=st.data())
def test_no_byte_of_an_entry_or_a_signature_can_be_changed(
    record: Record, data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(record.rows) - 1))
    sequence, text, signature = record.rows[number]
    if data.draw(st.booleans()):
        text = data.draw(bytes_near(text))
    else:
        signature = data.draw(bytes_near(signature))
    rows = list(record.rows)
    rows[number] = (sequence, text, signature)
    assert not record.accepts(record.with_rows(rows))


@BOUNDED
@given(data=st.data())
def test_no_byte_of_an_export_can_be_changed(record: Record, data: st.DataObject) -> None:
    forged = data.draw(bytes_near(record.text))
    assert not record.accepts_text(forged)


def bytes_near(text: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that differ in one place: one changed, dropped, put in or said twice."""

    def changed(place: int, new: int, how: str) -> bytes:
        if how == "drop":
            return text[:place] + text[place + 1 :]
        if how == "insert":
            return text[:place] + bytes([new]) + text[place:]
        if how == "repeat":
            return text[: place + 8] + text[place:]
        return text[:place] + bytes([new]) + text[place + 1 :]

    actions = st.sampled_from(["change", "drop", "insert", "repeat"])
    made = st.builds(changed, st.integers(0, len(text) - 1), st.integers(0, 255), actions)
    return made.filter(lambda forged: forged != text)


# Entries cut, reordered, spliced


@BOUNDED
@given(data=st.data())
def test_nothing_below_the_anchor_can_be_cut(record: Record, data: st.DataObject) -> None:
    length = len(record.rows)
    kept = data.draw(st.integers(0, length - 1))
    anchored = data.draw(st.integers(kept, length - 1))
    anchor = Head(anchored, entries.hash_of(record.rows[anchored][1]))
    rows = record.rows[:kept]
    held = Contents({NAME: rows} if rows else {}, record.held.documents, record.held.witnesses)
    # What no entry names any more may be cut with it, and so may the witnesses.
    if data.draw(st.booleans()):
        named = {entries.body(text).policy for _, text, _ in rows}
        named |= {getattr(entries.body(text), "contract", "") for _, text, _ in rows}
        documents = {key: v for key, v in held.documents.items() if key[1] in named}
        held = Contents(held.rows, documents, {})
    assert not record.accepts(held, anchor)
    assert not record.accepts_export(held, anchor)


def numbered(rows: list[Row], again: bool) -> list[Row]:
    """Returns rows stored under the numbers of their places, or under their own."""
    return [(place if again else row[0], *row[1:]) for place, row in enumerate(rows)]


@BOUNDED
@given(data=st.data())
def test_entries_cannot_be_reordered_dropped_or_repeated(
    record: Record, data: st.DataObject
) -> None:
    length = len(record.rows)
    order = data.draw(
        st.permutations(range(length))
        | st.lists(st.integers(0, length - 1), min_size=1, max_size=length + 2)
        | st.integers(0, length - 1).map(lambda n: [i for i in range(length) if i != n])
        | st.integers(0, length - 2).map(lambda n: [*range(n), n + 1, n, *range(n + 2, length)])
    )
    assume(list(order) != list(range(length)))
    held = record.with_rows(numbered([record.rows[i] for i in order], data.draw(st.booleans())))
    assert not record.accepts(held)
    assert not record.accepts_export(_named_as_told(held))


@BOUNDED
@given(data=st.data())
def test_two_ledgers_cannot_be_spliced(record: Record, data: st.DataObject) -> None:
    """Of the same site and contracts' coordinator, or of another site that took its name."""
    source = data.draw(st.sampled_from([record.again, record.stranger]))
    other = source.rows[NAME]
    start = data.draw(st.integers(0, len(record.rows) - 1))
    stop = data.draw(st.integers(start + 1, len(record.rows)))
    into = data.draw(st.integers(0, len(other) - 1))
    taken = other[into : into + stop - start]
    rows = [*record.rows[:start], *taken, *record.rows[stop:]]
    assume(rows != other)
    documents = {**record.held.documents, **source.documents}
    chosen = documents if data.draw(st.booleans()) else record.held.documents
    spliced = Contents({NAME: numbered(rows, True)}, chosen, record.held.witnesses)
    assert not record.accepts(spliced)
    assert not record.accepts_export(_named_as_told(spliced))


def test_the_other_ledger_in_its_place_is_refused_by_the_anchor(record: Record) -> None:
    assert not record.accepts(record.again)
    assert not record.accepts(record.stranger)


# Signed anew


@BOUNDED
@given(data=st.data())
def test_entries_signed_by_another_key_are_refused(record: Record, data: st.DataObject) -> None:
    """From any entry on, linked anew, whether or not the bodies name the key that signed."""
    start = data.draw(st.integers(0, len(record.rows) - 1))
    key, names_it = keys.generate(), data.draw(st.booleans())
    rows, held = resigned(record.rows, start, key, names_it), record.held.documents
    witnesses = record.held.witnesses if data.draw(st.booleans()) else {}
    forged = Contents({NAME: rows}, held, witnesses)
    # The forger may have brought an anchor of their own.
    anchor = data.draw(st.sampled_from([record.head, _head_of(rows)]))
    assert not record.accepts(forged, anchor)
    assert not record.accepts_export(forged, anchor)


def resigned(rows: list[Row], start: int, key: keys.SigningKey, names_it: bool) -> list[Row]:
    previous, genesis = NO_PREVIOUS, NO_PREVIOUS
    made: list[Row] = []
    for number, text, signature in rows:
        if number >= start:
            values = json.loads(text) | {"previous": previous}
            values |= {"genesis": genesis} | ({"key": key.public} if names_it else {})
            entry = entries.write(entries.body(canonical.encode(values)), key)
            text, signature = entry.text, entry.signature
        made.append((number, text, signature))
        previous = entries.hash_of(text)
        genesis = previous if number == 0 else genesis
    return made


def test_the_same_by_the_pinned_key_holds_so_that_it_is_the_key_that_is_refused(
    record: Record, new_world: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = keys.generate()
    world = new_world(folder=tmp_path_factory.mktemp("own"), key=key)
    gate = world.gate()
    world.serve(gate, world.order(world.sign(world.contract())))
    gate.ledger.close()
    held = contents.read(world.ledger_path)
    rows = resigned(held.rows[NAME], 0, key, True)
    own = replace(record, held=held, key=key.public)
    assert own.accepts(Contents({NAME: rows}, held.documents, {}), _head_of(rows))
