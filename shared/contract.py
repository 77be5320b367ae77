"""The contract: the frozen, public facts of one run, hashed and signed by the coordinator."""

from __future__ import annotations

import secrets
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from bract.shared import canonical, keys
from bract.shared.configuration import Frozen, parse
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.preparation import Preparation, Table

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,199}$")]
Scalar = bool | int | float | str
Task = Literal["classes", "next-token", "value"]

Mechanism = Literal["dp-sgd", "user-level", "none"]
Unit = Literal["example", "client"]

ADJACENCY: Literal["add-or-remove-one"] = "add-or-remove-one"
MAX_STEPS = 10_000_000


class _Grown(Frozen):
    """Terms that gained fields: a field of `later` is written only where it says something.

    So a contract that was signed before there was such a field keeps its bytes and its hash, and
    the ledgers that hold it can be verified for ever.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields, values = type(self).model_fields, dump(self)
        return {
            name: value
            for name, value in values.items()
            if name not in self.later or getattr(self, name) != fields[name].default
        }


class ModelTerms(_Grown):
    """Which model: a registered name or `module:factory`, and its options.

    `frozen` is the SHA-256 of the parameters that are not trained and so never sent: a site and
    the server must hold the same ones from the start.
    """

    later: ClassVar[frozenset[str]] = frozenset({"frozen"})

    name: str = Field(min_length=1, max_length=200)
    options: dict[str, Scalar] = Field(default={})
    frozen: Hex32 | None = None


class DataTerms(_Grown):
    """What an example looks like, what is learned of it, and the public constants for both.

    An input x of `shape` becomes (x − offset) / scale. With a `vocabulary` it is a row of tokens
    instead, whole numbers from 0 up to that, and stays as it is. `task` is "classes" (one label of
    `classes`), "next-token" (the token after each place; `classes` is the vocabulary) or "value" (a
    number, by its squared error; `classes` is 1). `preparation` says how files become inputs, for
    data sets that do not know it by themselves, and `options` are those of data sets that take
    some. `public` is the SHA-256 of the validation and test
    examples that the server holds, which the contract so declares public.
    """

    later: ClassVar[frozenset[str]] = frozenset({"task", "vocabulary", "preparation", "options"})

    name: str = Field(min_length=1, max_length=200)
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    classes: int = Field(ge=1)
    task: Task = "classes"
    vocabulary: int | None = Field(default=None, ge=2, le=10_000_000)
    offset: float = 0.0
    scale: float = Field(default=1.0, gt=0)
    preparation: Preparation | None = None
    options: dict[str, Scalar] = Field(default={})
    public: Hex32 | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DataTerms:
        if self.task == "classes" and self.classes < 2:
            raise ValueError(f"classes {self.classes} must be at least 2 to tell apart")
        if self.task == "value" and self.classes != 1:
            raise ValueError(f"classes {self.classes} must be 1 where a number is learned")
        if self.task == "next-token" and self.classes != self.vocabulary:
            raise ValueError(
                f"classes {self.classes} must be the vocabulary {self.vocabulary} where the next "
                "token is learned"
            )
        if self.vocabulary is not None and len(self.shape) != 1:
            raise ValueError(f"shape {list(self.shape)} must be one axis, that of the tokens")
        return self

    def __hash__(self) -> int:
        """Returns a hash of all terms; the options, a dict, have none of their own."""
        return hash(self._text)

    @cached_property
    def _text(self) -> str:
        return self.model_dump_json()

    @property
    def rows_per_person(self) -> int | None:
        """How many examples one person has at the most, None where nothing tells persons apart."""
        if not isinstance(self.preparation, Table) or self.preparation.group is None:
            return None
        return self.preparation.rows_per_group or 1

    def scaled(self, offset: float | None, scale: float | None) -> DataTerms:
        """Returns the terms with other constants, where these are given."""
        given = {"offset": offset, "scale": scale}
        return self.model_copy(update={k: v for k, v in given.items() if v is not None})


class TrainingTerms(_Grown):
    """How weights move: everything here but the views is post-processing of protected sums.

    Each step sees `views` random views of every image that it samples, moved by up to an eighth of
    a side, or mirrored too. Their mean loss is one example's, clipped as one: free of charge too.
    With the `server_schedule` "linear" the server's learning rate falls from round to round, to a
    tenth: late steps move less by the noise.
    """

    later: ClassVar[frozenset[str]] = frozenset({"views", "augmentation", "server_schedule"})

    local_steps: int = Field(ge=1, le=MAX_STEPS)
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    server_learning_rate: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.0, ge=0, lt=1)
    server_schedule: Literal["constant", "linear"] = "constant"
    views: int = Field(default=1, ge=1, le=64)
    augmentation: Literal["none", "shift", "shift-flip"] = "none"

    def server_rate(self, round_number: int, rounds: int) -> float:
        """Returns the server's learning rate at a round of so many, from 1."""
        if self.server_schedule == "constant":
            return self.server_learning_rate
        return self.server_learning_rate * (1 - 0.9 * (round_number - 1) / rounds)

    @model_validator(mode="after")
    def _views_differ(self) -> TrainingTerms:
        if self.views > 1 and self.augmentation == "none":
            raise ValueError(f"views {self.views} would be equal: set augmentation to shift")
        return self


class PrivacyTerms(Frozen):
    """The mechanism: clipping to C, and noise of standard deviation σ·C.

    "dp-sgd" protects an example: each site samples at rate q, clips every example's gradient and
    noises the sum of each step. "user-level" protects a site, the unit "client": its steps are
    plain, its whole update is clipped, and the server noises the sum of a round once. That server
    sees what is not noised yet, so only a simulation may run it. McMahan, Ramage, Talwar & Zhang
    2018 (arXiv 1710.06963), without amplification: sites are chosen by the server.
    """

    mechanism: Mechanism = "dp-sgd"
    randomness: Literal["csprng", "seeded"] = "csprng"
    adjacency: Literal["add-or-remove-one"] = ADJACENCY
    unit: Unit = "example"
    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(ge=0)
    clip_norm: float = Field(gt=0)

    @model_validator(mode="after")
    def _noise_where_promised(self) -> PrivacyTerms:
        if self.mechanism != "none" and self.noise_multiplier <= 0:
            raise ValueError(
                f"noise_multiplier must be above 0 for the mechanism {self.mechanism!r}"
            )
        unit = "client" if self.mechanism == "user-level" else "example"
        if self.unit != unit:
            raise ValueError(f"unit must be {unit!r} for the mechanism {self.mechanism!r}")
        return self


class EvaluationTerms(Frozen):
    """Local evaluation: each site scores the weights of every `every`-th round on its examples.

    Two counts leave with noise: how many are right, and how many there are. One example changes
    each by at most 1, so their L2 sensitivity is √2; `noise_multiplier` is relative to it.
    """

    every: int = Field(ge=1, le=1_000_000)
    noise_multiplier: float = Field(gt=0)

    def falls_on(self, round_number: int) -> bool:
        """Returns whether a round is evaluated."""
        return round_number % self.every == 0

    def most(self, *, attempts: int, completed: int) -> int:
        """Returns how many evaluations are charged at the most by so many attempts.

        Args:
            attempts: all of them, in the order of the rounds.
            completed: how many rounds they completed; every other one may have been at a round
                that is evaluated, once the first such round was reached.
        """
        if completed + 1 < self.every:
            return 0
        return completed // self.every + attempts - completed


class SiteTerms(Frozen):
    """One site of the cohort; `nominal_size` is public, its weight and its normaliser.

    The true number of examples is never written down.
    """

    name: Name
    key: Hex32
    domain: Name
    nominal_size: int = Field(ge=1)


class Contract(_Grown):
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


def check_evaluation(evaluation: EvaluationTerms | None, rounds: int) -> None:
    """Returns where some round is evaluated, or none is meant to be.

    Raises:
        ValueError: naming both numbers.
    """
    if evaluation is not None and evaluation.every > rounds:
        raise ValueError(
            f"evaluation.every {evaluation.every} is over the {rounds} rounds: no round would be "
            "evaluated; lower it"
        )


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
