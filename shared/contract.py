"""The contract: the frozen, public facts of one run, hashed and signed by the coordinator."""

from __future__ import annotations

import secrets
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bract.shared import canonical, keys
from bract.shared.configuration import Frozen, parse
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.terms import (
    DataTerms,
    EvaluationTerms,
    Grown,
    Hex32,
    ModelTerms,
    Name,
    PrivacyTerms,
    SiteTerms,
    TrainingTerms,
    check_evaluation,
)


class Contract(Grown):
    """One run, as every site and the server read it.

    `max_attempts` ≥ `rounds` bounds the charges at one site: a crashed round is charged again, so
    the budget is checked for `max_attempts`, not for `rounds`. `witness` is the key by which the
    server countersigns the heads of the sites' ledgers. `sites_per_round` is how many sites of the
    cohort a round asks, None where it asks all: whom the server chooses is known to it, and makes
    no charge smaller.
    """

    later: ClassVar[frozenset[str]] = frozenset({"sites_per_round"})

    schema_version: Literal[1] = 1
    run: Name
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    coordinator: Hex32
    witness: Hex32 | None = None
    simulation: bool
    rounds: int = Field(ge=1, le=1_000_000)
    max_attempts: int = Field(ge=1, le=2_000_000)
    model: ModelTerms
    data: DataTerms
    training: TrainingTerms
    privacy: PrivacyTerms
    evaluation: EvaluationTerms | None = None
    cohort: tuple[SiteTerms, ...] = Field(min_length=1)
    sites_per_round: int | None = Field(default=None, ge=1)

    @field_validator("cohort")
    @classmethod
    def _names_are_unique(cls, cohort: tuple[SiteTerms, ...]) -> tuple[SiteTerms, ...]:
        names = [site.name for site in cohort]
        twice = (
            {name for name in names if names.count(name) > 1}
            if len(set(names)) < len(names)
            else set()
        )
        if twice:
            raise ValueError(f"site {min(twice)!r} is listed twice; name each site once")
        return cohort

    @model_validator(mode="after")
    def _consistent(self) -> Contract:
        if self.max_attempts < self.rounds:
            raise ValueError("max_attempts must be at least rounds")
        check_evaluation(self.evaluation, self.rounds)
        if self.sites_per_round is not None and self.sites_per_round > len(self.cohort):
            raise ValueError(
                f"sites_per_round {self.sites_per_round} is over the {len(self.cohort)} sites"
            )
        if self.evaluation is not None and self.privacy.unit == "client":
            raise ValueError("evaluation protects an example, not a client: leave it out")
        if self.evaluation is not None and self.data.task != "classes":
            raise ValueError(
                f"evaluation counts right labels, and the task {self.data.task!r} has none: leave "
                "evaluation out"
            )
        if self.training.augmentation != "none" and (
            self.data.vocabulary is not None or len(self.data.shape) != 3
        ):
            raise ValueError(
                f"augmentation {self.training.augmentation!r} is for images, and an example has "
                f"the shape {list(self.data.shape)}: leave it out"
            )
        private = self.privacy.mechanism == "dp-sgd" and self.privacy.randomness == "csprng"
        if not self.simulation and not private:
            raise ValueError(
                "only a simulation may be seeded, without noise, or noised at the server alone"
            )
        return self

    def site(self, name: str) -> SiteTerms | None:
        """Returns the terms of one site, or None where it is not in the cohort."""
        return self._sites.get(name)

    @cached_property
    def _sites(self) -> dict[str, SiteTerms]:
        return {site.name: site for site in self.cohort}

    def evaluates(self, round_number: int) -> bool:
        """Returns whether sites score the weights of a round on their own examples."""
        return self.evaluation is not None and self.evaluation.falls_on(round_number)

    @property
    def max_evaluations(self) -> int:
        """The most evaluations that one site is ever charged: those of all rounds, and the spare.

        A bound of its own: else attempts at evaluated rounds alone could pass what was agreed.
        """
        if self.evaluation is None:
            return 0
        return self.evaluation.most(attempts=self.max_attempts, completed=self.rounds)

    def weight(self, site: SiteTerms) -> int:
        """Returns the public weight of a site's update in the mean of a round."""
        # One client must change a noised sum by C at the most, however large it is.
        return 1 if self.privacy.unit == "client" else site.nominal_size

    @property
    def planned(self) -> int:
        """How many sites a round asks, where none has refused for good."""
        return self.sites_per_round or len(self.cohort)

    @property
    def rows_per_person(self) -> int | None:
        """How many examples one person has at the most, None where no person's ε follows of it."""
        # Of a whole site's protection nothing follows that is not said already.
        return self.data.rows_per_person if self.privacy.unit == "example" else None

    def normaliser(self, site: SiteTerms) -> float:
        """Returns the public constant that divides a site's noisy sum: q · nominal size.

        The true batch size would tell the batch (PRIVACY in the README).
        """
        return self.privacy.sampling_rate * site.nominal_size

    @cached_property
    def sha256(self) -> str:
        """The contract's name: SHA-256 of its canonical JSON."""
        return canonical.sha256(canonical.encode(self.model_dump(mode="json")))


class SignedContract(Frozen):
    """A contract beside the coordinator's signature of its hash."""

    contract: Contract
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON that travels and rests as contract.json."""
        return self._text

    @cached_property
    def _text(self) -> bytes:
        return canonical.encode(self.model_dump(mode="json"))

    def verify(self, coordinator: str) -> Contract:
        """Returns the contract where the pinned coordinator's key signed it.

        Raises:
            VerificationFailed: where another key is named, or the signature does not hold.
        """
        if self.contract.coordinator != coordinator:
            raise VerificationFailed("contract is signed by another coordinator than the pinned")
        keys.verify(coordinator, bytes.fromhex(self.signature), _digest(self.contract))
        return self.contract


def sign(contract: Contract, key: keys.SigningKey) -> SignedContract:
    """Returns the contract with the signature of the coordinator it names."""
    if key.public != contract.coordinator:
        raise UsageError("the contract names another coordinator key; sign with that one")
    return SignedContract(contract=contract, signature=key.sign(_digest(contract)).hex())


def new_nonce() -> str:
    """Returns 16 random bytes in hexadecimal: equal terms make different contracts."""
    return secrets.token_hex(16)


def from_bytes(text: bytes, *, source: str = "contract") -> SignedContract:
    """Returns the signed contract in canonical JSON; its signature is not yet verified.

    Raises:
        VerificationFailed: where the text is not canonical.
        UsageError: where a field is missing, unknown or out of range.
    """
    try:
        return _from_bytes(text)
    except (VerificationFailed, UsageError):
        return _parsed(text, source)  # raises again, in the name of this source


@lru_cache(maxsize=8)  # every order of a run carries the same one
def _from_bytes(text: bytes) -> SignedContract:
    return _parsed(text, "contract")


def _parsed(text: bytes, source: str) -> SignedContract:
    try:
        value: Any = canonical.decode(text)
    except VerificationFailed as error:
        raise VerificationFailed(f"{source} is not canonical JSON: fetch it again") from error
    signed = parse(SignedContract, value, source=source)
    if signed.to_bytes() != text:
        raise VerificationFailed(f"{source} is not in canonical form")
    # The one object that every order then carries: thousands of sites are megabytes, to hold twice
    # and to compare with each message.
    signed.__dict__["_text"] = text
    return signed


def read(path: Path) -> SignedContract:
    """Returns the signed contract in a file; its signature is not yet verified."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the contract {path}: {error.strerror}") from error
    return from_bytes(text, source=str(path))


def _digest(contract: Contract) -> bytes:
    return canonical.tagged("contract/1", bytes.fromhex(contract.sha256))
