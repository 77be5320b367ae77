"""Every way to falsify a ledger that its format is meant to show, done to copies of a real one."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bract.shared import canonical, keys
from bract.shared import contract as contracts
from bract.shared.cli import bract as command
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.policy import DomainPolicy, Menu, MenuClass, Policy
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.privacy import (
    accounting,
    conformity,
    contents,
    entries,
    events,
    ledger,
    verification,
)
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import NO_PREVIOUS, Body, Charge, Genesis, Head, Release
from bract.shared.terms import DataTerms, EvaluationTerms

WARD, CLINIC = ("alpha", "ward"), ("alpha", "clinic")
Edit = Callable[[dict[str, Any]], dict[str, Any] | None]


@pytest.fixture
def audited(world: Any) -> Any:
    """A site that served two rounds, crashed in the third and served it again: eight entries."""
    world.agreed = world.contract()
    gate, signed = world.gate(), world.sign(world.agreed)
    for number in (1, 2):
        world.serve(gate, world.order(signed, number))
    gate.admit(world.order(signed, 3))
    world.reply = world.serve(gate, world.order(signed, 3))
    gate.ledger.close()
    return world


@pytest.fixture
def shared(world: Any) -> Any:
    """A site whose two domains share examples, and a contract on one of them."""
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=9.0, delta=1e-5),
    }
    gate, signed = world.gate(policy=world.policy(domains=domains)), world.sign(world.contract())
    for number in (1, 2):
        world.serve(gate, world.order(signed, number))
    gate.ledger.close()
    return world


def verify(
    world: Any, path: Path | None = None, anchors: Mapping[tuple[str, str], Head] | None = None
) -> list[verification.Verified]:
    return verification.verify(
        path or world.ledger_path, site_keys={"alpha": world.key.public}, anchors=anchors or {}
    )


def head(world: Any) -> Head:
    return Head(world.reply.receipt.head_sequence, world.reply.receipt.head_hash)


def edited(
    world: Any, *statements: str | tuple[str, tuple[Any, ...]], source: Path | None = None
) -> Path:
    """Returns a copy of the ledger, altered behind its back."""
    path = world.folder / "copy.sqlite"
    shutil.copyfile(source or world.ledger_path, path)
    connection = sqlite3.connect(path)
    for statement in statements:
        sql, values = (statement, ()) if isinstance(statement, str) else statement
        connection.execute(sql, [_stored(value) for value in values])
    connection.commit()
    connection.close()
    return path


def _stored(value: Any) -> Any:
    """Returns a body as the text it is stored as; a signature has 64 bytes and stays."""
    return value.decode() if isinstance(value, bytes) and len(value) != 64 else value


def rows(path: Path, name: tuple[str, str] = WARD) -> list[tuple[int, bytes, bytes]]:
    return contents.read(path).rows[name]


def put(number: int, text: bytes, signature: bytes) -> tuple[str, tuple[Any, ...]]:
    statement = "UPDATE entries SET body = ?, signature = ? WHERE sequence = ? AND domain = 'ward'"
    return statement, (text, signature, number)


def rewritten(
    world: Any, edit: Edit, *, key: keys.SigningKey | None = None, documents: Any = ()
) -> Path:
    """Returns a copy whose entries were edited, linked and signed anew: a dishonest site's own.

    `edit` returns the values of a body, or None to leave the entry out.
    """
    statements: list[Any] = ["DELETE FROM entries"]
    for site, domain in contents.read(world.ledger_path).rows:
        previous, genesis, sequence = NO_PREVIOUS, NO_PREVIOUS, 0
        for _, text, _ in rows(world.ledger_path, (site, domain)):
            values = edit(json.loads(text))
            if values is None:
                continue
            values |= {"previous": previous, "genesis": genesis, "sequence": sequence}
            body = entries.body(canonical.encode(values))
            entry = entries.write(body, key or world.key)
            insert = "INSERT INTO entries VALUES (?, ?, ?, ?, ?)"
            row = (site, domain, sequence, entry.text, entry.signature)
            statements.append((insert, row))
            previous, sequence = entry.hash, sequence + 1
            genesis = genesis if genesis != NO_PREVIOUS else entry.hash
    return edited(world, *statements, *documents)


def in_charges(**changes: Any) -> Edit:
    """Returns an edit of the charges alone; a change may be a function of the old value."""

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        if values["kind"] == "charge":
            for name, new in changes.items():
                values[name] = new(values[name]) if callable(new) else new
        return values

    return edit


def under(policy: Policy) -> tuple[Edit, list[Any]]:
    """Returns an edit and a document that put every entry under another policy."""

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "policy": policy.sha256}

    text = policy.to_bytes()
    change = "UPDATE documents SET sha256 = ?, body = ? WHERE kind = 'policy'"
    return edit, [(change, (policy.sha256, text))]


def test_a_real_ledger_holds_with_and_without_an_anchor(audited: Any) -> None:
    (free,), (tied,) = verify(audited), verify(audited, anchors={WARD: head(audited)})
    assert (free.anchor, tied.anchor) == (None, 7)
    assert tied.chain.head == head(audited)
    assert tied.chain.length == 8
    assert tied.policy == audited.policy()
    (event,) = tied.chain.events
    assert isinstance(event, events.PoissonGaussian)
    assert event.steps == 4 * 2  # a crashed round is charged again
    assert tied.chain.attempts == {audited.agreed.sha256: 4}


def test_an_honest_rewriting_verifies_so_that_the_forgeries_fail_for_their_forgery(
    audited: Any,
) -> None:
    (found,) = verify(audited, rewritten(audited, lambda values: values))
    assert found.chain.head == head(audited)


FIELDS = [
    (number, name)
    for number, kind in enumerate((Genesis, Charge, Release))
    for name in kind.model_fields
]


@pytest.mark.parametrize(("number", "name"), FIELDS)
def test_a_body_changed_in_any_field_is_shown_by_its_number(
    audited: Any, number: int, name: str
) -> None:
    _, text, signature = rows(audited.ledger_path)[number]
    body = json.loads(text)
    old = body[name]
    if isinstance(old, bool):
        body[name] = not old
    elif isinstance(old, int):
        body[name] = old + 1
    elif isinstance(old, str):
        body[name] = old[:-1] + ("1" if old[-1] != "1" else "2")
    elif old is None:
        body[name] = [(1.0).hex(), (2.0).hex()]
    else:
        body[name] = {**old, "more": "x"}
    path = edited(audited, put(number, canonical.encode(body), signature))
    with pytest.raises(VerificationFailed, match=rf"'ward', entry {number}: "):
        verify(audited, path)


@pytest.mark.parametrize("number", range(8))
def test_a_second_spelling_of_the_same_body_is_refused(audited: Any, number: int) -> None:
    _, text, signature = rows(audited.ledger_path)[number]
    path = edited(audited, put(number, json.dumps(json.loads(text)).encode(), signature))
    with pytest.raises(VerificationFailed, match=f"entry {number}: not canonical"):
        verify(audited, path)


def test_a_cut_tail_is_refused_against_an_anchor_and_not_excluded_without_one(
    audited: Any,
) -> None:
    path = edited(audited, "DELETE FROM entries WHERE sequence = 7")
    with pytest.raises(VerificationFailed, match="ends at entry 6 but the anchor names entry 7"):
        verify(audited, path, {WARD: head(audited)})
    (found,) = verify(audited, path)
    assert (found.chain.length, found.anchor) == (7, None)


def test_an_older_anchor_holds_and_another_history_does_not(audited: Any) -> None:
    _, text, signature = rows(audited.ledger_path)[4]
    older = entries.read(text, signature, key=audited.key.public).hash
    assert verify(audited, anchors={WARD: Head(4, older)})[0].anchor == 4
    with pytest.raises(VerificationFailed, match="entry 5: is not the entry that the anchor names"):
        verify(audited, anchors={WARD: Head(5, older)})


@pytest.mark.parametrize("anchor", [Head(-1, "0" * 64), Head(8, "0" * 64)])
def test_an_anchor_that_names_no_entry_anchors_nothing(audited: Any, anchor: Head) -> None:
    with pytest.raises(VerificationFailed, match="the anchor names entry"):
        verify(audited, anchors={WARD: anchor})


def test_a_domain_that_the_anchor_names_cannot_be_left_out(shared: Any) -> None:
    (clinic, _) = verify(shared)
    assert clinic.chain.domain == "clinic"
    anchors = {("alpha", "garden"): clinic.chain.head}
    with pytest.raises(VerificationFailed, match="no domain 'garden', but the anchor names it"):
        verify(shared, anchors=anchors)
    # another site's anchor is of another file
    assert len(verify(shared, anchors={("beta", "ward"): clinic.chain.head})) == 2


@pytest.mark.parametrize(
    ("statements", "number"),
    [
        (["DELETE FROM entries WHERE sequence = 0"], 0),
        (["DELETE FROM entries WHERE sequence = 3"], 3),
        (["DELETE FROM entries WHERE sequence IN (3, 4)"], 3),
        (
            [
                "DELETE FROM entries WHERE sequence = 3",
                "UPDATE entries SET sequence = sequence - 1 WHERE sequence > 3",
            ],
            3,
        ),
        (
            [
                "UPDATE entries SET sequence = -1 WHERE sequence = 3",
                "UPDATE entries SET sequence = 3 WHERE sequence = 4",
                "UPDATE entries SET sequence = 4 WHERE sequence = -1",
            ],
            3,
        ),
        (["UPDATE entries SET sequence = 70 WHERE sequence = 7"], 70),
        (
            [
                "INSERT INTO entries SELECT site, domain, 8, body, signature"
                " FROM entries WHERE sequence = 7"
            ],
            8,
        ),
    ],
    ids=["genesis", "middle", "two", "renumbered", "swapped", "numbered", "repeated"],
)
def test_entries_dropped_or_reordered_are_shown_by_number(
    audited: Any, statements: list[str], number: int
) -> None:
    with pytest.raises(VerificationFailed, match=rf"entry {number}\b"):
        verify(audited, edited(audited, *statements))


def test_an_entry_of_another_ledger_cannot_be_spliced_in(audited: Any) -> None:
    folder = audited.folder / "other"
    folder.mkdir()
    for key, numbers, fault in (
        (keys.generate(), (0, 1, 2), "another key than the pinned"),
        (audited.key, (2,), "does not follow"),
    ):
        other = type(audited)(folder=folder, coordinator=audited.coordinator, key=key)
        other.ledger_path.unlink(missing_ok=True)
        gate = other.gate()
        other.serve(gate, other.order(other.sign(other.contract())))
        gate.ledger.close()
        for number in numbers:
            _, text, signature = rows(other.ledger_path)[number]
            path = edited(audited, put(number, text, signature))
            with pytest.raises(VerificationFailed, match=f"entry {number}: .*{fault}"):
                verify(audited, path)


@pytest.mark.parametrize("names_it", [True, False])
def test_a_chain_signed_again_by_another_key_is_refused(audited: Any, names_it: bool) -> None:
    other = keys.generate()

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "key": other.public} if names_it else values

    path = rewritten(audited, edit, key=other)
    fault = "another key than the pinned" if names_it else "signature does not verify"
    with pytest.raises(VerificationFailed, match=f"entry 0: .*{fault}"):
        verify(audited, path)


def test_a_chain_kept_under_another_name_is_refused(audited: Any) -> None:
    for change in ("UPDATE entries SET site = 'beta'", "UPDATE entries SET domain = 'clinic'"):
        path = edited(audited, change)
        pinned = {"alpha": audited.key.public, "beta": audited.key.public}
        with pytest.raises(VerificationFailed, match="entry 0: belongs to the"):
            verification.verify(path, site_keys=pinned, anchors={})


def document(world: Any, kind: str) -> tuple[str, bytes]:
    held = contents.read(world.ledger_path).documents
    return next((sha256, text) for (of, sha256), text in held.items() if of == kind)


@pytest.mark.parametrize("kind", ["contract", "policy"])
def test_documents_missing_altered_or_exchanged_are_refused_by_hash(
    audited: Any, kind: str
) -> None:
    sha256, text = document(audited, kind)
    other = {
        "contract": lambda: audited.sign(audited.contract()).to_bytes(),
        "policy": lambda: audited.policy(models=("linear",)).to_bytes(),
    }[kind]()
    change = "UPDATE documents SET body = ? WHERE kind = ?"
    for forged in (
        other,
        text.replace(b"8.0", b"9.0"),
        text.replace(b'"rounds":5', b'"rounds":6'),
        text.replace(b'"linear"', b'"nonlinear"'),
        text + b" ",
        b"{}",
        b"",
    ):
        if forged != text:
            with pytest.raises(VerificationFailed, match=f"{kind} {sha256}: "):
                verify(audited, edited(audited, (change, (forged, kind))))
    missing = edited(audited, ("DELETE FROM documents WHERE kind = ?", (kind,)))
    with pytest.raises(VerificationFailed, match=f"{kind} {sha256} .*missing"):
        verify(audited, missing)


def test_a_contract_that_its_coordinator_did_not_sign_is_refused(audited: Any) -> None:
    sha256, text = document(audited, "contract")
    value = json.loads(text)
    value["signature"] = audited.sign(audited.contract()).signature
    change = "UPDATE documents SET body = ? WHERE kind = 'contract'"
    with pytest.raises(VerificationFailed, match=f"contract {sha256}: signature"):
        verify(audited, edited(audited, (change, (canonical.encode(value),))))


def test_a_document_that_no_entry_names_is_refused(audited: Any) -> None:
    contract, policy = audited.sign(audited.contract()), audited.policy(models=("linear",))
    insert = "INSERT INTO documents VALUES (?, ?, ?)"
    for kind, sha256, text in (
        ("contract", contract.contract.sha256, contract.to_bytes()),
        ("policy", policy.sha256, policy.to_bytes()),
    ):
        path = edited(audited, (insert, (kind, sha256, text)))
        with pytest.raises(VerificationFailed, match=f"{kind} {sha256} is stored but no entry"):
            verify(audited, path)
    path = edited(audited, (insert, ("note", "a" * 64, b"{}")))
    with pytest.raises(VerificationFailed, match=r"note a+: unknown kind"):
        verify(audited, path)


def fewer(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "steps": event["steps"] - 1}


def quieter(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "noise_multiplier": (9.0).hex()}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"event": fewer}, "event is not the contract's"),
        ({"event": quieter}, "event is not the contract's"),
        ({"clip_norm": (0.5).hex()}, "clip_norm is not the contract's"),
        ({"clipping": "none"}, "clipping is not the contract's"),
        ({"normaliser": (1.0).hex()}, "normaliser is not the contract's"),
        ({"run": "another"}, "run is not the contract's"),
        ({"round": lambda number: number + 5}, "round . is over the contract's 5"),
        ({"primary": "clinic"}, "does not list this site, key and domain"),
        ({"randomness": "seeded"}, "seeded or without noise on a real ledger"),
    ],
)
def test_a_charge_that_departs_from_its_contract_is_refused_though_the_site_signed_it(
    audited: Any, changes: dict[str, Any], fault: str
) -> None:
    def edit(values: dict[str, Any]) -> dict[str, Any] | None:
        return None if values["kind"] == "release" else in_charges(**changes)(values)

    with pytest.raises(VerificationFailed, match=f"entry 1: .*{fault}"):
        verify(audited, rewritten(audited, edit))


@pytest.mark.parametrize(
    ("limits", "fault"),
    [
        ({"min_noise_multiplier": 2.0}, r"policy-noise"),
        ({"max_sampling_rate": 0.01}, r"policy-sampling"),
        ({"models": ("cnn",)}, r"policy-model"),
        ({"mechanisms": ("none",)}, r"policy-mechanism"),
        ({"coordinators": ("a" * 64,)}, "coordinator is not in the policy"),
        ({"site": "beta"}, "of another site or domain"),
        ({"domains": {"clinic": DomainPolicy(epsilon=8, delta=1e-5)}}, "another site or domain"),
        ({"domain": {"epsilon": 0.5}}, "over the policy's epsilon 0.5"),
        ({"domain": {"delta": 1e-6}}, "fixed delta"),
        ({"domain": {"composition": {"rule": "filter", "order": 3}}}, "another composition rule"),
    ],
)
def test_charges_that_their_policy_does_not_allow_are_refused_though_the_site_signed_them(
    audited: Any, limits: dict[str, Any], fault: str
) -> None:
    edit, documents = under(audited.policy(**limits))
    with pytest.raises(VerificationFailed, match=fault):
        verify(audited, rewritten(audited, edit, documents=documents))


def test_charges_by_a_column_of_persons_stand_unless_their_policy_names_another(
    world: Any,
) -> None:
    """A policy of an earlier version could name none."""
    table = Table(
        columns=(Numeric(name="age", low=20, high=80),),
        target=Target(name="ill", classes=("no", "yes")),
        group="patient",
    )
    data = DataTerms(name="table", shape=(1,), classes=2, preparation=table)
    gate = world.gate(policy=world.policy(domain={"person_column": "patient"}))
    world.serve(gate, world.order(world.sign(world.contract(data=data))))
    gate.ledger.close()
    edit, documents = under(world.policy())
    (found,) = verify(world, rewritten(world, edit, documents=documents))
    assert found.rows_per_person == 1
    edit, documents = under(world.policy(domain={"person_column": "ward"}))
    with pytest.raises(VerificationFailed, match=r"policy-domain"):
        verify(world, rewritten(world, edit, documents=documents))


def test_a_ceiling_that_is_raised_after_it_was_passed_does_not_hide_that(audited: Any) -> None:
    low = audited.policy(domain={"epsilon": 0.5})
    used = {json.loads(text)["sequence"] for _, text, _ in rows(audited.ledger_path)[:4]}

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "policy": low.sha256} if values["sequence"] in used else values

    insert = "INSERT INTO documents VALUES ('policy', ?, ?)"
    path = rewritten(audited, edit, documents=[(insert, (low.sha256, low.to_bytes()))])
    with pytest.raises(
        VerificationFailed, match=r"up to entry \d are over the policy's epsilon 0.5"
    ):
        verify(audited, path)


@pytest.mark.parametrize(
    "composition",
    [
        {"rule": "filter"},
        {"rule": "filter", "order": None},
        {"rule": "filter", "order": 1},
        {"rule": "filter", "order": "8"},
        {"rule": "filter", "order": 8, "more": 1},
        {"rule": "menu", "classes": []},
        {},
    ],
)
def test_a_genesis_without_a_sound_rule_is_refused_though_the_site_signed_it(
    audited: Any, composition: dict[str, Any]
) -> None:
    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "composition": composition} if values["kind"] == "genesis" else values

    with pytest.raises(VerificationFailed, match="another composition rule at genesis"):
        verify(audited, rewritten(audited, edit))


def test_steps_beyond_a_menus_cap_are_refused_though_the_site_signed_them(audited: Any) -> None:
    def menu(steps: int) -> Policy:
        listed = MenuClass(sampling_rate=0.1, noise_multiplier=1.5, max_steps=steps)
        composition = Menu(classes=(listed,))
        return audited.policy(domain={"composition": composition.model_dump(mode="json")})

    def forged(policy: Policy) -> Path:
        edit, documents = under(policy)
        rule = policy.domains["ward"].composition.model_dump(mode="json")

        def with_rule(values: dict[str, Any]) -> dict[str, Any]:
            more = {"composition": rule} if values["kind"] == "genesis" else {}
            return {**edit(values), **more}  # type: ignore[dict-item]

        return rewritten(audited, with_rule, documents=documents)

    assert verify(audited, forged(menu(8)))
    with pytest.raises(VerificationFailed, match="over the policy's epsilon"):
        verify(audited, forged(menu(7)))


def test_more_charges_than_the_contract_allows_are_refused(audited: Any) -> None:
    fewer = audited.sign(audited.agreed.model_copy(update={"rounds": 3, "max_attempts": 3}))
    change = "UPDATE documents SET sha256 = ?, body = ? WHERE kind = 'contract'"
    sha256 = fewer.contract.sha256

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return values if values["kind"] == "genesis" else {**values, "contract": sha256}

    documents = [(change, (sha256, fewer.to_bytes()))]
    with pytest.raises(VerificationFailed, match="more charges than the contract"):
        verify(audited, rewritten(audited, edit, documents=documents))


@pytest.mark.parametrize("domain", ["ward", "clinic"])
@pytest.mark.parametrize("dropped", ["chain", "tail"])
def test_a_charge_of_shared_examples_stands_in_every_domain_that_shares_them(
    shared: Any, domain: str, dropped: str
) -> None:
    assert len(verify(shared)) == 2
    kept = {"chain": 0, "tail": 2}[dropped]
    delete = "DELETE FROM entries WHERE domain = ? AND sequence >= ?"
    path = edited(shared, (delete, (domain, kept)))
    other = {"ward": "clinic", "clinic": "ward"}[domain]
    fault = rf"domain '{other}', entry \d: has no counterpart in the domain '{domain}'"
    with pytest.raises(VerificationFailed, match=fault):
        verify(shared, path)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER swallow BEFORE INSERT ON entries BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TABLE notes (text)",
        "CREATE VIEW spent AS SELECT 0 AS epsilon",
        "CREATE INDEX more ON documents (body)",
        "ALTER TABLE documents ADD COLUMN more TEXT",
        "DROP TABLE documents",
    ],
)
def test_a_file_with_other_tables_or_triggers_is_refused(audited: Any, statement: str) -> None:
    path = audited.folder / "copy.sqlite"
    shutil.copyfile(audited.ledger_path, path)
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    with pytest.raises(VerificationFailed, match="other tables or triggers"):
        verify(audited, path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_with_any_byte_changed_says_the_same_or_is_refused(audited: Any, data: Any) -> None:
    whole = bytearray(audited.ledger_path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path = audited.folder / "copy.sqlite"
    path.write_bytes(whole)
    try:
        (found,) = verify(audited, path)
    except VerificationFailed:
        return
    assert found.chain.head == head(audited)  # the byte lay in unused space


def test_a_key_that_is_not_pinned_is_never_taken_from_the_ledger(audited: Any) -> None:
    for pinned in ({}, {"beta": audited.key.public}):
        with pytest.raises(VerificationFailed, match="key not pinned for the site 'alpha'"):
            verification.verify(audited.ledger_path, site_keys=pinned, anchors={})


@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
@pytest.mark.parametrize("linked", [False, True], ids=["file", "link"])
def test_an_interrupted_write_is_refused_with_a_remedy(
    audited: Any, suffix: str, linked: bool
) -> None:
    leftover = Path(f"{audited.ledger_path}{suffix}")
    path = audited.ledger_path
    if linked:
        path = audited.folder / "link.sqlite"
        path.symlink_to(audited.ledger_path)
    leftover.write_bytes(b"")
    assert verify(audited, path)
    leftover.write_bytes(b"\0" * 512)
    with pytest.raises(VerificationFailed, match=r"interrupted write: .* start it once"):
        verify(audited, path)


def test_a_commit_that_is_being_made_is_waited_for(
    audited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, looks = Path(f"{audited.ledger_path}-journal"), []
    journal.write_bytes(b"\0" * 512)

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            journal.write_bytes(b"")  # as a commit ends

    monkeypatch.setattr(contents.time, "sleep", wait)
    assert verify(audited)
    assert len(looks) == 3


def test_what_is_no_ledger_does_not_verify(world: Any) -> None:
    text, empty = world.folder / "text.sqlite", world.folder / "empty.sqlite"
    text.write_bytes(b"x" * 5000)
    ledger.Ledger(empty).close()
    missing = world.folder / "none.sqlite"
    said = {text: "ledger", empty: "is empty", world.folder: "no ledger", missing: "no ledger"}
    for path, fault in said.items():
        with pytest.raises(VerificationFailed, match=fault):
            verify(world, path)


def test_any_exception_on_the_way_means_not_verified(audited: Any) -> None:
    for broken in ({WARD: "no head"}, {WARD: Head("7", "0" * 64)}):  # type: ignore[arg-type]
        with pytest.raises(VerificationFailed, match="not verified"):
            verify(audited, anchors=broken)  # type: ignore[arg-type]


def test_verifying_writes_nothing(audited: Any) -> None:
    folder, path = audited.folder, audited.ledger_path
    before, listed = path.read_bytes(), sorted(folder.iterdir())
    changed_at = path.stat().st_mtime_ns
    path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert verify(audited)
    finally:
        folder.chmod(0o755)
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == changed_at
    assert sorted(folder.iterdir()) == listed


def run_folder(world: Any) -> Path:
    """Returns the ledger of a run folder: contract.json, summary.json, ledgers/alpha.sqlite."""
    path = world.folder / "run" / "ledgers" / "alpha.sqlite"
    path.parent.mkdir(parents=True)
    shutil.copyfile(world.ledger_path, path)
    known = {"domain": "ward", "sequence": head(world).sequence, "hash": head(world).hash}
    run = path.parent.parent
    (run / "contract.json").write_bytes(world.sign(world.agreed).to_bytes())
    (run / "summary.json").write_text(json.dumps({"heads": {"alpha": known}}))
    return path


def audit(*arguments: Any) -> None:
    command.main(["audit", "verify", *map(str, arguments)], standalone_mode=False)


def test_the_command_takes_keys_and_heads_from_the_run_folder(
    audited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(audited)
    audit(path)
    assert (
        "8 entries, anchored up to entry 7, later ones cannot be excluded"
        in capsys.readouterr().out
    )
    (path.parent.parent / "summary.json").unlink()
    audit(path)
    assert (
        "8 entries, whole up to entry 7, later ones cannot be excluded" in capsys.readouterr().out
    )
    (path.parent.parent / "contract.json").unlink()
    with pytest.raises(VerificationFailed, match="key not pinned"):
        audit(path)
    audit(path, "--site-key", audited.key.public)
    with pytest.raises(VerificationFailed):
        audit(path, "--site-key", keys.generate().public)
    with pytest.raises(UsageError, match="--site-key"):
        audit(path, "--site-key", "pinned")


def test_the_command_tells_every_ceiling_and_from_which_entry_on(
    world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = world.sign(world.contract())
    for round_number, limit in enumerate((8.0, 8.0, 7.0, 9.5), start=1):
        # all four are policies of their own, though the first two allow the same
        policy = world.policy(domain={"epsilon": limit}, min_noise_multiplier=round_number / 10)
        gate = world.gate(policy=policy)
        world.serve(gate, world.order(signed, round_number))
        gate.ledger.close()
    (found,) = verify(world)
    assert [(one.entry, one.epsilon) for one in found.ceilings] == [(0, 8.0), (5, 7.0), (7, 9.5)]
    audit(world.ledger_path, "--site-key", world.key.public)
    said = capsys.readouterr().out
    assert "ε 8 allowed, from entry 5 on ε 7, from entry 7 on ε 9.5" in said


def test_the_command_tells_where_nothing_was_charged(
    audited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(audited.ledger_path, "--site-key", audited.key.public)
    bare = edited(
        audited,
        "DELETE FROM entries WHERE sequence > 0",
        "DELETE FROM documents WHERE kind = 'contract'",
    )
    audit(bare, "--site-key", audited.key.public)
    charged, nothing = capsys.readouterr().out.splitlines()
    assert "nothing was charged" not in charged
    assert "1 entries, whole up to entry 0, later ones cannot be excluded" in nothing
    assert "nothing was charged" in nothing


def test_the_command_reports_every_fault_and_fails(
    audited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(audited)
    cut = path.with_name("cut.sqlite")
    edited(audited, "DELETE FROM entries WHERE sequence = 7").rename(cut)
    with pytest.raises(BractError, match="cut short"):
        audit(path, cut, path.with_name("missing.sqlite"))
    shown = capsys.readouterr()
    assert "ok " in shown.out
    assert "no ledger at" in shown.err


def test_an_auditor_needs_neither_torch_nor_opacus(audited: Any) -> None:
    path = run_folder(audited)
    script = """
import sys
import bract.shared.privacy.verification
early = {"torch", "opacus"} & set(sys.modules)
from bract.shared.cli import bract
bract.main(["audit", "verify", sys.argv[1]], standalone_mode=False)
sys.exit(repr([early, late]) if (late := {"torch", "opacus"} & set(sys.modules)) or early else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "8 entries, anchored" in done.stdout


def test_bodies_of_every_kind_are_in_the_ledger_that_the_forgeries_start_from(
    audited: Any,
) -> None:
    kinds: list[type[Body]] = [
        type(entries.read(text, signature, key=audited.key.public).body)
        for _, text, signature in rows(audited.ledger_path)
    ]
    assert kinds == [Genesis, Charge, Release, Charge, Release, Charge, Charge, Release]


# Evaluations


@pytest.fixture
def evaluated(world: Any) -> Any:
    """A site, of two domains that share examples, that crashed in an evaluated round."""
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=8.0, delta=1e-5),
    }
    asked = EvaluationTerms(every=2, noise_multiplier=4.0)
    gate = world.gate(policy=world.policy(domains=domains, evaluation=True))
    signed = world.sign(world.contract(evaluation=asked))
    world.serve(gate, world.order(signed, 1))
    gate.admit(world.order(signed, 2))
    world.serve(gate, world.order(signed, 2))
    gate.ledger.close()
    return world


def test_a_ledger_with_evaluations_holds_and_counts_them(evaluated: Any) -> None:
    for found in verify(evaluated):
        score, step = found.chain.events[::-1]
        assert score == events.PoissonGaussian(1.0, 4.0, 2)
        assert step == events.PoissonGaussian(0.1, 1.5, 6)
    assert verify(evaluated, rewritten(evaluated, lambda values: values))


def of_evaluations(change: Callable[[dict[str, Any]], Any], *, domain: str = "ward") -> Edit:
    def edit(values: dict[str, Any]) -> dict[str, Any] | None:
        chosen = values["kind"] == "evaluation" and values["domain"] == domain
        found: dict[str, Any] | None = change(values) if chosen else values
        return found

    return edit


def without_scores(values: dict[str, Any]) -> dict[str, Any] | None:
    """Drops evaluations, and what was released of them."""
    if values["kind"] == "evaluation":
        return None
    return {**values, "evaluation": None} if values["kind"] == "release" else values


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (without_scores, "asks for an evaluation, and none is charged"),
        (of_evaluations(lambda values: None), "disagree on an evaluation"),
        (
            of_evaluations(lambda values: None, domain="clinic"),
            "'clinic', entry 2: the contract asks for an evaluation, and none is charged",
        ),
        (
            of_evaluations(lambda values: {**values, "event": quieter(values["event"])}),
            "the evaluation's event is not the contract's",
        ),
        (
            of_evaluations(lambda values: {**values, "round": 5}),
            "an evaluation without a charge",
        ),
        (
            of_evaluations(lambda values: {**values, "policy": "d" * 64}),
            "under another policy",
        ),
    ],
    ids=["dropped", "dropped but released", "dropped in one domain", "quieter", "round", "policy"],
)
def test_an_evaluation_missing_or_altered_is_refused_though_the_site_signed_it(
    evaluated: Any, edit: Edit, fault: str
) -> None:
    with pytest.raises(VerificationFailed, match=fault):
        verify(evaluated, rewritten(evaluated, edit))


def test_an_evaluation_that_the_contract_does_not_ask_for_is_refused(evaluated: Any) -> None:
    """The evaluated round is called the third: charge, evaluation and release alike."""

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "round": 3} if values.get("round") == 2 else values

    with pytest.raises(VerificationFailed, match="an evaluation that the contract does not ask"):
        verify(evaluated, rewritten(evaluated, edit))


def test_evaluations_that_their_policy_does_not_allow_are_refused(evaluated: Any) -> None:
    found, *_ = verify(evaluated)
    edit, documents = under(found.policy.model_copy(update={"evaluation": False}))
    with pytest.raises(VerificationFailed, match="policy-evaluation"):
        verify(evaluated, rewritten(evaluated, edit, documents=documents))


def test_the_evaluation_after_the_last_charge_counts_against_the_policys_epsilon(
    world: Any,
) -> None:
    asked = EvaluationTerms(every=1, noise_multiplier=2.0)
    wide = world.policy(evaluation=True, domain={"composition": {"rule": "filter", "order": 12}})
    agreed = world.contract(evaluation=asked, rounds=1, max_attempts=1)
    gate = world.gate(policy=wide)
    world.serve(gate, world.order(world.sign(agreed)))
    gate.ledger.close()
    step, score = events.PoissonGaussian(0.1, 1.5, 2), events.PoissonGaussian(1.0, 2.0, 1)
    charge, both = (accounting.filter_epsilon(e, 1e-5, 12) for e in ([step], [step, score]))
    rule = {"composition": {"rule": "filter", "order": 12}, "epsilon": (charge + both) / 2}
    edit, documents = under(world.policy(evaluation=True, domain=rule))
    with pytest.raises(VerificationFailed, match="its charges up to entry 2 are over"):
        verify(world, rewritten(world, edit, documents=documents))


def test_more_evaluations_than_the_contract_allows_are_refused(evaluated: Any) -> None:
    """Five rounds, two evaluated, two spare attempts: four evaluations, and here are five."""
    (_, text), *_ = [
        (name, body)
        for name, body in contents.read(evaluated.ledger_path).documents.items()
        if name[0] == "contract"
    ]
    agreed = contracts.from_bytes(text).contract
    found, *_ = verify(evaluated)
    for charges in (4, 5):
        chain = Chain(site="alpha", domain="ward", key=evaluated.key.public)
        chain.evaluated[agreed.sha256] = chain.attempts[agreed.sha256] = charges
        if charges == 4:
            conformity.check_contracts(chain, {agreed.sha256: agreed}, found.policies)
            continue
        with pytest.raises(VerificationFailed, match="more evaluations than the contract"):
            conformity.check_contracts(chain, {agreed.sha256: agreed}, found.policies)
