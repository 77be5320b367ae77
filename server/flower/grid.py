"""A grid over the link state; its reads wake as answers land."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run

from bract.server.flower.host import Host
from bract.server.grid import SingleRunGrid
from bract.server.orders import Fault, Order
from bract.shared import flower
from bract.shared.errors import VerificationFailed

logger = logging.getLogger("bract.server")

NO_ANSWER = 3  # Flower's codes: a message was not answered, or its answer is no message
UNREADABLE = 1


class FleetGrid(SingleRunGrid):
    """Carries messages over the fleet routes; its reads wake as answers land.

    Args:
        host: serves the routes.
        reply_seconds: how long a node may take for one answer.
    """

    def __init__(self, host: Host, *, reply_seconds: float) -> None:
        self._host, self._reply_seconds = host, reply_seconds

    @property
    def site_names(self) -> Mapping[int, str]:
        """The site of each node, as it was registered."""
        return dict(self._host.names)

    @property
    def run(self) -> Run:
        """The one run of this process."""
        return Run.create_empty(run_id=self._host.run)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the nodes that are online."""
        return sorted(self._host.state.get_nodes(self._host.run) & set(self._host.names))

    def process_of(self, node: int) -> str:
        """Returns the incarnation that speaks for a node, nothing where none has come yet."""
        return self._host.incarnations.current(node) or ""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Returns the ids of messages whose objects are ready to be fetched.

        A list is emptied: no copy of the weights need wait in it for the answers.

        Raises:
            BractError: where one cannot be put where its node finds it.
        """
        store = self._host.state.object_store
        pushed = []
        listed = list(messages)
        if isinstance(messages, list):
            messages.clear()
        with no_object_id_recompute():  # records shared by messages are hashed once
            while listed:
                message = listed.pop(0)
                name = message.object_id
                message.metadata.__dict__["_message_id"] = name
                tree = get_object_tree(message)
                missing = set(store.preregister(self._host.run, tree))
                for object_id, value in get_all_nested_objects(message).items():
                    if object_id in missing:
                        store.put(object_id, value.deflate())
                node = message.metadata.dst_node_id
                objects = (part.object_id for part in iterate_object_tree(tree))
                with self._host.exchange:
                    self._host.orders.open(name, node, objects)
                    self._host.envelopes[name] = remove_content_from_message(message)
                    # Objects first: a node that finds its order finds all of it.
                    self._host.offer(self._host.envelopes[name])
                self._host.ring(node)
                pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the answers that are whole; each is handed out once and its objects freed."""
        return [self._take(name) for name in self._host.orders.wait_answered(message_ids, 0.0)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Returns the answers that come in time; a node that gives none yields an error.

        What comes later is refused, never mixed into another round.
        """
        sent = set(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        orders = self._host.orders
        while sent and time.monotonic() < deadline:
            for name in orders.wait_answered(sent, min(1.0, max(deadline - time.monotonic(), 0))):
                replies.append(self._take(name))
                sent.remove(name)
            for name in orders.overdue(sent, self._reply_seconds):
                replies.append(self._give_up(name))
                sent.remove(name)
        replies.extend(self._give_up(name) for name in sent)
        return replies

    def _take(self, name: str) -> Message:
        """Returns a whole answer under the facts of its order: what it says of itself is not used.

        The site's bytes would tell it to be of another node, run or order.
        """
        sent, order = self._host.envelopes[name], self._discard(name)
        assert order is not None  # noqa: S101  it was answered a moment ago
        try:
            greatest = self._host.orders.greatest_reply
            answer = flower.inflate(str(order.reply), order.contents, greatest=greatest)
        except VerificationFailed as error:
            logger.warning(
                "the answer is not used: %s",
                error,
                extra={
                    "event": "refused",
                    "reason": Fault.UNREADABLE.value,
                    "site": self._host.names.get(order.node),
                },
            )
            return Message(Error(UNREADABLE), reply_to=sent)
        return Message(answer.content, reply_to=sent)

    def _give_up(self, name: str) -> Message:
        sent = self._host.envelopes[name]
        self._discard(name)
        return Message(Error(NO_ANSWER), reply_to=sent)

    def _discard(self, name: str) -> Order | None:
        with self._host.exchange:  # else it could be offered again with nobody waiting for it
            order = self._host.orders.close(name)
            self._host.envelopes.pop(name, None)
            self._host.state.delete_messages({name})
            self._host.state.object_store.delete(name)
        return order
