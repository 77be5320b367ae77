"""Public preparation: how a raw file becomes inputs, said in the contract and nowhere else.

Bounds, categories, labels, vocabularies and lengths are constants that everyone may know. Nothing
here is computed from private data, so nothing has to be paid for.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from bract.shared.configuration import Frozen

Label = Annotated[str, Field(min_length=1, max_length=200)]


def _each_once(labels: tuple[str, ...]) -> tuple[str, ...]:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"{label!r} is listed twice; list each once")
        seen.add(label)
    return labels


Labels = Annotated[
    tuple[Label, ...], Field(min_length=2, max_length=10_000), AfterValidator(_each_once)
]


class Numeric(Frozen):
    """A number, clipped to public bounds and scaled to [-1, 1]; two inputs: it, and 'missing'.

    A missing one is 0, the middle. `missing` are cells that mean so in this column alone.
    """

    kind: Literal["numeric"] = "numeric"
    name: Label
    low: float
    high: float
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some_width(self) -> Numeric:
        _check_bounds(f"column {self.name!r}", self.low, self.high)
        return self

    @property
    def width(self) -> int:
        """How many inputs it becomes."""
        return 2


class Categorical(Frozen):
    """One of public categories: an input for each, then 'other' and 'missing'.

    A category that is a number is met by any cell of that number: '1.0' is the category 1.
    """

    kind: Literal["categorical"] = "categorical"
    name: Label
    categories: Annotated[
        tuple[Label, ...], Field(min_length=1, max_length=10_000), AfterValidator(_each_once)
    ]
    missing: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many inputs it becomes."""
        return len(self.categories) + 2


Column = Annotated[Numeric | Categorical, Field(discriminator="kind")]


class Target(Frozen):
    """What is to be learned: one of `classes`, or a number within public bounds.

    A number y is learned as 2·(y − low) / (high − low) − 1, clipped to [-1, 1].
    """

    name: Label
    classes: Labels | None = None
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _classes_or_bounds(self) -> Target:
        given = [bound for bound in (self.low, self.high) if bound is not None]
        if len(given) != (2 if self.classes is None else 0):
            raise ValueError(f"target {self.name!r} needs either classes or both low and high")
        if given:
            _check_bounds(f"target {self.name!r}", *given)
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest number, None where classes are learned."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def _check_bounds(what: str, low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"{what}: low {low} must be below high {high}")
    if max(-low, high) > 1e300:
        raise ValueError(f"{what}: bounds must lie within ±1e300")


class Table(Frozen):
    """A table with named columns; `missing` are the cells that mean 'not there' in any column.

    What is missing where is said by text or by number: '-9.0' is the missing word -9. Rows with
    equal cells in the column `group` are one person's: of each person the first `rows_per_group`
    rows are used at each site, the others left out. That is known to everyone, so that a person's ε
    can be told.
    """

    kind: Literal["table"] = "table"
    columns: tuple[Column, ...] = Field(min_length=1, max_length=10_000)
    target: Target
    missing: tuple[str, ...] = ("", "?", "NA")
    group: Label | None = None
    rows_per_group: int | None = Field(default=None, ge=1, le=1000)

    @model_validator(mode="after")
    def _rows_of_somebody(self) -> Table:
        if self.rows_per_group is not None and self.group is None:
            raise ValueError("rows_per_group needs the column that tells persons apart: set group")
        return self

    @model_validator(mode="after")
    def _each_column_says_one_thing(self) -> Table:
        names = {self.target.name}
        for column in self.columns:
            if column.name in names:
                raise ValueError(f"column {column.name!r} is listed twice; list each column once")
            names.add(column.name)
            if isinstance(column, Categorical):
                absent = {*self.missing, *column.missing}.intersection(column.categories)
                if absent:
                    raise ValueError(
                        f"column {column.name!r}: {min(absent)!r} is a category and means missing "
                        "too; set missing"
                    )
        return self

    @property
    def width(self) -> int:
        """How many inputs a row becomes."""
        return sum(column.width for column in self.columns)


class Text(Frozen):
    """Text as `length` tokens, cut or filled up; labels as the file writes them.

    `tokens`: "bytes" are 1 to 256 for the bytes of UTF-8 and 0 where the text has ended.
    "byte-pairs" are those, joined within words by `merges` in their order (Sennrich et al. 2016,
    arXiv 1508.07909): the i-th joins two earlier tokens into the token 257 + i. They were learned
    from public text. "pretrained" is the tokenizer that comes with the pretrained model `source`,
    held to the SHA-256 of its file.
    """

    kind: Literal["text"] = "text"
    length: int = Field(ge=1, le=100_000)
    labels: Labels
    tokens: Literal["bytes", "byte-pairs", "pretrained"] = "bytes"
    merges: tuple[tuple[int, int], ...] = Field(default=(), max_length=50_000)
    source: str | None = Field(default=None, min_length=1, max_length=200)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _of_its_tokens(self) -> Text:
        if self.merges and self.tokens != "byte-pairs":
            raise ValueError(f"merges are for the tokens 'byte-pairs', not for {self.tokens!r}")
        if (self.source is not None) != (self.tokens == "pretrained"):
            raise ValueError("source goes with the tokens 'pretrained': give both or neither")
        if self.sha256 is not None and self.source is None:
            raise ValueError("sha256 is of the tokenizer's file: give its source too")
        for place, pair in enumerate(self.merges):
            if not all(1 <= token < 257 + place for token in pair):
                raise ValueError(f"merge {place + 1} joins tokens that are not there yet")
        if len(set(self.merges)) < len(self.merges):
            raise ValueError("merges join a pair twice; join each pair once")
        return self


class Images(Frozen):
    """Images of one size, one folder for each label; `colour` keeps red, green and blue.

    An image of another size is resized to `height` and `width` pixels.
    """

    kind: Literal["images"] = "images"
    labels: Labels
    height: int = Field(default=32, ge=1, le=4096)
    width: int = Field(default=32, ge=1, le=4096)
    colour: bool = True


Preparation = Annotated[Table | Text | Images, Field(discriminator="kind")]
