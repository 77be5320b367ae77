from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bract.shared import canonical, keys
from bract.shared import contract as contracts
from bract.shared.contract import Contract, SignedContract
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.preparation import Categorical, Numeric, Table, Target, Text
from bract.shared.terms import (
    GREATEST_NOISE,
    DataTerms,
    EvaluationTerms,
    ModelTerms,
    PrivacyTerms,
    SiteTerms,
    TrainingTerms,
)

KEY, OTHER = keys.generate(), keys.generate()
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,9}", fullmatch=True)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def contracts_of_any_terms(draw: st.DrawFn) -> Contract:
    simulation, rounds = draw(st.booleans()), draw(st.integers(1, 1000))
    mechanism = draw(st.sampled_from(["dp-sgd", "none"] if simulation else ["dp-sgd"]))
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    scalars = st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=5)
    return Contract(
        run=draw(NAMES),
        nonce=contracts.new_nonce(),
        coordinator=KEY.public,
        simulation=simulation,
        rounds=rounds,
        max_attempts=rounds + draw(st.integers(0, 9)),
        model=ModelTerms(
            name=draw(st.text(min_size=1, max_size=9)),
            options=draw(st.dictionaries(st.text(max_size=5), scalars, max_size=3)),
        ),
        data=DataTerms(name="d", shape=draw(st.lists(st.integers(1, 9), max_size=3)), classes=2),
        training=TrainingTerms(local_steps=draw(st.integers(1, 9)), learning_rate=draw(POSITIVE)),
        privacy=PrivacyTerms(
            mechanism=mechanism,
            randomness=draw(st.sampled_from(["csprng", "seeded"] if simulation else ["csprng"])),
            sampling_rate=draw(st.floats(0, 1, exclude_min=True)),
            noise_multiplier=draw(st.floats(0, GREATEST_NOISE, exclude_min=True)),
            clip_norm=draw(POSITIVE),
        ),
        cohort=[
            SiteTerms(name=name, key=OTHER.public, domain="w", nominal_size=draw(st.integers(1, 9)))
            for name in names
        ],
    )


def trial(**changes: Any) -> Contract:
    site = SiteTerms(name="alpha", key=OTHER.public, domain="ward", nominal_size=100)
    terms: dict[str, Any] = {
        "run": "trial",
        "nonce": "0" * 32,
        "coordinator": KEY.public,
        "simulation": True,
        "rounds": 5,
        "max_attempts": 7,
        "model": ModelTerms(name="linear", options={"bias": True}),
        "data": DataTerms(name="digits", shape=(1, 8, 8), classes=10),
        "training": TrainingTerms(local_steps=2, learning_rate=0.5),
        "privacy": PrivacyTerms(sampling_rate=0.1, noise_multiplier=1.5, clip_norm=1.0),
        "cohort": (site,),
        **changes,
    }
    return Contract.model_validate(terms)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all scalars in JSON values."""
    if isinstance(value, dict | list):
        steps = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for name, inner in steps for leaf in leaves(inner, (*path, name))]
    return [path]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Returns JSON values in which one scalar is another."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return copy


TRIAL = trial(evaluation=EvaluationTerms(every=2, noise_multiplier=3.0))
VALUES = TRIAL.model_dump(mode="json")
# The only words that a field may hold cannot be changed to another legal one.
FIXED = {("schema_version",), ("privacy", "adjacency"), ("privacy", "unit")}
OTHERS = {"mechanism": "none", "randomness": "seeded", "rounds": 6, "max_attempts": 9}
HEX = {
    "nonce": "1" * 32,
    "coordinator": OTHER.public,
    "key": KEY.public,
    "witness": OTHER.public,
    "public": "2" * 64,
}


def another(name: str, old: Any) -> Any:
    """Returns another legal value of a field."""
    if name in OTHERS | HEX:
        return (OTHERS | HEX)[name]
    if isinstance(old, bool):
        return not old
    if isinstance(old, float):
        return old / 2 or 0.5
    if isinstance(old, int):
        return old + 1
    return f"{old}x"


@given(contracts_of_any_terms())
def test_a_signed_contract_survives_its_canonical_form(agreed: Contract) -> None:
    signed = contracts.sign(agreed, KEY)
    text = signed.to_bytes()
    again = contracts.from_bytes(text)
    assert again == signed
    assert again.to_bytes() is text  # megabytes are held once, and compared with none
    assert again.verify(KEY.public).sha256 == agreed.sha256


@pytest.mark.parametrize("path", [p for p in leaves(VALUES) if p not in FIXED])
def test_any_field_changed_is_another_contract_that_the_signature_does_not_cover(
    path: tuple[Any, ...],
) -> None:
    signed = contracts.sign(TRIAL, KEY)
    old = VALUES
    for step in path:
        old = old[step]
    altered = Contract.model_validate(changed(VALUES, path, another(str(path[-1]), old)))
    assert altered.sha256 != TRIAL.sha256
    with pytest.raises(VerificationFailed):
        SignedContract(contract=altered, signature=signed.signature).verify(altered.coordinator)


@pytest.mark.parametrize("path", sorted(FIXED))
def test_a_word_of_another_schema_is_refused(path: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        Contract.model_validate(changed(VALUES, path, "client"))


def test_a_contract_signed_by_another_key_is_refused() -> None:
    signature = OTHER.sign(contracts._digest(TRIAL)).hex()
    with pytest.raises(VerificationFailed, match="signature"):
        SignedContract(contract=TRIAL, signature=signature).verify(KEY.public)


def test_a_contract_of_another_coordinator_is_refused_though_its_signature_holds() -> None:
    agreed = trial(coordinator=OTHER.public)
    signed = contracts.sign(agreed, OTHER)
    assert signed.verify(OTHER.public) == agreed
    with pytest.raises(VerificationFailed, match="another coordinator"):
        signed.verify(KEY.public)


def test_a_coordinator_signs_only_what_names_it() -> None:
    with pytest.raises(UsageError, match="another coordinator key"):
        contracts.sign(TRIAL, OTHER)


def test_a_signature_is_of_a_contract_and_of_nothing_else() -> None:
    digest = canonical.tagged("receipt/1", bytes.fromhex(TRIAL.sha256))
    forged = SignedContract(contract=TRIAL, signature=KEY.sign(digest).hex())
    with pytest.raises(VerificationFailed):
        forged.verify(KEY.public)


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text + b"\n",
        lambda text: b" " + text,
        lambda text: text.replace(b'":', b'": ', 1),
        lambda text: text.replace(b"trial", b"tri\\u0061l"),
        lambda text: text.replace(b'"rounds":5', b'"rounds":5.0'),
        lambda text: text.replace(b'"rounds":5', b'"rounds":"5"'),
        lambda text: text.replace(b'"rounds":5', b'"rounds":4,"rounds":5'),
        lambda text: text.replace(b'"simulation":true', b'"simulation":1'),
        lambda text: text.replace(b'"clip_norm":1.0', b'"clip_norm":1'),
        lambda text: text.replace(b'"clip_norm":1.0', b'"clip_norm":1e0'),
        lambda text: text.replace(b'"clip_norm":1.0,', b""),
        lambda text: text.replace(b'"clip_norm":1.0', b'"clip_norm":NaN'),
        lambda text: text.replace(b'"clip_norm":1.0', b'"clip_norm":1e999'),
        lambda text: text.replace(b'"clip_norm":1.0', b'"clip_norm":1.0,"epsilon":3'),
        lambda text: text.replace(b'"cohort":', b'"cohort_":'),
        lambda text: json.dumps(json.loads(text)).encode(),
        lambda text: text.decode().encode("utf-16"),
        lambda text: text[:-1],
        lambda text: b"[" * 100_000,
        lambda text: b"",
    ],
)
def test_bytes_in_any_other_form_are_refused(respell: Any) -> None:
    text = contracts.sign(TRIAL, KEY).to_bytes()
    assert respell(text) != text
    with pytest.raises((VerificationFailed, UsageError)):
        contracts.from_bytes(respell(text))


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"max_attempts": 4},
        {"nonce": "0" * 31},
        {"nonce": "A" * 32},
        {"run": "../run"},
        {"run": "run\n"},
        {"coordinator": KEY.public.upper()},
        {"cohort": ()},
        {"cohort": TRIAL.cohort * 2},
        {"epsilon": 3.0},
    ],
)
def test_terms_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        trial(**changes)


@pytest.mark.parametrize(
    "privacy",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"clip_norm": 0.0},
        {"clip_norm": float("inf")},
        {"mechanism": "gaussian"},
        {"adjacency": "replace-one"},
        {"unit": "client"},
    ],
)
def test_privacy_terms_out_of_range_are_refused(privacy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrivacyTerms(**{"sampling_rate": 0.1, "noise_multiplier": 1.5, "clip_norm": 1.0, **privacy})


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, {"randomness": "seeded"}])
def test_only_a_simulation_may_be_seeded_or_without_noise(privacy: dict[str, Any]) -> None:
    terms = TRIAL.privacy.model_copy(update=privacy)
    assert trial(simulation=True, privacy=terms).privacy == terms
    with pytest.raises(ValidationError, match="only a simulation"):
        trial(simulation=False, privacy=terms)


def test_equal_terms_under_two_nonces_are_two_contracts() -> None:
    one, two = (trial(nonce=contracts.new_nonce()) for _ in range(2))
    assert one.sha256 != two.sha256


def test_the_normaliser_is_a_public_constant() -> None:
    assert TRIAL.normaliser(TRIAL.cohort[0]) == pytest.approx(0.1 * 100)


def test_a_site_is_found_by_its_name_alone() -> None:
    assert TRIAL.site("alpha") == TRIAL.cohort[0]
    assert TRIAL.site("Alpha") is None


def test_a_contract_on_disk_is_read_as_it_was_signed(tmp_path: Path) -> None:
    path, signed = tmp_path / "contract.json", contracts.sign(TRIAL, KEY)
    path.write_bytes(signed.to_bytes())
    assert contracts.read(path) == signed
    with pytest.raises(UsageError, match="cannot read the contract"):
        contracts.read(tmp_path / "missing.json")


def test_an_unknown_field_is_named_with_its_nearest() -> None:
    text = contracts.sign(TRIAL, KEY).to_bytes().replace(b'"rounds"', b'"round"')
    with pytest.raises(UsageError, match=r"contract\.round\b.*did you mean 'contract\.rounds'"):
        contracts.from_bytes(canonical.encode(json.loads(text)))


def test_a_contract_that_would_evaluate_no_round_is_refused() -> None:
    assert trial(evaluation={"every": 5, "noise_multiplier": 1.0}).max_evaluations == 3
    with pytest.raises(ValidationError, match="every 6 is over the 5 rounds"):
        trial(evaluation={"every": 6, "noise_multiplier": 1.0})


@pytest.mark.parametrize("terms", [{"every": 0}, {"noise_multiplier": 0}, {"share": 0.5}])
def test_evaluation_terms_out_of_range_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluationTerms.model_validate({"every": 2, "noise_multiplier": 1.0, **terms})


@given(st.integers(1, 12), st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(0, 2))
def test_no_run_evaluates_more_often_than_is_counted_for_it(
    every: int, tries: list[int], open_tries: int
) -> None:
    """Round after round, each tried some times until it is completed; the last may be open."""
    asked = EvaluationTerms(every=every, noise_multiplier=1.0)
    rounds = [number for number, count in enumerate(tries, 1) for _ in range(count)]
    rounds += [len(tries) + 1] * open_tries
    counted = asked.most(attempts=len(rounds), completed=len(tries))
    evaluated = sum(map(asked.falls_on, rounds))
    assert evaluated <= counted
    if len(rounds) == len(tries):
        assert evaluated == counted


def test_a_contract_without_evaluation_evaluates_nothing() -> None:
    agreed = trial()
    assert agreed.max_evaluations == 0
    assert not any(map(agreed.evaluates, range(1, 6)))
    assert [n for n in range(1, 6) if TRIAL.evaluates(n)] == [2, 4]
    assert TRIAL.max_evaluations == 2 + 2


def test_a_contract_that_asks_nothing_new_keeps_the_hash_it_was_signed_by() -> None:
    old = trial(
        coordinator="a" * 64,
        simulation=False,
        model=ModelTerms(name="cnn", options={"width": 4}),
        data=DataTerms(name="digits", shape=(1, 8, 8), classes=10, scale=16.0),
        cohort=(SiteTerms(name="alpha", key="b" * 64, domain="ward", nominal_size=100),),
        max_attempts=7,
    )
    # As it was computed before contracts knew tasks, vocabularies and preparations.
    assert old.sha256 == "c42ebab54020d86d9089051471db07630a1c97f89773f0ad2fb5a370b7d4712d"


@pytest.mark.parametrize(
    "terms",
    [
        DataTerms(name="d", shape=(8,), classes=256, task="next-token", vocabulary=256),
        DataTerms(name="d", shape=(8,), classes=1, task="value"),
        DataTerms(
            name="d",
            shape=(4,),
            classes=2,
            vocabulary=257,
            preparation=Text(length=4, labels=("no", "yes")),
        ),
        DataTerms(
            name="d",
            shape=(5,),
            classes=2,
            preparation=Table(
                columns=(
                    Numeric(name="age", low=0, high=90),
                    Categorical(name="sex", categories=("f",)),
                ),
                target=Target(name="ill", classes=("no", "yes")),
            ),
        ),
    ],
)
def test_what_is_learned_and_how_files_are_read_stand_in_the_contract(terms: DataTerms) -> None:
    signed = contracts.sign(trial(data=terms), KEY)
    assert contracts.from_bytes(signed.to_bytes()).contract.data == terms
    assert signed.contract.sha256 != trial().sha256


@pytest.mark.parametrize(
    ("terms", "fault"),
    [
        ({"classes": 1}, "classes 1 must be at least 2"),
        ({"classes": 2, "task": "value"}, "classes 2 must be 1"),
        ({"classes": 9, "task": "next-token", "vocabulary": 8}, "must be the vocabulary 8"),
        ({"classes": 9, "task": "next-token"}, "must be the vocabulary None"),
        ({"classes": 2, "vocabulary": 8, "shape": (2, 2)}, "must be one axis"),
    ],
)
def test_terms_of_data_that_contradict_themselves_are_refused(
    terms: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValidationError, match=fault):
        DataTerms(**{"name": "d", "shape": (2,), **terms})


def test_only_labels_are_counted_by_an_evaluation() -> None:
    terms = DataTerms(name="d", shape=(8,), classes=1, task="value")
    with pytest.raises(ValidationError, match="leave evaluation out"):
        trial(data=terms, evaluation=EvaluationTerms(every=1, noise_multiplier=3.0))
