"""What a server kept, held against a ledger: witnesses and receipts of updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import canonical, keys
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.privacy import (
    anchors,
    contents,
    evidence,
    receipts,
    verification,
    witness,
)
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import NOTHING, Witness


@pytest.fixture
def served(world: Any) -> Any:
    """Three rounds, the second charged twice; `received` is what the server took."""
    world.server = keys.generate()
    world.agreed = world.contract(witness=world.server.public)
    world.signed, gate = world.sign(world.agreed), world.gate()
    replies = [world.serve(gate, world.order(world.signed, 1))]
    gate.admit(world.order(world.signed, 2))
    replies += [world.serve(gate, world.order(world.signed, number)) for number in (2, 3)]
    gate.ledger.close()
    world.received = [
        Received(reply.receipt, reply.signature, reply.ledger, number, True)
        for number, reply in enumerate(replies, start=1)
    ]
    return world


def verify(
    world: Any, received: Sequence[Received] | None = None, witnesses: Sequence[Witness] = ()
) -> verification.Verified:
    (found,) = verification.verify(
        world.ledger_path,
        site_keys={"alpha": world.key.public},
        anchors={},
        witnesses=witnesses,
        witness_keys=[world.server.public],
        received=received,
    )
    return found


def test_every_received_update_stands_behind_its_charge(served: Any) -> None:
    assert verify(served, served.received).received == 3
    assert verify(served, []).received == 0
    assert verify(served).received is None


def signed(world: Any, one: Received, key: keys.SigningKey | None = None, **facts: Any) -> Received:
    receipt = replace(one.receipt, **facts)
    return replace(one, receipt=receipt, signature=(key or world.key).sign(receipt.digest()))


def test_an_update_that_no_charge_paid_for_is_shown_by_its_round(served: Any) -> None:
    """The site signed these itself: it trained, sent, and did not charge."""
    last = served.received[-1]
    for facts in ({"update": "0" * 64}, {"round": 4}, {"attempt": 2}, {"evaluation": (1.0, 2.0)}):
        with pytest.raises(VerificationFailed, match=r"round [34] stands behind no charge"):
            verify(served, [signed(served, last, **facts)])
    # A head that stands before the release: it was charged after it was sent.
    first = served.received[0].receipt
    early = {"head_sequence": first.head_sequence, "head_hash": first.head_hash}
    with pytest.raises(VerificationFailed, match="stands behind no charge"):
        verify(served, [signed(served, last, **early)])


def test_an_update_of_a_run_or_domain_that_was_never_charged_is_shown(served: Any) -> None:
    last = served.received[-1]
    for facts in ({"contract": "0" * 64}, {"head_domain": "clinic"}):
        with pytest.raises(VerificationFailed, match="it never charged"):
            verify(served, [signed(served, last, **facts)])


def test_a_ledger_that_lost_what_an_update_names_is_refused(served: Any) -> None:
    last = served.received[-1]
    for facts in ({"head_sequence": 99}, {"head_hash": "0" * 64}):
        with pytest.raises(VerificationFailed, match=r"names entry \d+, which is gone"):
            verify(served, [signed(served, last, **facts)])


def test_a_receipt_that_the_site_did_not_sign_proves_nothing(served: Any) -> None:
    with pytest.raises(VerificationFailed, match="signature does not verify"):
        verify(served, [signed(served, served.received[0], keys.generate())])


def test_receipts_and_witnesses_of_another_site_are_of_another_file(served: Any) -> None:
    other = signed(served, served.received[0], keys.generate(), site="beta")
    seen = witness.sign("beta", "ward", other.receipt.head, keys.generate())
    found = verify(served, [other], [seen])
    assert (found.received, found.anchor, found.witnessed) == (0, None, None)


def test_a_witness_kept_elsewhere_is_an_anchor(served: Any) -> None:
    head = served.received[-1].receipt.head
    seen = witness.sign("alpha", "ward", head, served.server)
    found = verify(served, None, [seen])
    assert (found.anchor, found.witnessed) == (head.sequence, head.sequence)
    for wrong, fault in (
        (witness.sign("alpha", "ward", head, keys.generate()), "a key that no contract names"),
        (seen.model_copy(update={"sequence": head.sequence - 1}), "signature does not verify"),
        (
            witness.sign("alpha", "ward", replace(head, hash="0" * 64), served.server),
            "the witnessed entry 7 is not in the chain",
        ),
        (
            witness.sign("alpha", "ward", replace(head, sequence=9), served.server),
            "the witnessed entry 9 is not in the chain",
        ),
        (
            witness.sign("alpha", "clinic", head, served.server),
            "holds no domain 'clinic', but the anchor names it",
        ),
    ):
        with pytest.raises(VerificationFailed, match=fault):
            verify(served, None, [wrong])


# The files


def test_receipts_are_read_back_as_they_were_written(served: Any) -> None:
    path = served.folder / "receipts.jsonl"
    path.write_bytes(receipts.to_lines(served.received))
    assert receipts.read(path) == served.received
    bare = [replace(one, ledger=NOTHING, counted=False) for one in served.received]
    path.write_bytes(receipts.to_lines(bare))
    assert receipts.read(path) == bare
    with pytest.raises(UsageError, match="cannot read the receipts"):
        receipts.read(served.folder / "none.jsonl")


@given(st.data())
def test_a_line_in_any_other_form_is_refused(data: st.DataObject) -> None:
    value = json.loads(LINE)
    name = data.draw(st.sampled_from([*value, "receipt.round", "receipt.update", "more"]))
    where, _, last = name.rpartition(".")
    (value[where] if where else value)[last] = data.draw(
        st.none() | st.integers(-3, 0) | st.text(max_size=3) | st.just({"a": 1}) | st.just([1])
    )
    text = canonical.encode(value)
    if text != LINE and name != "counted" and (name, value[name.split(".")[0]]) != ("since", None):
        with pytest.raises(VerificationFailed):
            receipts.from_bytes(text)
    with pytest.raises(VerificationFailed):
        receipts.from_bytes(LINE.replace(b":", b": ", 1))


LINE = Received(
    receipts.Receipt("a" * 64, "alpha", 1, 1, "b" * 64, "ward", 2, "c" * 64),
    b"s" * 64,
    NOTHING,
    1,
    True,
).to_bytes()


def test_a_damaged_file_names_its_line(served: Any) -> None:
    path = served.folder / "receipts.jsonl"
    path.write_bytes(receipts.to_lines(served.received)[:-9])
    with pytest.raises(VerificationFailed, match="line 3: "):
        receipts.read(path)


def test_witnesses_are_read_back_as_they_were_written(served: Any) -> None:
    head = served.received[-1].receipt.head
    seen = witness.sign("alpha", "ward", head, served.server)
    path = served.folder / "witnesses.json"
    path.write_bytes(anchors.to_bytes([seen]))
    assert anchors.witnesses(path) == (seen,)
    path.write_text(json.dumps({"heads": {}}))
    assert anchors.witnesses(path) == ()
    path.write_text("[]")
    with pytest.raises(UsageError, match="holds no heads"):
        anchors.witnesses(path)
    path.write_text('{"witnesses": [{}]}')
    with pytest.raises(VerificationFailed, match="not a witness"):
        anchors.witnesses(path)


def test_what_leads_to_a_head_is_traced_without_the_ledger(served: Any) -> None:
    for one in served.received:
        found = receipts.trace(one.receipt, one.ledger, served.agreed)
        assert found.paid
        assert found.heads[one.receipt.head_sequence] == one.receipt.head_hash
        assert not receipts.trace(
            replace(one.receipt, update="0" * 64), one.ledger, served.agreed
        ).paid
        with pytest.raises(VerificationFailed, match="do not lead to the head"):
            receipts.trace(replace(one.receipt, head_hash="0" * 64), one.ledger, served.agreed)


def test_an_update_that_is_told_twice_is_one(served: Any) -> None:
    assert verify(served, [*served.received, *served.received]).received == 3


def test_two_histories_of_one_chain_are_told_apart_and_an_older_copy_is_none(world: Any) -> None:
    signed, files = world.sign(world.contract()), {}
    gate = world.gate()
    for number in (1, 2):
        world.serve(gate, world.order(signed, number))
        files[f"after {number}"] = contents.read(world.ledger_path)
    gate.ledger.close()
    evidence.check_forks(files)
    world.ledger_path.unlink()  # and begun anew, with the same key: what was spent is forgotten
    world.serve(world.gate(), world.order(signed))
    for name in ("after 1", "after 2"):
        with pytest.raises(
            VerificationFailed,
            match=f"{name} and new: two histories of 'alpha', domain 'ward', which part at entry 0",
        ):
            evidence.check_forks({name: files[name], "new": contents.read(world.ledger_path)})
