"""Open orders: which node may fetch and answer what, and which answers are whole."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from bract.shared import clocks


class Fault(StrEnum):
    """Why the coordinator refuses a request; the words that its log and its answer carry."""

    UNREGISTERED_KEY = clocks.UNREGISTERED_KEY
    CLOCKS_DIFFER = clocks.CLOCKS_DIFFER
    UNSIGNED = "unsigned-request"
    NO_SUCH_ROUTE = "no-such-route"
    BAD_REQUEST = "bad-request"
    TOO_LARGE = "too-large"
    SUPERSEDED = "superseded"
    NOT_ACTIVE = "not-active"
    FOR_ANOTHER = "answers-for-another-site"
    NO_SUCH_ORDER = "no-such-order"
    ALREADY_ANSWERED = "already-answered"
    NOT_YOUR_OBJECT = "not-your-object"
    UNREADABLE = "unreadable-answer"
    SERVER_FAILED = "server-failed"


class Refused(Exception):
    """A request that is not served."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.value)


@dataclass(slots=True)
class Order:
    """One message to one node, and how far its answer has come.

    `objects` is what the node may fetch for it; `awaited` is what its answer still lacks, and
    `contents` is what it has. An answer's objects stay here, apart from every other site's: in a
    common store one site's tree could name, hold back or delete another's.
    """

    node: int
    objects: frozenset[str]
    sent: float
    delivered: float | None = None
    reply: str | None = None
    session: str | None = None
    awaited: set[str] = field(default_factory=set)
    contents: dict[str, bytes] = field(default_factory=dict)
    received: int = 0

    @property
    def answered(self) -> bool:
        """Whether the answer is whole."""
        return self.reply is not None and not self.awaited


class Orders:
    """The open orders of one process, by message id; every method may be called by any thread.

    Args:
        greatest_reply: how many bytes one answer may have.
    """

    def __init__(self, greatest_reply: int) -> None:
        self.greatest_reply = greatest_reply
        self._orders: dict[str, Order] = {}
        self._changed = threading.Condition()

    def open(self, message: str, node: int, objects: Iterable[str]) -> None:
        """Adds an order before it is offered to its node."""
        with self._changed:
            self._orders[message] = Order(node, frozenset(objects), sent=time.monotonic())

    def of(self, node: int) -> list[str]:
        """Returns the open, unanswered orders of a node."""
        with self._changed:
            return [
                name
                for name, order in self._orders.items()
                if order.node == node and not order.answered
            ]

    def delivered(self, node: int, message: str) -> None:
        """Notes that a node has been given its order, where that is still open."""
        with self._changed:
            order = self._orders.get(message)
            if order is not None and order.node == node:
                order.delivered = time.monotonic()

    def check_fetch(self, node: int, object_id: str) -> None:
        """Returns where an object belongs to an order of this node.

        Raises:
            Refused: otherwise, so that knowing an object's id is not enough to have it.
        """
        with self._changed:
            if not any(
                order.node == node and object_id in order.objects for order in self._orders.values()
            ):
                raise Refused(Fault.NOT_YOUR_OBJECT)

    def begin_answer(self, node: int, message: str, *, reply: str, parts: Iterable[str]) -> str:
        """Returns the session of an answer that begins, or begins again, and forgets its half.

        Args:
            node: who answers.
            message: the order.
            reply: the answer's own object.
            parts: all objects of the answer, itself among them.

        Raises:
            Refused: for an order of another node, one that is closed (a late answer), or one whose
                answer is whole.
        """
        with self._changed:
            order = self._order(node, message)
            if order.answered:
                raise Refused(Fault.ALREADY_ANSWERED)
            order.reply, order.session = reply, secrets.token_hex(16)
            order.awaited, order.contents, order.received = set(parts), {}, 0
            return order.session

    def upload(self, node: int, session: str, object_id: str, content: bytes) -> None:
        """Keeps an object that an answer of this node awaits.

        Raises:
            Refused: for any other object, or where the answer grows too large.
        """
        named = hashlib.sha256(content).hexdigest() == object_id
        with self._changed:
            order = self._uploading(node, session)
            if order is None or object_id not in order.awaited:
                raise Refused(Fault.NOT_YOUR_OBJECT)
            if not named:
                raise Refused(Fault.BAD_REQUEST)
            if order.received + len(content) > self.greatest_reply:
                raise Refused(Fault.TOO_LARGE)
            order.received += len(content)
            order.contents[object_id] = content
            order.awaited.discard(object_id)
            if order.answered:
                self._changed.notify_all()

    def reset(self, message: str) -> bool:
        """Returns whether an order is still open and unanswered; its half answer is forgotten."""
        with self._changed:
            order = self._orders.get(message)
            if order is None or order.answered:
                return False
            # Offered anew, it has its whole time again.
            self._orders[message] = Order(order.node, order.objects, sent=time.monotonic())
            return True

    def close(self, message: str) -> Order | None:
        """Removes an order; what comes for it afterwards is late and refused."""
        with self._changed:
            return self._orders.pop(message, None)

    def wait_answered(self, messages: Iterable[str], timeout_seconds: float) -> list[str]:
        """Returns the orders whose answers are whole, waiting for the first of them."""
        names = list(messages)
        with self._changed:
            self._changed.wait_for(lambda: self._answered(names), timeout=timeout_seconds)
            return self._answered(names)

    def overdue(self, messages: Iterable[str], reply_seconds: float) -> list[str]:
        """Returns the unanswered orders that were given out longer ago than allowed."""
        now = time.monotonic()
        with self._changed:
            return [
                name
                for name in messages
                if (order := self._orders.get(name)) is not None
                and not order.answered
                and now - (order.delivered or order.sent) > reply_seconds
            ]

    def _answered(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._orders and self._orders[name].answered]

    def _order(self, node: int, message: str) -> Order:
        order = self._orders.get(message)
        if order is None or order.node != node:
            raise Refused(Fault.NO_SUCH_ORDER)
        return order

    def _uploading(self, node: int, session: str) -> Order | None:
        return next(
            (
                order
                for order in self._orders.values()
                if order.node == node and order.session == session
            ),
            None,
        )
