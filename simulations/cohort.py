"""The in-process grid for many sites: a cohort is charged at once, trained by shards, added up.

One process holds the ledger file of all sites. It charges a whole cohort in one transaction, hands
shards of it to workers, adds their releases to the ledger as they come, and makes those durable at
once before any reply is given out. Workers send a shard's sum, not its updates: each update was
hashed for its release and checked as the server would. Weights lie once in memory that all share.
Shards do not depend on the number of workers, and so neither does the sum.
"""

from __future__ import annotations

import logging
import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MessageType

from bract.client import cohort
from bract.client.gate import Permit
from bract.client.site import Site
from bract.client.training.trainer import Job
from bract.server.strategy import check_update
from bract.shared import arrays, wire
from bract.shared.arrays import Arrays
from bract.shared.contract import SignedContract
from bract.shared.data import Examples
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.models import Shape
from bract.shared.privacy.ledger import Transaction
from bract.shared.updates import ProtectedScore, Update
from bract.simulations import flower
from bract.simulations.grid import FIRST_NODE, RUN, SERVER, SimulatedGrid, failed
from bract.simulations.sites import site_of
from bract.simulations.workers import Pool

logger = logging.getLogger("bract.simulations")

# A shard is this part of a cohort, and no more sites than that: small shards keep workers even,
# large ones let sites be trained together.
_SHARDS, _GREATEST_SHARD = 12, 16


@dataclass(frozen=True, slots=True)
class Shard:
    """Some sites of a cohort that one worker trains: (node's place, attempt) of each."""

    place: int
    round: int
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a site's training gave: the hash of its update, whether it is in the sum, its score.

    Without a hash the site failed.
    """

    update: str | None
    added: bool = False
    score: ProtectedScore | None = None


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
        self._read[shard.place] = [_opened(site, permit) for site, permit in self._members(shard)]

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
        members: Sequence[tuple[Site, Permit]],
        read: Sequence[Examples | Exception],
        weights: Arrays,
    ) -> list[tuple[Job, Update] | Exception]:
        """Returns each site's update, from one pass where that can be."""
        found: list[tuple[Job, Update] | Exception] = [ValueError("not trained") for _ in members]
        jobs: dict[int, Job] = {}
        for place, ((site, permit), examples) in enumerate(zip(members, read, strict=True)):
            try:
                if isinstance(examples, Exception):
                    raise examples
                jobs[place] = site.job(permit, examples)
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
        site: Site,
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
            score = site.score(permit, job, weights)
        except Exception as error:
            site.refusal(error, permit.round)
            return Outcome(None)
        name = arrays.digest(update.arrays)
        try:
            check_update(update, self._contract, permit.terms, self._shapes)
        except VerificationFailed as error:
            logger.warning("an update of %s is left out: %s", site.name, error)
            return Outcome(name, score=score)
        for key, value in update.arrays.items():
            total[key] += np.float64(self._contract.weight(permit.terms)) * value
        return Outcome(name, added=True, score=score)

    def _members(self, shard: Shard) -> Iterator[tuple[Site, Permit]]:
        for place, attempt in shard.members:
            site = site_of(self._plan, place)
            terms = self._contract.site(site.name)
            if terms is None:
                raise BractError(f"the contract does not list {site.name!r}")
            yield site, site.gate.permit(self._contract, terms, shard.round, attempt)


class CohortGrid(SimulatedGrid):
    """Carries messages to the sites of a plan that keep their chains in one ledger file.

    Args:
        plan: opens the sites.
        sites: how many there are.
        workers: how many processes train; 1 trains in this one.
    """

    adds_up = True

    def __init__(self, plan: Path, *, sites: int, workers: int) -> None:
        flower.bind_server(RUN, SERVER)
        self._plan, self._sites = plan, sites
        self._workers = workers if sys.platform == "linux" else 1  # the board is for forks
        self._pool: Pool[Shard, Trained] | None = None
        self._board: Board | None = None
        self._contract: str | None = None
        self._replies: dict[str, Message] = {}
        self._sent = 0

    @property
    def run(self) -> flower.Run:
        """The one run of this grid."""
        return flower.empty_run(RUN)

    def get_node_ids(self) -> Iterable[int]:
        """Returns every node."""
        return range(FIRST_NODE, FIRST_NODE + self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Returns the ids of messages that were sent and, in this grid, already answered."""
        pushed = list(messages)
        for message in pushed:
            self._sent += 1
            flower.number(message, f"message-{self._sent}")
        trained = [m for m in pushed if m.metadata.message_type == MessageType.TRAIN]
        closed = [m for m in pushed if m.metadata.message_type != MessageType.TRAIN]
        for reply in (*self._train(trained), *self._close(closed)):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived; each is handed out once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Returns the replies of all messages; no site here is ever too late."""
        return self.pull_messages(self.push_messages(messages))

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def _close(self, messages: Sequence[Message]) -> Iterator[Message]:
        asked = [(self._site(m), wire.decode_close(m.content)) for m in messages]
        for message, answer in zip(messages, cohort.close(asked), strict=True):
            content = (
                wire.encode_closed(answer)
                if isinstance(answer, str)
                else wire.encode_refusal(answer)
            )
            yield Message(content, reply_to=message)

    def _train(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yields the replies to a round's orders."""
        read = zip(messages, wire.decode_orders(m.content for m in messages), strict=True)
        orders: list[tuple[Message, wire.TrainOrder]] = []
        for message, order in read:
            if isinstance(order, VerificationFailed):
                yield failed(message)
            else:
                orders.append((message, order))
        answers = cohort.admit([(self._site(m), order) for m, order in orders])
        permits: dict[int, tuple[Message, Permit]] = {}
        for (message, _), answer in zip(orders, answers, strict=True):
            if isinstance(answer, Permit):
                permits[self._place(message)] = message, answer
            elif isinstance(answer, wire.TrainReply):
                yield Message(wire.encode_reply(answer), reply_to=message)
            else:
                yield Message(wire.encode_refusal(answer), reply_to=message)
        if permits:
            yield from self._trained(orders[0][1], permits)

    def _trained(
        self, order: wire.TrainOrder, permits: Mapping[int, tuple[Message, Permit]]
    ) -> Iterator[Message]:
        """Yields the replies of permitted sites, once the releases of all are durable."""
        pool = self._begun(order)
        shards = _shards(order.round, [(p, permit.attempt) for p, (_, permit) in permits.items()])
        ledger = site_of(self._plan, shards[0].members[0][0]).gate.ledger
        replies: list[Message] = []
        try:
            # Held while workers train: there is no other writer, and no second commit.
            with ledger.transaction() as transaction:
                for trained in pool.map(shards):
                    replies += self._released(transaction, trained, permits)
        except BractError as error:
            logger.error("a round's releases cannot be written: %s", error)
            replies = [failed(message) for message, _ in permits.values()]
        yield from replies

    def _released(
        self,
        transaction: Transaction,
        trained: Trained,
        permits: Mapping[int, tuple[Message, Permit]],
    ) -> Iterator[Message]:
        """Yields a shard's sum with its receipts, and what its other sites answer."""
        receipts: dict[int, wire.SignedReceipt] = {}
        whole, first = True, None
        for (place, _), outcome in zip(trained.shard.members, trained.outcomes, strict=True):
            (message, permit), site = permits[place], site_of(self._plan, place)
            if outcome.update is None:
                yield failed(message)
                continue
            signed = cohort.release(transaction, site, permit, outcome.update, outcome.score)
            if isinstance(signed, wire.RefusalReply):
                whole &= not outcome.added
                yield Message(wire.encode_refusal(signed), reply_to=message)
            elif outcome.added:
                receipts[message.metadata.dst_node_id], first = signed, first or message
            else:
                yield failed(message)
        if first is not None and whole:
            reply = wire.SummedReply(trained.shard.place, receipts, trained.total)
            yield Message(wire.encode_summed(reply), reply_to=first)
        elif not whole:  # a sum with an update that was not released is not given out
            yield from (failed(permits[node - FIRST_NODE][0]) for node in receipts)

    def _begun(self, order: wire.TrainOrder) -> Pool[Shard, Trained]:
        """Returns the workers, with the round's weights before them."""
        contract = order.contract.contract
        if self._pool is None or self._board is None:
            # Forked only now: the model is built, and the data are opened, once for all.
            shapes = site_of(self._plan, 0).trainers.of(contract).shapes
            self._board, self._contract = Board(shapes), contract.sha256
            trainer = ShardTrainer(self._plan, order.contract, self._board, shapes)
            ahead = trainer.read if self._workers > 1 else None
            self._pool = Pool(trainer.train, _lost, workers=self._workers, ahead=ahead)
        if contract.sha256 != self._contract:
            raise BractError("a grid carries one run; start another for another contract")
        self._board.write(order.weights)
        return self._pool

    def _place(self, message: Message) -> int:
        return message.metadata.dst_node_id - FIRST_NODE

    def _site(self, message: Message) -> Site:
        return site_of(self._plan, self._place(message))


def _opened(site: Site, permit: Permit) -> Examples | Exception:
    try:
        return permit.open_examples()
    except Exception as error:
        return error


def _shards(round_number: int, members: Sequence[tuple[int, int]]) -> list[Shard]:
    """Returns a cohort in equal parts, whatever the number of workers."""
    size = min(_GREATEST_SHARD, max(1, math.ceil(len(members) / _SHARDS)))
    return [
        Shard(place, round_number, tuple(members[start : start + size]))
        for place, start in enumerate(range(0, len(members), size))
    ]


def _lost(shard: Shard) -> Trained:
    """Returns what is left of a shard whose worker died."""
    return Trained(shard, {}, tuple(Outcome(None) for _ in shard.members))
