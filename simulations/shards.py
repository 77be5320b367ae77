"""Shards of a cohort: trained from weights in shared memory, checked and added up where made."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bract.client import permits
from bract.client.permits import Permit
from bract.client.site import Learner
from bract.client.training.together import Job
from bract.server.strategy import check_update
from bract.shared import arrays
from bract.shared.arrays import Arrays
from bract.shared.contract import SignedContract
from bract.shared.data import Examples
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.models import Shape
from bract.shared.updates import ProtectedScore, Update
from bract.simulations.sites import learner_of

logger = logging.getLogger("bract.simulations")

# A shard is this part of a cohort, and no more sites than that: small shards keep workers even,
# large ones let sites be trained together. Of what is left so much is in halves of that, and so
# much in quarters.
_SHARDS, _GREATEST_SHARD = 12, 16
_HALVED, _QUARTERED = 1 / 3, 1 / 8


@dataclass(frozen=True, slots=True)
class Shard:
    """Some sites of a cohort that one worker trains: (node's place, attempt) of each."""

    place: int
    round: int
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a site's training gave: the hash of its update, whether it is in the sum, its score.

    Without a hash there is none: the site failed, or its worker died.
    """

    update: str | None
    added: bool = False
    score: ProtectedScore | None = None
    failed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A shard's sum, each update times its site's weight, and what became of each site."""

    shard: Shard
    total: Mapping[str, npt.NDArray[np.float64]]
    outcomes: tuple[Outcome, ...]


class Board:
    """Weights where workers that are forked from this process read them, written once a round.

    Args:
        shapes: of the arrays, by name.
    """

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = dict(shapes)
        self._memory = mmap.mmap(-1, 4 * max(1, sum(map(math.prod, self._shapes.values()))))

    def write(self, weights: Arrays) -> None:
        """Replaces the weights; no worker may be at work."""
        for name, view in self._views(writable=True).items():
            view[...] = weights[name]

    def read(self) -> dict[str, arrays.Array]:
        """Returns views that cannot be written to."""
        return self._views(writable=False)

    def _views(self, *, writable: bool) -> dict[str, arrays.Array]:
        views: dict[str, arrays.Array] = {}
        start = 0
        for name, shape in self._shapes.items():
            count = math.prod(shape)
            view = np.frombuffer(self._memory, np.float32, count, start).reshape(shape)
            view.flags.writeable = writable
            views[name], start = view, start + 4 * count
        return views


class ShardTrainer:
    """Trains shards, in this process or in a worker that was forked from it.

    Args:
        plan: opens the sites.
        signed: the contract; every member's charge for it is committed.
        board: where the round's weights stand.
        shapes: what an update must have exactly.
    """

    def __init__(
        self, plan: Path, signed: SignedContract, board: Board, shapes: Mapping[str, Shape]
    ) -> None:
        self._plan, self._contract = plan, signed.contract
        self._board, self._shapes = board, shapes
        self._read: dict[int, list[Examples | Exception]] = {}

    def read(self, shard: Shard) -> None:
        """Opens the examples of a shard's sites, which `train` then finds."""
        self._read[shard.place] = [_opened(permit) for _, permit in self._members(shard)]

    def train(self, shard: Shard) -> Trained:
        """Returns what a shard gives; a site that fails is told, and adds nothing."""
        if shard.place not in self._read:
            self.read(shard)
        read, weights = self._read.pop(shard.place), self._board.read()
        total = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        members = list(self._members(shard))
        updates = self._updates(members, read, weights)
        outcomes = tuple(
            self._outcome(*member, found, weights, total)
            for member, found in zip(members, updates, strict=True)
        )
        return Trained(shard, total, outcomes)

    def _updates(
        self,
        members: Sequence[tuple[Learner, Permit]],
        read: Sequence[Examples | Exception],
        weights: Arrays,
    ) -> list[tuple[Job, Update] | Exception]:
        """Returns each site's update, from one pass where that can be."""
        found: list[tuple[Job, Update] | Exception] = [ValueError("not trained") for _ in members]
        jobs: dict[int, Job] = {}
        for place, ((learner, permit), examples) in enumerate(zip(members, read, strict=True)):
            try:
                if isinstance(examples, Exception):
                    raise examples
                jobs[place] = learner.job(permit, examples)
            except Exception as error:
                found[place] = error
        trainer = members[0][0].trainers.of(self._contract)
        try:
            updates = trainer.train_together(list(jobs.values()), weights)
            for place, update in zip(jobs, updates, strict=True):
                found[place] = jobs[place], update
        except Exception as error:
            for place in jobs:
                found[place] = error
        return found

    def _outcome(
        self,
        learner: Learner,
        permit: Permit,
        found: tuple[Job, Update] | Exception,
        weights: Arrays,
        total: dict[str, npt.NDArray[np.float64]],
    ) -> Outcome:
        """Returns what became of a site, whose update is added to the sum if it will do."""
        try:
            if isinstance(found, Exception):
                raise found
            job, update = found
            score = learner.score(permit, job, weights)
        except Exception as error:
            learner.refusal(error, permit.round)
            return Outcome(None, failed=True)
        name = arrays.digest(update.arrays)
        try:
            check_update(update, self._contract, permit.terms, self._shapes)
        except VerificationFailed as error:
            logger.warning("an update of %s is left out: %s", learner.name, error)
            return Outcome(name, score=score)
        for key, value in update.arrays.items():
            total[key] += np.float64(self._contract.weight(permit.terms)) * value
        return Outcome(name, added=True, score=score)

    def _members(self, shard: Shard) -> Iterator[tuple[Learner, Permit]]:
        for place, attempt in shard.members:
            learner, holdings = learner_of(self._plan, place)
            terms = self._contract.site(learner.name)
            if terms is None:
                raise BractError(f"the contract does not list {learner.name!r}")
            yield learner, permits.permit(holdings, self._contract, terms, shard.round, attempt)


def _opened(permit: Permit) -> Examples | Exception:
    try:
        return permit.open_examples()
    except Exception as error:
        return error


def shards_of(round_number: int, members: Sequence[tuple[int, int]]) -> list[Shard]:
    """Returns a cohort in parts, whatever the number of workers: the last ones are smaller.

    So that no worker is long at its last one while the others have none.
    """
    shards: list[Shard] = []
    size, start = min(math.ceil(len(members) / _SHARDS), _GREATEST_SHARD), 0
    while start < len(members):
        left = (len(members) - start) / len(members)
        part = 1 if left > _HALVED else 2 if left > _QUARTERED else 4
        end = min(start + math.ceil(size / part), len(members))
        shards.append(Shard(len(shards), round_number, tuple(members[start:end])))
        start = end
    return shards


def lost(shard: Shard) -> Trained:
    """Returns what is left of a shard whose worker died."""
    return Trained(shard, {}, tuple(Outcome(None) for _ in shard.members))
