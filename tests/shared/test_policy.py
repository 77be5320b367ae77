from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bract.shared import canonical
from bract.shared.configuration import parse
from bract.shared.errors import Reason, Refusal, UsageError
from bract.shared.policy import (
    DomainPolicy,
    Menu,
    MenuClass,
    Policy,
    check,
    check_charged,
    check_delta,
    evaluation_error,
)
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.terms import DataTerms, EvaluationTerms

KEY = "ab" * 32


def policy(**changes: Any) -> Policy:
    terms: dict[str, Any] = {
        "site": "alpha",
        "coordinators": (KEY,),
        "domains": {"ward": DomainPolicy(epsilon=8.0, delta=1e-5)},
        "models": ("linear",),
        **changes,
    }
    return Policy.model_validate(terms)


def refusal(policy: Policy, contract: Any) -> Reason:
    with pytest.raises(Refusal) as refused:
        check(policy, contract)
    return refused.value.reason


def menu(*classes: tuple[float, float, int]) -> DomainPolicy:
    listed = tuple(
        MenuClass(sampling_rate=rate, noise_multiplier=noise, max_steps=steps)
        for rate, noise, steps in classes
    )
    return DomainPolicy(epsilon=8.0, delta=1e-5, composition=Menu(classes=listed))


def test_a_contract_within_every_limit_gets_the_sites_own_terms(world: Any) -> None:
    agreed = world.contract()
    assert check(world.policy(), agreed) == agreed.cohort[0]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"site": "beta"}, Reason.NOT_IN_CONTRACT),
        ({"domains": {"clinic": DomainPolicy(epsilon=8, delta=1e-5)}}, Reason.POLICY_DOMAIN),
        ({"models": ("cnn",)}, Reason.POLICY_MODEL),
        ({"mechanisms": ("none",)}, Reason.POLICY_MECHANISM),
        ({"min_noise_multiplier": 1.5000001}, Reason.POLICY_NOISE),
        ({"max_sampling_rate": 0.0999999}, Reason.POLICY_SAMPLING),
        ({"domains": {"ward": menu((0.1, 1.6, 100))}}, Reason.POLICY_MENU),
        ({"domains": {"ward": menu((0.2, 1.5, 100))}}, Reason.POLICY_MENU),
    ],
)
def test_each_limit_refuses_with_its_own_reason(
    world: Any, limits: dict[str, Any], reason: Reason
) -> None:
    assert refusal(world.policy(**limits), world.contract()) is reason


@pytest.mark.parametrize(
    "limits",
    [
        {"min_noise_multiplier": 1.5},
        {"max_sampling_rate": 0.1},
        {"domains": {"ward": menu((0.3, 1.0, 1), (0.1, 1.5, 1))}},
    ],
    ids=["least-noise", "greatest-rate", "menu"],
)
def test_a_limit_that_is_just_reached_is_kept(world: Any, limits: dict[str, Any]) -> None:
    assert check(world.policy(**limits), world.contract()).name == "alpha"


def test_a_delta_of_one_over_the_nominal_size_is_refused(world: Any) -> None:
    limits = {"domain": {"delta": 0.01}}  # of 100 examples: one could be published whole
    assert refusal(world.policy(**limits), world.contract()) is Reason.POLICY_DELTA
    assert check(world.policy(domain={"delta": 0.009}), world.contract()).name == "alpha"


def test_a_menu_lists_a_class_once() -> None:
    with pytest.raises(ValueError, match="listed twice"):
        menu((0.1, 1.5, 1), (0.1, 1.5, 100))


def test_a_mechanism_without_noise_is_allowed_only_where_the_policy_says_so(world: Any) -> None:
    agreed = world.contract(simulation=True, privacy={"mechanism": "none"})
    assert refusal(world.policy(), agreed) is Reason.POLICY_MECHANISM
    assert check(world.policy(mechanisms=("none",)), agreed).domain == "ward"


@pytest.mark.parametrize(
    ("overlaps", "of", "charged"),
    [
        ({}, "a", ("a",)),
        ({"a": ("b",)}, "a", ("a", "b")),
        ({"a": ("b",)}, "b", ("b", "a")),
        ({"a": ("b",), "b": ("c",)}, "a", ("a", "b", "c")),
        ({"a": ("b",), "c": ("b",)}, "c", ("c", "b", "a")),
        ({"a": ("b",), "b": ("a",)}, "b", ("b", "a")),
        ({"a": ("a",)}, "a", ("a",)),
    ],
)
def test_a_use_charges_its_domain_first_and_all_that_share_examples(
    overlaps: dict[str, tuple[str, ...]], of: str, charged: tuple[str, ...]
) -> None:
    domains = {
        name: DomainPolicy(epsilon=1, delta=1e-5, overlaps=overlaps.get(name, ())) for name in "abc"
    }
    assert policy(domains=domains).charged_domains(of) == charged


@given(st.dictionaries(st.sampled_from("abcd"), st.sets(st.sampled_from("abcd"))))
def test_sharing_is_symmetric_and_transitive(overlaps: dict[str, set[str]]) -> None:
    domains = {
        name: DomainPolicy(epsilon=1, delta=1e-5, overlaps=tuple(sorted(overlaps.get(name, ()))))
        for name in "abcd"
    }
    found = policy(domains=domains)
    for name in "abcd":
        for other in found.charged_domains(name):
            assert set(found.charged_domains(other)) == set(found.charged_domains(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"coordinators": ()},
        {"domains": {}},
        {"models": ()},
        {"domains": {"ward": {"epsilon": 0, "delta": 1e-5}}},
        {"domains": {"ward": {"epsilon": float("inf"), "delta": 1e-5}}},
        {"domains": {"ward": {"epsilon": float("nan"), "delta": 1e-5}}},
        {"domains": {"ward": {"epsilon": 1, "delta": 0}}},
        {"domains": {"ward": {"epsilon": 1, "delta": 1}}},
        {"domains": {"ward": {"epsilon": 1, "delta": 1e-5, "overlaps": ["clinic"]}}},
        {"domains": {"ward": {"epsilon": 1, "delta": 1e-5, "composition": {"rule": "none"}}}},
        {"domains": {"ward": {"epsilon": 1, "delta": 1e-5, "person_column": ""}}},
        {"domains": {"../ward": {"epsilon": 1, "delta": 1e-5}}},
        {"min_noise_multiplier": 0},
        {"max_sampling_rate": 0},
        {"max_epsilon": 3},
    ],
)
def test_a_policy_out_of_range_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    value = {**policy().model_dump(mode="json"), **changes}
    with pytest.raises(UsageError, match=r"site\.toml") as error:
        parse(Policy, value, source="site.toml")
    assert "\n" not in str(error.value)


def of_persons(column: str | None) -> DataTerms:
    """Returns a table, and which of its columns tells persons apart."""
    table = Table(
        columns=(Numeric(name="age", low=20, high=80),),
        target=Target(name="ill", classes=("no", "yes")),
        group=column,
    )
    return DataTerms(name="table", shape=(1,), classes=2, preparation=table)


@pytest.mark.parametrize(
    ("named", "asked"),
    [(None, None), ("patient", None), ("patient", "patient"), ('a "b"', 'a "b"')],
)
def test_a_person_is_told_apart_by_the_column_that_the_site_names(
    world: Any, named: str | None, asked: str | None
) -> None:
    agreed = world.contract(data=of_persons(asked))
    assert check(world.policy(domain={"person_column": named}), agreed).domain == "ward"


@pytest.mark.parametrize(("named", "asked"), [(None, "ward"), ("patient", "ward")])
def test_a_contract_cannot_choose_the_column_that_tells_persons_apart(
    world: Any, named: str | None, asked: str
) -> None:
    """Else a server could have one row less of a file let another in, and charge for one."""
    limits = world.policy(domain={"person_column": named})
    remedy = (
        r"column 'ward': person_column = \"ward\" in domains\.ward allows it, and says that what "
        "is protected there is a person's rows as they are kept"
    )
    with pytest.raises(Refusal, match=remedy) as no:
        check(limits, world.contract(data=of_persons(asked)))
    assert no.value.reason is Reason.POLICY_DOMAIN


def test_a_charge_by_a_policy_that_could_name_no_column_stands(world: Any) -> None:
    agreed = world.contract(data=of_persons("patient"))
    assert check_charged(world.policy(), agreed).domain == "ward"
    with pytest.raises(Refusal, match="column 'patient'"):
        check_charged(world.policy(domain={"person_column": "household"}), agreed)


def test_a_policy_that_names_no_column_keeps_the_name_it_had_before_there_was_one() -> None:
    before = "9237fab4f605b5ae4f1d143f2036b1446348d3d7abf1c2d3544682217dacf974"
    assert policy().sha256 == before
    named = policy(domains={"ward": {"epsilon": 8, "delta": 1e-5, "person_column": "patient"}})
    assert named.sha256 != before
    assert parse(Policy, canonical.decode(named.to_bytes()), source="policy") == named


@pytest.mark.parametrize("order", [1, 257, 2.5, "x"])
def test_a_filter_takes_a_whole_order_in_range(order: Any) -> None:
    with pytest.raises(ValidationError):
        DomainPolicy.model_validate(
            {"epsilon": 1, "delta": 1e-5, "composition": {"rule": "filter", "order": order}}
        )


def test_a_policy_is_read_back_from_its_canonical_form_by_the_same_name() -> None:
    one = policy(domains={"ward": menu((0.1, 1.5, 10))})
    again = parse(Policy, canonical.decode(one.to_bytes()), source="policy")
    assert again == one
    assert again.sha256 == one.sha256 == canonical.sha256(one.to_bytes())
    assert policy().sha256 != one.sha256


@pytest.mark.parametrize(("delta", "size", "fits"), [(1e-5, 99_999, True), (1e-5, 100_000, False)])
def test_delta_stays_under_one_over_the_nominal_size(delta: float, size: int, fits: bool) -> None:
    if fits:
        check_delta(delta, size)
        return
    with pytest.raises(UsageError, match="1/100000"):
        check_delta(delta, size)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan"), 1.0])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match="delta"):
        check_delta(delta, 1)


def evaluating(world: Any, sigma: float, size: int = 100) -> Any:
    agreed = world.contract()
    site = agreed.cohort[0].model_copy(update={"nominal_size": size})
    asked = EvaluationTerms(every=2, noise_multiplier=sigma)
    return agreed.model_copy(update={"cohort": (site,), "evaluation": asked})


def test_evaluation_is_refused_unless_the_policy_allows_it(world: Any) -> None:
    assert not world.policy().evaluation
    assert refusal(world.policy(), evaluating(world, 4.0)) is Reason.POLICY_EVALUATION
    assert check(world.policy(evaluation=True), evaluating(world, 4.0)).name == "alpha"


@pytest.mark.parametrize(("sigma", "size"), [(5.0, 100), (0.5, 10), (50.0, 1000)])
def test_evaluation_is_refused_where_it_would_mean_nothing(
    world: Any, sigma: float, size: int
) -> None:
    """A standard error of the accuracy of 2σ / nominal size, and no more than 0.1 of it."""
    allowed = world.policy(evaluation=True)
    assert check(allowed, evaluating(world, sigma, size)).nominal_size == size
    for more, less in ((sigma * 1.001, size), (sigma, size - 1)):
        with pytest.raises(
            Refusal, match=r"standard error of 0\.1.* over 0\.1: it would cost"
        ) as no:
            check(allowed, evaluating(world, more, less))
        assert no.value.reason is Reason.POLICY_EVALUATION


def test_a_noised_accuracys_error_is_what_the_policy_computes() -> None:
    generator = np.random.default_rng(1)
    noise = np.sqrt(2) * 20.0 * generator.standard_normal((2, 200_000))
    found = ((990 + noise[0]) / (1000 + noise[1])).std()
    asked = EvaluationTerms(every=1, noise_multiplier=20.0)
    assert found == pytest.approx(evaluation_error(asked, 1000), rel=0.02)


def test_the_least_noise_holds_for_evaluations_too(world: Any) -> None:
    limits = {"evaluation": True, "min_noise_multiplier": 1.5}
    assert refusal(world.policy(**limits), evaluating(world, 1.4999)) is Reason.POLICY_NOISE
    assert check(world.policy(**limits), evaluating(world, 1.5)).name == "alpha"


@pytest.mark.parametrize("listed", [(1.0, 3.9, 9), (0.9, 4.0, 9)])
def test_an_evaluation_off_the_menu_is_refused(world: Any, listed: Any) -> None:
    trained = (0.1, 1.5, 14)
    off = world.policy(evaluation=True, domains={"ward": menu(trained, listed)})
    assert refusal(off, evaluating(world, 4.0)) is Reason.POLICY_MENU
    on = world.policy(evaluation=True, domains={"ward": menu(trained, (1.0, 4.0, 9))})
    assert check(on, evaluating(world, 4.0)).name == "alpha"
