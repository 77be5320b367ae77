"""Public preparation: how a raw file becomes inputs, said in the contract and nowhere else.

Bounds, categories, labels, vocabularies and lengths are constants that everyone may know. Nothing
here is computed from private data, so nothing has to be paid for.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bract.shared.configuration import Frozen

Label = Annotated[str, Field(min_length=1, max_length=200)]
Labels = Annotated[tuple[Label, ...], Field(min_length=2, max_length=10_000)]


class Numeric(Frozen):
    """A number, clipped to public bounds and scaled to [-1, 1]; two inputs: it, and 'missing'."""

    kind: Literal["numeric"] = "numeric"
    name: Label
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some_width(self) -> Numeric:
        if self.low >= self.high:
            raise ValueError(f"column {self.name!r}: low {self.low} must be below high {self.high}")
        return self


class Categorical(Frozen):
    """One of public categories: an input for each, then 'other' and 'missing'."""

    kind: Literal["categorical"] = "categorical"
    name: Label
    categories: Annotated[tuple[Label, ...], Field(min_length=1, max_length=10_000)]
    missing: tuple[str, ...] = ()


class Target(Frozen):
    """What is to be learned: one of `classes`, or a number within public bounds.

    A number y is learned as 2·(y − low) / (high − low) − 1, clipped to [-1, 1].
    """

    name: Label
    classes: Labels | None = None
    low: float | None = Field(default=None, allow_inf_nan=False)
    high: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _classes_or_bounds(self) -> Target:
        bounds = self.low is not None and self.high is not None and self.low < self.high
        if (self.classes is None) != bounds:
            raise ValueError(f"target {self.name!r} needs either classes or low < high")
        return self


class Table(Frozen):
    """A table with named columns; `missing` are the cells that mean 'not there' in any column."""

    kind: Literal["table"] = "table"
    columns: tuple[Annotated[Numeric | Categorical, Field(discriminator="kind")], ...] = Field(
        min_length=1, max_length=10_000
    )
    target: Target
    missing: tuple[str, ...] = ("", "?", "NA")

    @field_validator("columns")
    @classmethod
    def _each_column_once(
        cls, columns: tuple[Numeric | Categorical, ...]
    ) -> tuple[Numeric | Categorical, ...]:
        names = [column.name for column in columns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"column {twice!r} is listed twice; list each column once")
        return columns

    @property
    def width(self) -> int:
        """How many inputs a row becomes."""
        return sum(
            2 if isinstance(column, Numeric) else len(column.categories) + 2
            for column in self.columns
        )


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

    @field_validator("labels")
    @classmethod
    def _each_label_once(cls, labels: Labels) -> Labels:
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"label {twice!r} is listed twice; list each label once")
        return labels

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
    """A folder of images, one folder for each label; `colour` keeps red, green and blue."""

    kind: Literal["images"] = "images"
    labels: Labels
    colour: bool = True


Preparation = Annotated[Table | Text | Images, Field(discriminator="kind")]
