"""An in-process grid: the unmodified ServerApp and ClientApp, with worker processes for sites.

Every message is copied on its way, so that aliasing hides no bug. The result is the same for any
number of workers: a site's randomness is keyed by its name and round, and the server averages in
the contract's order.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from bract.server.grid import SingleRunGrid, Value
from bract.simulations import flower
from bract.simulations.workers import Pool

logger = logging.getLogger("bract.simulations")

RUN, SERVER = 1, 1
FIRST_NODE = 1000
_FAILED = 2


class SimulatedGrid(SingleRunGrid):
    """A grid in this process, which may noise sums with what a seed gives: a simulation's only."""

    noise: Callable[[int], Callable[[int], npt.NDArray[np.float64]]] | None = None
    site_names: Mapping[int, str] | None = None  # by node, where the plan is known

    def __init__(self) -> None:
        flower.bind_server(RUN, SERVER)
        self._replies: dict[str, Message] = {}
        self._sent = 0

    @property
    def run(self) -> flower.Run:
        """The one run of this grid."""
        return flower.empty_run(RUN)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Returns the ids of messages that were sent and, in this grid, already answered."""
        pushed = list(messages)
        for message in pushed:
            self._sent += 1
            flower.number(message, f"message-{self._sent}")
        for reply in self._answers(pushed):
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

    def _answers(self, messages: Sequence[Message]) -> Iterable[Message]:
        """Returns the replies to messages, in any order."""
        raise NotImplementedError


class LocalGrid(SimulatedGrid):
    """Carries messages to sites in this process or in workers.

    Args:
        client: the ClientApp.
        node_configs: one configuration a site, in order.
        workers: how many processes train; 1 trains in this one.
    """

    def __init__(
        self, client: ClientApp, node_configs: Sequence[Mapping[str, Any]], *, workers: int
    ) -> None:
        super().__init__()
        nodes = {FIRST_NODE + place: config for place, config in enumerate(node_configs)}

        def answer(message: Message) -> Message:
            node = message.metadata.dst_node_id
            context = flower.context(run=RUN, node=node, node_config=nodes[node], run_config={})
            try:
                return client(message, context)
            except Exception as error:
                logger.error("node %d failed: %s", node, type(error).__name__)
                logger.debug("at %s", "".join(traceback.format_tb(error.__traceback__)))
                return failed(message)

        self._nodes = list(nodes)
        self._pool = Pool(answer, failed, workers=workers)

    def get_node_ids(self) -> Iterable[int]:
        """Returns every node."""
        return list(self._nodes)

    def aside(self, call: Callable[[], Value]) -> Callable[[], Value]:
        """Returns what gives a call's value, made by a worker that has no message yet."""
        return self._pool.aside(call)

    def _answers(self, messages: Sequence[Message]) -> Iterable[Message]:
        return self._pool.map(messages)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()


def failed(message: Message) -> Message:
    """Returns the answer of a node that has none."""
    # No text: an exception could quote private data.
    return Message(Error(_FAILED), reply_to=message)
