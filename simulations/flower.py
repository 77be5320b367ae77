"""The simulation's only touch of Flower's internals (1.41): run, task identity, message ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "bind_server", "context", "empty_run", "number"]


def bind_server(run: int, node: int) -> None:
    """Names the run and node that new messages of this process come from; one run a process."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, run, node


def empty_run(run: int) -> Run:
    """Returns a run with nothing but its id."""
    return Run.create_empty(run_id=run)


def number(message: Message, name: str) -> None:
    """Gives a message the id that its reply will name."""
    message.metadata.__dict__["_message_id"] = name


def context(
    *, run: int, node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> Context:
    """Returns the context that an app is called with."""
    return Context(
        run_id=run,
        node_id=node,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )
