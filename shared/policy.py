"""The policy: a site's own hard limits, which no message can change."""

from __future__ import annotations

import json
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from bract.shared import canonical
from bract.shared.configuration import Frozen
from bract.shared.contract import Contract
from bract.shared.errors import Reason, Refusal, UsageError
from bract.shared.preparation import Label
from bract.shared.terms import (
    Delta,
    EvaluationTerms,
    Grown,
    Hex32,
    Mechanism,
    Name,
    SiteTerms,
)

# Above this standard error a noised accuracy says nothing, and would be paid for all the same.
GREATEST_EVALUATION_ERROR = 0.1


class MenuClass(Frozen):
    """One kind of step that a site will ever take, and how many of it at the most."""

    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)
    max_steps: int = Field(ge=1)


class MenuLeft(MenuClass):
    """A class of a menu, and how many of its steps a ledger leaves."""

    left: int = Field(ge=0)

    @property
    def words(self) -> str:
        """What is left, as a line says it."""
        kind = f"q {self.sampling_rate:.4g}, σ {self.noise_multiplier:.4g}"
        return f"{self.left} of {self.max_steps} steps at {kind}"


class Filter(Frozen):
    """A Rényi filter at one order: sound for contracts chosen after seeing earlier releases.

    Feldman & Zrnic 2021, arXiv 2008.11193: the Rényi divergences of adaptively chosen Gaussian
    steps add at an order that is fixed beforehand, and stopping when the sum would pass the
    bound keeps the bound. `order` None takes the order that suits ε and δ best.
    """

    rule: Literal["filter"] = "filter"
    order: int | None = Field(default=None, ge=2, le=256)


class Menu(Frozen):
    """A fixed menu whose whole composition is within ε: any order and any early stop is covered."""

    rule: Literal["menu"] = "menu"
    classes: tuple[MenuClass, ...] = Field(min_length=1)

    @field_validator("classes")
    @classmethod
    def _each_class_once(cls, classes: tuple[MenuClass, ...]) -> tuple[MenuClass, ...]:
        kinds = [(entry.sampling_rate, entry.noise_multiplier) for entry in classes]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"(q {kind[0]}, σ {kind[1]}) is listed twice; add its steps up")
        return classes


class DomainPolicy(Grown):
    """The budget of one body of data, and the domains that share examples with it.

    `person_column` allows contracts that keep only the first rows of equal cells there. What is
    protected then is a person's rows as they are kept: one row less of a person who has more lets
    another take its place.
    """

    later: ClassVar[frozenset[str]] = frozenset({"person_column"})

    epsilon: float = Field(gt=0)
    delta: Delta
    composition: Filter | Menu = Field(default=Filter(), discriminator="rule")
    overlaps: tuple[Name, ...] = ()
    person_column: Label | None = None


class Policy(Frozen):
    """What one site allows: budgets by domain, mechanisms, models, least σ and greatest q.

    `evaluation` allows contracts that ask for noised scores on the site's own examples.
    """

    site: Name
    coordinators: tuple[Hex32, ...] = Field(min_length=1)
    domains: dict[Name, DomainPolicy] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    mechanisms: tuple[Mechanism, ...] = ("dp-sgd",)
    min_noise_multiplier: float = Field(default=0.3, gt=0)
    max_sampling_rate: float = Field(default=1.0, gt=0, le=1)
    evaluation: bool = False

    @field_validator("domains")
    @classmethod
    def _overlaps_are_declared(cls, domains: dict[str, DomainPolicy]) -> dict[str, DomainPolicy]:
        for name, domain in domains.items():
            missing = sorted(set(domain.overlaps) - set(domains))
            if missing:
                raise ValueError(f"domain {name!r} overlaps {missing[0]!r}, which is not declared")
        return domains

    @cached_property
    def sha256(self) -> str:
        """The policy's name in every ledger entry: SHA-256 of its canonical JSON."""
        return canonical.sha256(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON of the policy."""
        return self._text

    @cached_property
    def _text(self) -> bytes:
        return canonical.encode(self.model_dump(mode="json"))

    def charged_domains(self, domain: str) -> tuple[str, ...]:
        """Returns the domains that one use of `domain` charges: itself first, then its overlaps.

        Overlap is symmetric and transitive: sharing is declared from either side.
        """
        found = [domain]
        for name in found:
            declared = set(self.domains[name].overlaps)
            reverse = {other for other, terms in self.domains.items() if name in terms.overlaps}
            found.extend(sorted((declared | reverse) - set(found)))
        return tuple(found)


def check(policy: Policy, contract: Contract) -> SiteTerms:
    """Returns this site's terms where the contract keeps to the policy.

    Depends on the contract and the policy alone, so that a refusal tells nothing of the data.

    Raises:
        Refusal: with the reason; the detail is for this site's operator.
    """
    terms = check_charged(policy, contract)
    _check_persons(policy, contract, terms)
    return terms


def check_charged(policy: Policy, contract: Contract) -> SiteTerms:
    """Returns the same for a contract that a ledger was charged by.

    An earlier version's policies could name no column of persons: one that names none says nothing
    of it here.

    Raises:
        Refusal: as `check` does.
    """
    terms = contract.site(policy.site)
    if terms is None:
        raise Refusal(Reason.NOT_IN_CONTRACT, f"the contract does not list {policy.site!r}")
    if terms.domain not in policy.domains:
        raise Refusal(Reason.POLICY_DOMAIN, f"the policy has no domain {terms.domain!r}")
    if contract.model.name not in policy.models:
        raise Refusal(Reason.POLICY_MODEL, f"add {contract.model.name!r} to models to allow it")
    privacy = contract.privacy
    if privacy.mechanism not in policy.mechanisms:
        raise Refusal(Reason.POLICY_MECHANISM, f"mechanism {privacy.mechanism!r} is not allowed")
    if privacy.mechanism == "dp-sgd":
        _check_private(policy, contract, terms)
    elif privacy.mechanism == "user-level" and (
        privacy.noise_multiplier < policy.min_noise_multiplier
    ):
        raise Refusal(Reason.POLICY_NOISE, f"σ {privacy.noise_multiplier} is too low")
    if contract.evaluation is not None:
        _check_evaluation(policy, contract.evaluation, terms)
    if policy.domains[terms.domain].person_column is not None:
        _check_persons(policy, contract, terms)
    return terms


def _check_persons(policy: Policy, contract: Contract, terms: SiteTerms) -> None:
    asked = contract.data.person_column
    if asked not in (None, policy.domains[terms.domain].person_column):
        raise Refusal(
            Reason.POLICY_DOMAIN,
            f"the contract keeps only the first rows of equal cells in the column {asked!r}: "
            f"person_column = {json.dumps(asked, ensure_ascii=False)} in domains.{terms.domain} "
            "allows it, and says that what is protected there is a person's rows as they are kept",
        )


def _check_private(policy: Policy, contract: Contract, terms: SiteTerms) -> None:
    privacy, domain = contract.privacy, policy.domains[terms.domain]
    if domain.delta >= 1 / terms.nominal_size:
        raise Refusal(
            Reason.POLICY_DELTA,
            f"delta {domain.delta} is not below one over the nominal size {terms.nominal_size}",
        )
    if privacy.noise_multiplier < policy.min_noise_multiplier:
        raise Refusal(
            Reason.POLICY_NOISE,
            f"σ {privacy.noise_multiplier} is under min_noise_multiplier "
            f"{policy.min_noise_multiplier}",
        )
    if privacy.sampling_rate > policy.max_sampling_rate:
        raise Refusal(
            Reason.POLICY_SAMPLING,
            f"q {privacy.sampling_rate} is over max_sampling_rate {policy.max_sampling_rate}",
        )
    if isinstance(domain.composition, Menu) and not any(
        entry.sampling_rate == privacy.sampling_rate
        and entry.noise_multiplier == privacy.noise_multiplier
        for entry in domain.composition.classes
    ):
        raise Refusal(
            Reason.POLICY_MENU,
            f"(q {privacy.sampling_rate}, σ {privacy.noise_multiplier}) is not on the menu",
        )


def _check_evaluation(policy: Policy, asked: EvaluationTerms, terms: SiteTerms) -> None:
    if not policy.evaluation:
        raise Refusal(
            Reason.POLICY_EVALUATION,
            "the contract asks for scores on this site's examples: evaluation = true allows it",
        )
    error = evaluation_error(asked, terms.nominal_size)
    if error > GREATEST_EVALUATION_ERROR:
        raise Refusal(
            Reason.POLICY_EVALUATION,
            f"with σ {asked.noise_multiplier} and nominal size {terms.nominal_size} the accuracy "
            f"would have a standard error of {error:.2g}, over {GREATEST_EVALUATION_ERROR}: it "
            "would cost privacy and mean nothing",
        )
    if asked.noise_multiplier < policy.min_noise_multiplier:
        raise Refusal(
            Reason.POLICY_NOISE,
            f"evaluation σ {asked.noise_multiplier} is under min_noise_multiplier "
            f"{policy.min_noise_multiplier}",
        )
    composition = policy.domains[terms.domain].composition
    if isinstance(composition, Menu) and not any(
        entry.sampling_rate == 1 and entry.noise_multiplier == asked.noise_multiplier
        for entry in composition.classes
    ):
        raise Refusal(
            Reason.POLICY_MENU,
            f"an evaluation (q 1, σ {asked.noise_multiplier}) is not on the menu",
        )


def evaluation_error(asked: EvaluationTerms, nominal_size: int) -> float:
    """Returns the standard error of a noised accuracy, at the most: 2σ / nominal size.

    Each of the two counts has noise of √2·σ; the error of their ratio a = correct / total is
    √2·σ·√(1 + a²) / total, and a ≤ 1.
    """
    return 2 * asked.noise_multiplier / nominal_size


def check_delta(delta: float, nominal_size: int) -> None:
    """Returns where δ < 1 / nominal size; above it, releasing one whole record would be allowed.

    Raises:
        UsageError: naming the greatest sensible δ.
    """
    if not 0 < delta < 1 / nominal_size:
        raise UsageError(
            f"delta {delta} must be above 0 and below 1/{nominal_size} = {1 / nominal_size:.3g}, "
            "one over the nominal size"
        )
