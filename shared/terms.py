"""The terms of a contract, part by part: model, data, training, privacy, evaluation, sites."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from bract.shared.configuration import Frozen
from bract.shared.preparation import Preparation, Table

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,199}$")]
Scalar = bool | int | float | str
Task = Literal["classes", "next-token", "value"]

Mechanism = Literal["dp-sgd", "user-level", "none"]
Unit = Literal["example", "client"]

ADJACENCY: Literal["add-or-remove-one"] = "add-or-remove-one"
MAX_STEPS = 10_000_000
# Of a smaller δ the tails that decide on ε are lost in float64's rounding: PLD then tells less than
# it is, by 0.0005 of 120 at 1e-10 and by 0.05 at 1e-12.
LEAST_DELTA = 1e-9
Delta = Annotated[float, Field(ge=LEAST_DELTA, lt=1)]
# Of less ε is in the thousands: it protects nothing, and PLD takes gigabytes to tell it. Of more
# nothing is learned, and float64 no longer tells the privacy loss.
LEAST_NOISE, GREATEST_NOISE = 0.1, 1e5


def counted(number: int, noun: str) -> str:
    """Returns a number of things in words.

    Example:
        >>> counted(1, "row"), counted(3, "row")
        ('1 row', '3 rows')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def of_rows_kept(kept: int, replaced: str, noun: str = "row") -> str:
    """Returns in words of which persons' rows an ε holds where only so many of each are used.

    Args:
        kept: how many.
        replaced: the ε of a row that another replaces, with its δ where that is not said already.
        noun: what a row is called there.

    Example:
        >>> of_rows_kept(2, "8.26").split("; ")[1]
        'of a person with more, another row takes its place, and by replace-one ε is 8.26'
    """
    return (
        f"ε per {noun} holds where its person has no more than {counted(kept, noun)}; of a person "
        f"with more, another {noun} takes its place, and by replace-one ε is {replaced}"
    )


class Grown(Frozen):
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


class ModelTerms(Grown):
    """Which model: a registered name or `module:factory`, and its options.

    `frozen` is the SHA-256 of the parameters that are not trained and so never sent: a site and
    the server must hold the same ones from the start.
    """

    later: ClassVar[frozenset[str]] = frozenset({"frozen"})

    name: str = Field(min_length=1, max_length=200)
    options: dict[str, Scalar] = Field(default={})
    frozen: Hex32 | None = None


class DataTerms(Grown):
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
    def person_column(self) -> str | None:
        """The column that tells persons apart, None where nothing does."""
        return self.preparation.group if isinstance(self.preparation, Table) else None

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


class TrainingTerms(Grown):
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
    noise_multiplier: float = Field(ge=0, le=GREATEST_NOISE)
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
    noise_multiplier: float = Field(gt=0, le=GREATEST_NOISE)

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
