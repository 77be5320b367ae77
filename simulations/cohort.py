"""The in-process grid for many sites: a cohort is charged at once, trained by shards, added up.

One process holds the ledger file of all sites. It charges a whole cohort in one transaction, hands
shards of it to workers, adds their releases to the ledger as they come, and makes those durable at
once before any reply is given out. Workers send a shard's sum, not its updates: each update was
hashed for its release and checked as the server would. Weights lie once in memory that all share.
Shards do not depend on the number of workers, and so neither does the sum.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import Message, MessageType

from bract.client import cohort
from bract.client.permits import Permit
from bract.client.site import Site
from bract.server.grid import Value
from bract.shared import wire
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.messages import RefusalReply, SignedReceipt, SummedReply, TrainOrder, TrainReply
from bract.shared.privacy.transaction import Transaction
from bract.simulations.grid import FIRST_NODE, SimulatedGrid, failed
from bract.simulations.shards import Board, Shard, ShardTrainer, Trained, lost, shards_of
from bract.simulations.sites import site_of
from bract.simulations.workers import Pool

logger = logging.getLogger("bract.simulations")


class CohortGrid(SimulatedGrid):
    """Carries messages to the sites of a plan that keep their chains in one ledger file.

    Args:
        plan: opens the sites.
        sites: how many there are.
        workers: how many processes train; 1 trains in this one.
    """

    adds_up = True

    def __init__(self, plan: Path, *, sites: int, workers: int) -> None:
        super().__init__()
        self._plan, self._sites = plan, sites
        self._workers = workers if sys.platform == "linux" else 1  # the board is for forks
        self._pool: Pool[Shard, Trained] | None = None
        self._board: Board | None = None
        self._contract: str | None = None

    def get_node_ids(self) -> Iterable[int]:
        """Returns every node."""
        return range(FIRST_NODE, FIRST_NODE + self._sites)

    def aside(self, call: Callable[[], Value]) -> Callable[[], Value]:
        """Returns what gives a call's value, made by a worker while a cohort is charged."""
        return call if self._pool is None else self._pool.aside(call)

    def _answers(self, messages: Sequence[Message]) -> Iterable[Message]:
        trained = [m for m in messages if m.metadata.message_type == MessageType.TRAIN]
        closed = [m for m in messages if m.metadata.message_type != MessageType.TRAIN]
        return [*self._train(trained), *self._close(closed)]

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()
            gc.unfreeze()

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
        orders: list[tuple[Message, TrainOrder]] = []
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
            elif isinstance(answer, TrainReply):
                yield Message(wire.encode_reply(answer), reply_to=message)
            else:
                yield Message(wire.encode_refusal(answer), reply_to=message)
        if permits:
            yield from self._trained(orders[0][1], permits)

    def _trained(
        self, order: TrainOrder, permits: Mapping[int, tuple[Message, Permit]]
    ) -> Iterator[Message]:
        """Yields the replies of permitted sites, once the releases of all are durable."""
        pool = self._begun(order)
        shards = shards_of(order.round, [(p, permit.attempt) for p, (_, permit) in permits.items()])
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
        receipts: dict[int, SignedReceipt] = {}
        whole, first = True, None
        for (place, _), outcome in zip(trained.shard.members, trained.outcomes, strict=True):
            (message, permit), site = permits[place], site_of(self._plan, place)
            if outcome.update is None:
                if outcome.failed:  # it would fail, and be charged, at every round
                    site.failed.add(permit.terms.domain)
                yield failed(message)
                continue
            signed = cohort.release(transaction, site, permit, outcome.update, outcome.score)
            if isinstance(signed, RefusalReply):
                whole &= not outcome.added
                yield Message(wire.encode_refusal(signed), reply_to=message)
            elif outcome.added:
                receipts[message.metadata.dst_node_id], first = signed, first or message
            else:
                yield failed(message)
        if first is not None and whole:
            reply = SummedReply(trained.shard.place, receipts, trained.total)
            yield Message(wire.encode_summed(reply), reply_to=first)
        elif not whole:  # a sum with an update that was not released is not given out
            yield from (failed(permits[node - FIRST_NODE][0]) for node in receipts)

    def _begun(self, order: TrainOrder) -> Pool[Shard, Trained]:
        """Returns the workers, with the round's weights before them."""
        contract = order.contract.contract
        if self._pool is None or self._board is None:
            # Forked only now: the model is built, and the data are opened, once for all.
            shapes = site_of(self._plan, 0).trainers.of(contract).shapes
            self._board, self._contract = Board(shapes), contract.sha256
            trainer = ShardTrainer(self._plan, order.contract, self._board, shapes)
            ahead = trainer.read if self._workers > 1 else None
            # What lasts as long as the run, the terms of thousands of sites, no collection looks at
            # again, here or in a worker, where each look would copy it.
            gc.freeze()
            self._pool = Pool(trainer.train, lost, workers=self._workers, ahead=ahead)
        if contract.sha256 != self._contract:
            raise BractError("a grid carries one run; start another for another contract")
        self._board.write(order.weights)
        return self._pool

    def _place(self, message: Message) -> int:
        return message.metadata.dst_node_id - FIRST_NODE

    def _site(self, message: Message) -> Site:
        return site_of(self._plan, self._place(message))
