"""The canary register: a model with a column of its own for every canary, and data for it.

Both are ordinary factories, `module:factory`, that a contract names, so that a site has no branch
for an audit. A canary is an example of the audited data set, which must be public, with a number in
front. Its loss is lessened by S·bank[number], so the gradient has a coordinate that no other
example touches.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bract.shared import models, tasks
from bract.shared.arrays import Arrays
from bract.shared.configuration import parse
from bract.shared.data import Examples, dataset, load, load_public
from bract.shared.data.examples import UNREADABLE
from bract.shared.errors import UsageError
from bract.shared.models.frozen import FrozenFront
from bract.shared.terms import DataTerms, ModelTerms, Scalar, Task
from bract.simulations.audits import beside

MODEL = "bract.simulations.audits.register:model"
DATA = "bract.simulations.audits.register:data"
_BANKS = ("bank.weight", "back.bank.weight")


def model(
    shape: tuple[int, ...],
    classes: int,
    *,
    vocabulary: int | None = None,
    task: Task = "classes",
    audited: str = "{}",
    base: str = "{}",
    rows: int = 0,
    strength: float = 1.0,
) -> nn.Module:
    """Returns an audited model beside its register.

    Args:
        shape: of the data with the number in front.
        classes: of the data.
        vocabulary: of the data.
        task: of the data.
        audited: the terms of the audited model, as JSON.
        base: the terms of the data that it is for, as JSON.
        rows: canaries and void coordinates.
        strength: S.
    """
    terms, made = _data_terms(base), parse(ModelTerms, json.loads(audited), source="audited")
    alone = models.of(made, terms)
    if isinstance(alone, FrozenFront):
        front = beside.NumberedFront(alone.front, terms, rows)
        back = beside.RegisteredBack(alone.back, rows=rows, strength=float(strength))
        return FrozenFront(front, back, ended=alone.ended)
    return beside.Registered(alone, terms, rows=rows, strength=float(strength))


def bank_of(arrays: Arrays) -> str:
    """Returns the name of the register among the parameters of a model beside it."""
    return next(name for name in _BANKS if name in arrays)


@dataclass(frozen=True)
class data:
    """Canaries of several sites, and one site that holds nothing a gradient comes of.

    Args:
        base: the terms of the audited data set, as JSON.
        canaries: how many each site may hold; each is in with probability ½.
        void: coordinates that no canary has.
        sites: that hold canaries; the one behind them is blank.
        seed: decides which canaries are in.
        made_up: whether the examples are random numbers in the data set's shape, and not its own.
    """

    base: str = "{}"
    canaries: int = 1
    void: int = 1
    sites: int = 1
    seed: int = 0
    made_up: bool = False

    @property
    def terms(self) -> DataTerms:
        """An example: the number in front, then the input, flat."""
        base = _data_terms(self.base)
        rows = self.canaries + self.void
        width = beside.places_in_front(base, rows) + math.prod(base.shape)
        return base.model_copy(
            update={
                "shape": (width,),
                "offset": 0.0,
                "scale": 1.0,
                "preparation": None,
                "options": {},
                "public": None,
            }
        )

    def train(self, folder: Path | None) -> Examples:
        """Returns the examples of all sites in their order, `canaries` each."""
        parts = [self.part(folder, str(site)) for site in range(self.sites + 1)]
        return Examples(
            inputs=np.concatenate([part.inputs for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
        )

    def public(self, folder: Path | None) -> tuple[Examples, Examples]:
        """Returns validation and test of the audited data, without a canary."""
        if self.made_up:
            some = _made_up(self.base, 64)
            return self._numbered(some), self._numbered(some)
        validation, test = _public(self.base, folder)
        return self._numbered(validation), self._numbered(test)

    def part(self, folder: Path | None, part: str) -> Examples:
        """Returns the examples of one site by its place; an example that is out adds nothing.

        So every site has as many, whatever the coins said.
        """
        site = int(part)
        found = self.examples(folder, site)
        held = included(self.seed, site, self.canaries) if site < self.sites else None
        out = np.ones(self.canaries, bool) if held is None else ~held
        numbers = np.where(out, self.canaries + self.void, np.arange(self.canaries))
        numbered = self._numbered(found, numbers)
        targets = numbered.targets.copy()
        targets[out] = np.nan if np.issubdtype(targets.dtype, np.floating) else UNREADABLE
        return Examples(inputs=numbered.inputs, targets=targets)

    def examples(self, folder: Path | None, site: int) -> Examples:
        """Returns what the canaries of a site are made of: other examples at each, if they do."""
        count = (self.sites + 1) * self.canaries
        train = _made_up(self.base, count) if self.made_up else _training(self.base, folder)
        if not len(train):
            raise UsageError("the audited data set has no training example to make canaries of")
        rows = (site * self.canaries + np.arange(self.canaries)) % len(train)
        return train.take(rows)

    def _numbered(
        self, examples: Examples, numbers: npt.NDArray[np.int64] | None = None
    ) -> Examples:
        base, rows = _data_terms(self.base), self.canaries + self.void
        if numbers is None:
            numbers = np.full(len(examples), rows)
        flat = examples.inputs.reshape(len(examples), -1)
        if base.vocabulary is None:
            column = numbers[:, None].astype(np.float32)
            inputs = np.concatenate([column, flat.astype(np.float32)], 1)
            return Examples(inputs, examples.targets)
        places = base.vocabulary ** np.arange(beside.places_in_front(base, rows))
        front = numbers[:, None] // places % base.vocabulary
        targets = examples.targets
        if base.task == "next-token":
            blank = np.full(front.shape, UNREADABLE, targets.dtype)
            targets = np.concatenate([blank, targets], 1)
        return Examples(np.concatenate([front, flat.astype(np.int64)], 1), targets)


def included(seed: int, site: int, canaries: int) -> npt.NDArray[np.bool_]:
    """Returns which canaries of a site are in, each with probability ½."""
    return np.random.default_rng([seed, site]).random(canaries) < 0.5


def model_terms(audited: ModelTerms, base: DataTerms, *, rows: int, strength: float) -> ModelTerms:
    """Returns the terms by which a contract names a model beside its register."""
    options: dict[str, Scalar] = {
        "audited": audited.model_dump_json(),
        "base": base.model_dump_json(),
        "rows": rows,
        "strength": strength,
    }
    return ModelTerms(name=MODEL, options=options)


def data_terms(
    base: DataTerms, *, canaries: int, void: int, sites: int, seed: int, made_up: bool
) -> DataTerms:
    """Returns the terms by which a contract names the canaries of an audit."""
    options: dict[str, Scalar] = {
        "base": base.model_dump_json(),
        "canaries": canaries,
        "void": void,
        "sites": sites,
        "seed": seed,
        "made_up": made_up,
    }
    return dataset(DATA).describe(options, None)


@lru_cache(maxsize=2)
def _training(base: str, folder: Path | None) -> Examples:
    """Returns the audited training examples; kept, as every contract of an audit asks for them."""
    return load(_data_terms(base), folder).train


@lru_cache(maxsize=2)
def _public(base: str, folder: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test of the audited data, kept likewise."""
    return load_public(_data_terms(base), folder)


@lru_cache(maxsize=4)
def _made_up(base: str, count: int) -> Examples:
    """Returns examples that are no one's, as they would be read."""
    terms = _data_terms(base)
    inputs, targets = tasks.made_up(terms, count, torch.Generator().manual_seed(0))  # no secret
    raw = inputs if terms.vocabulary is not None else inputs * terms.scale + terms.offset
    return Examples(inputs=raw.numpy(), targets=targets.numpy())


@lru_cache(maxsize=16)
def _data_terms(text: str) -> DataTerms:
    return parse(DataTerms, json.loads(text), source="base")
