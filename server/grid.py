"""What every grid of ours has in common: one process carries one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

Value = TypeVar("Value")


class SingleRunGrid(Grid):
    """A grid whose run is fixed when it is made."""

    def aside(self, call: Callable[[], Value]) -> Callable[[], Value]:
        """Returns what gives a call's value; a grid may have it made where nothing else is done."""
        return call

    def process_of(self, node: int) -> str:
        """Returns what tells a node's process from one that is started later for the same node."""
        return ""

    def set_run(self, run: Any) -> None:
        """Does nothing: the grid lives for one run."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Returns a message from the server to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)
