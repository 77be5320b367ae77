from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.shared import keys
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import (
    NO_PREVIOUS,
    Body,
    Charge,
    Entry,
    Evaluation,
    Genesis,
    Joined,
    Recovered,
    Release,
)
from bract.shared.privacy.events import (
    Event,
    PoissonGaussian,
    Spent,
    Unbounded,
    encode,
    merge,
)

KEY, OTHER = keys.generate(), keys.generate()
HALF = (0.5).hex()
STEP = PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.5, steps=2)
SCORE = PoissonGaussian(sampling_rate=1.0, noise_multiplier=4.0, steps=1)
PAIR = [(1.5).hex(), (2.5).hex()]
# Each use is a round of one of two contracts, released or not; the same round again is an attempt.
USES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.booleans()), max_size=8)


def empty() -> Chain:
    return Chain(site="alpha", domain="ward", key=KEY.public)


def common(chain: Chain, attempt: int = 0) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "site": chain.site,
        "key": KEY.public,
        "domain": chain.domain,
        "sequence": chain.length,
        "previous": chain.head.hash if chain.head else NO_PREVIOUS,
        "genesis": chain.genesis_hash or NO_PREVIOUS,
        "policy": "e" * 64,
        "attempt": attempt,
    }


def genesis(chain: Chain, **changes: Any) -> Genesis:
    terms = {
        "kind": "genesis",
        "nonce": "0" * 32,
        "simulation": False,
        "unit": "example",
        "adjacency": "add-or-remove-one",
        "delta": (1e-5).hex(),
        "composition": {"rule": "filter", "order": 8},
    }
    return Genesis.model_validate({**common(chain), **terms, **changes})


def charge(chain: Chain, contract: str = "a", round_number: int = 1, **changes: Any) -> Charge:
    attempt = len(chain.charges.get((contract * 64, round_number), [])) + 1
    terms = {
        "kind": "charge",
        "contract": contract * 64,
        "run": "trial",
        "round": round_number,
        "primary": chain.domain,
        "weights": f"{round_number}" * 64,
        "event": encode(STEP),
        "clip_norm": HALF,
        "clipping": "flat-l2",
        "normaliser": HALF,
        "sampler": "poisson",
        "mechanism": "dp-sgd",
        "randomness": "csprng",
        "versions": {},
    }
    return Charge.model_validate({**common(chain, attempt), **terms, **changes})


def evaluation(chain: Chain, contract: str = "a", round_number: int = 1, **changes: Any) -> Any:
    attempt = len(chain.charges.get((contract * 64, round_number), []))
    terms = {
        "kind": "evaluation",
        "contract": contract * 64,
        "round": round_number,
        "event": encode(SCORE),
    }
    return Evaluation.model_validate({**common(chain, attempt), **terms, **changes})


def release(chain: Chain, contract: str = "a", round_number: int = 1, **changes: Any) -> Release:
    attempt = len(chain.charges.get((contract * 64, round_number), []))
    terms = {
        "kind": "release",
        "contract": contract * 64,
        "round": round_number,
        "update": "f" * 64,
    }
    return Release.model_validate({**common(chain, attempt), **terms, **changes})


def joined(chain: Chain, *charged: Event, **changes: Any) -> Joined:
    terms = {
        "kind": "joined",
        "others": ["clinic"],
        "events": [encode(event) for event in charged],
        "contracts": ["c" * 64],
    }
    return Joined.model_validate({**common(chain), **terms, **changes})


def add(chain: Chain, body: Body) -> Entry:
    entry = entries.write(body, KEY)
    chain.extend_(entry)
    return entry


def written(uses: list[tuple[str, int, bool]]) -> tuple[Chain, list[Entry]]:
    chain = empty()
    found = [add(chain, genesis(chain))]
    for contract, round_number, released in uses:
        found.append(add(chain, charge(chain, contract, round_number)))
        if released:
            found.append(add(chain, release(chain, contract, round_number)))
    return chain, found


def folded(stored: list[Entry]) -> Chain:
    """Returns the chain of entries read back from their bytes."""
    chain = empty()
    for entry in stored:
        chain.extend_(entries.read(entry.text, entry.signature, key=KEY.public))
    return chain


@given(USES)
def test_a_chain_read_back_says_what_the_written_one_said(uses: list[Any]) -> None:
    chain, stored = written(uses)
    again = folded(stored)
    assert again.head == chain.head
    assert again.length == len(stored)
    assert again.events == merge([STEP] * len(uses))
    assert sum(again.attempts.values()) == len(uses)
    for contract in "ab":
        count = sum(1 for used, *_ in uses if used == contract)
        assert again.events_of(contract * 64) == merge([STEP] * count)
    assert set(again.releases) == {(c * 64, r) for c, r, released in uses if released}


@given(USES)
def test_every_beginning_of_a_chain_is_a_chain(uses: list[Any]) -> None:
    chain, stored = written(uses)
    assert folded(stored[:-1]).length == chain.length - 1


@settings(deadline=None)
@given(USES.filter(len), st.data())
def test_entries_dropped_repeated_or_reordered_break_the_chain(uses: Any, data: Any) -> None:
    _, stored = written(uses)
    number = data.draw(st.integers(0, len(stored) - 2))
    dropped = stored[:number] + stored[number + 1 :]
    repeated = stored[: number + 1] + stored[number:]
    swapped = [*stored[:number], stored[number + 1], stored[number], *stored[number + 2 :]]
    for broken in (dropped, repeated, swapped):
        with pytest.raises(VerificationFailed, match=r"entry \d+: "):
            folded(broken)


@given(USES, st.data())
def test_an_entry_with_any_byte_changed_is_not_read(uses: list[Any], data: Any) -> None:
    _, stored = written(uses)
    entry = stored[data.draw(st.integers(0, len(stored) - 1))]
    place = data.draw(st.integers(0, len(entry.text) - 1))
    text = bytearray(entry.text)
    text[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VerificationFailed):
        entries.read(bytes(text), entry.signature, key=KEY.public)
    signature = bytearray(entry.signature)
    signature[place % 64] ^= 1
    with pytest.raises(VerificationFailed):
        entries.read(entry.text, bytes(signature), key=KEY.public)


def test_an_entry_by_another_key_is_not_read() -> None:
    body = genesis(empty())
    by_other = entries.write(body, OTHER)
    with pytest.raises(VerificationFailed, match="signature"):
        entries.read(by_other.text, by_other.signature, key=KEY.public)
    named = entries.write(body.model_copy(update={"key": OTHER.public}), OTHER)
    with pytest.raises(VerificationFailed, match="another key"):
        entries.read(named.text, named.signature, key=KEY.public)


def test_a_hash_covers_the_entry_before() -> None:
    one, two = genesis(empty()), genesis(empty(), simulation=True)
    moved = {"previous": "1" * 64}
    assert len({entries.write(body, KEY).hash for body in (one, two)}) == 2
    assert entries.write(one.model_copy(update=moved), KEY).hash != entries.write(one, KEY).hash


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sequence": 2}, "sequence number"),
        ({"previous": "0" * 64}, "does not follow"),
        ({"site": "beta"}, "belongs to the site"),
        ({"domain": "clinic"}, "belongs to the domain"),
        ({"genesis": "1" * 64}, "another genesis"),
        ({"attempt": 2}, "attempt 2"),
        ({"attempt": 0}, "attempt 0"),
        ({"mechanism": "none", "event": encode(Unbounded())}, "on a real ledger"),
        ({"randomness": "seeded"}, "on a real ledger"),
        ({"event": encode(Unbounded())}, "event and mechanism disagree"),
        ({"event": {"type": "gaussian"}}, "cannot be read"),
    ],
)
def test_a_charge_that_breaks_a_rule_is_refused_by_name(
    changes: dict[str, Any], fault: str
) -> None:
    chain, _ = written([])
    with pytest.raises(VerificationFailed, match=fault):
        add(chain, charge(chain, **changes))


def test_a_round_charged_again_keeps_its_weights() -> None:
    chain, _ = written([("a", 1, False)])
    with pytest.raises(VerificationFailed, match="entry 2: the same round with other weights"):
        add(chain, charge(chain, weights="9" * 64))
    add(chain, charge(chain, "b", weights="9" * 64))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"round": 2}, "without a charge"),
        ({"contract": "b"}, "without a charge"),
        ({"attempt": 1}, "another attempt"),
        ({"attempt": 3}, "another attempt"),
    ],
)
def test_a_release_belongs_to_the_last_attempt_of_its_round(
    changes: dict[str, Any], fault: str
) -> None:
    chain, _ = written([("a", 1, False), ("a", 1, False)])
    with pytest.raises(VerificationFailed, match=f"entry 3: a release .*{fault}"):
        add(chain, release(chain, **changes))
    add(chain, release(chain))


def test_one_charge_pays_for_one_release() -> None:
    chain, _ = written([("a", 1, True)])
    with pytest.raises(VerificationFailed, match="entry 3: a second release of one charge"):
        add(chain, release(chain, update="0" * 64))
    add(chain, charge(chain))
    add(chain, release(chain, update="0" * 64))
    assert chain.releases["a" * 64, 1].update == "0" * 64


def test_what_another_domain_released_is_not_released_here() -> None:
    chain, _ = written([])
    add(chain, charge(chain, primary="clinic"))
    with pytest.raises(VerificationFailed, match="of another domain"):
        add(chain, release(chain))


def test_a_chain_begins_with_one_genesis() -> None:
    chain = empty()
    with pytest.raises(VerificationFailed, match="entry 0: the first entry is no genesis"):
        add(chain, charge(chain))
    with pytest.raises(VerificationFailed, match="entry 0: a genesis names no genesis"):
        add(chain, genesis(chain, genesis="1" * 64))
    add(chain, genesis(chain))
    with pytest.raises(VerificationFailed, match="entry 1: a second genesis"):
        add(chain, genesis(chain))


def test_a_simulations_chain_marks_what_was_seeded_and_what_is_unbounded() -> None:
    chain = empty()
    add(chain, genesis(chain, simulation=True))
    add(chain, charge(chain))
    assert not chain.seeded
    add(chain, charge(chain, round_number=2, randomness="seeded"))
    assert chain.seeded
    assert chain.events == merge([STEP, STEP])
    none = {"mechanism": "none", "event": encode(Unbounded())}
    for number in (3, 4):
        add(chain, charge(chain, round_number=number, **none))
    assert chain.events == (*merge([STEP, STEP]), Unbounded())


def test_an_evaluation_costs_what_its_event_says_beside_its_charge() -> None:
    chain, _ = written([("a", 1, True)])
    add(chain, charge(chain, "b", 2))
    add(chain, evaluation(chain, "b", 2))
    add(chain, release(chain, "b", 2, evaluation=PAIR))
    assert chain.events == merge([STEP, STEP, SCORE])
    assert chain.events_of("a" * 64) == (STEP,)
    assert chain.events_of("b" * 64) == merge([STEP, SCORE])
    assert chain.events_until(3) == merge([STEP, STEP])
    assert chain.events_until(4) == merge([STEP, STEP, SCORE])
    assert chain.evaluated == {"b" * 64: 1}
    assert chain.attempts == {"a" * 64: 1, "b" * 64: 1}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"round": 2}, "without a charge"),
        ({"contract": "b"}, "without a charge"),
        ({"attempt": 1}, "of another attempt"),
        ({"attempt": 3}, "of another attempt"),
        ({"policy": "d" * 64}, "under another policy"),
        ({"event": encode(Unbounded())}, "without noise"),
    ],
)
def test_an_evaluation_belongs_to_the_charge_before_it(changes: Any, fault: str) -> None:
    chain, _ = written([("a", 1, False), ("a", 1, False)])
    with pytest.raises(VerificationFailed, match=f"entry 3: an evaluation .*{fault}"):
        add(chain, evaluation(chain, **changes))
    add(chain, evaluation(chain))


def test_a_charge_has_one_evaluation_and_nothing_stands_between_them() -> None:
    fault = "an evaluation that does not follow its charge"
    chain, _ = written([("a", 1, False)])
    add(chain, evaluation(chain))
    with pytest.raises(VerificationFailed, match=f"entry 3: {fault}"):
        add(chain, evaluation(chain))
    for between in (("a", 1, True), ("a", 1, False)):
        chain, _ = written([between])
        if not between[2]:
            add(chain, charge(chain, "b"))
        with pytest.raises(VerificationFailed, match=f"entry 3: {fault}"):
            add(chain, evaluation(chain))


@pytest.mark.parametrize("charged", [True, False])
def test_a_release_has_scores_where_they_were_charged_and_nowhere_else(charged: bool) -> None:
    chain, _ = written([("a", 1, False)])
    if charged:
        add(chain, evaluation(chain))
    with pytest.raises(VerificationFailed, match="charge and release disagree on an evaluation"):
        add(chain, release(chain, evaluation=None if charged else PAIR))
    add(chain, release(chain, evaluation=PAIR if charged else None))
    # another attempt stands for itself
    add(chain, charge(chain))
    with pytest.raises(VerificationFailed, match="disagree on an evaluation"):
        add(chain, release(chain, evaluation=PAIR))


def test_joined_charges_count_from_their_entry_on_and_are_no_attempts() -> None:
    chain, stored = written([("a", 1, True)])
    stored += [add(chain, joined(chain, STEP, SCORE)), add(chain, charge(chain, "b"))]
    for found in (chain, folded(stored)):
        assert found.events == merge([STEP, STEP, STEP, SCORE])
        assert found.events_until(2) == (STEP,)
        assert found.events_until(3) == merge([STEP, STEP, SCORE])
        assert found.events_of("a" * 64) == (STEP,)
        assert found.attempts == {"a" * 64: 1, "b" * 64: 1}
    chain.forget_()
    assert chain.events_until(3) == merge([STEP, SCORE])  # of what is still held


@pytest.mark.parametrize(
    ("charged", "changes", "fault"),
    [
        ([STEP], {"others": ["clinic", "ward"]}, "joins itself"),
        ([SCORE, STEP], {}, "not merged"),
        ([STEP, STEP], {}, "not merged"),
        ([Spent(4.0)], {}, "joins a ceiling"),
        ([Unbounded()], {}, "without noise on a real ledger"),
    ],
)
def test_joined_charges_that_no_gate_writes_are_refused(
    charged: list[Event], changes: dict[str, Any], fault: str
) -> None:
    chain, _ = written([])
    with pytest.raises(VerificationFailed, match=fault):
        add(chain, joined(chain, *charged, **changes))


def test_nothing_is_joined_after_entries_were_lost() -> None:
    chain, _ = written([("a", 1, True)])
    lost = {"event": encode(Spent(8.0)), "lost_sequence": None, "lost_hash": None}
    add(chain, Recovered.model_validate({**common(chain), "kind": "recovered", **lost}))
    with pytest.raises(VerificationFailed, match="joined after entries were lost"):
        add(chain, joined(chain, STEP))
