"""Which process of each site is the newest: two with one key would spend one budget twice."""

from __future__ import annotations

import threading

from bract.server.orders import Fault, Refused


class Incarnations:
    """The incarnations that speak for their nodes.

    A process proves its incarnation by the node key at activation; each later one supersedes the
    one before, and a superseded process is told so and never comes back under the same id.
    """

    def __init__(self) -> None:
        self._current: dict[int, str] = {}
        self._superseded: set[tuple[int, str]] = set()
        self._lock = threading.Lock()

    def activate(self, node: int, incarnation: str) -> None:
        """Makes a process the one that speaks for a node."""
        with self._lock:
            if (node, incarnation) in self._superseded:
                raise Refused(Fault.SUPERSEDED)
            before = self._current.get(node)
            if before not in (None, incarnation):
                self._superseded.add((node, str(before)))
            self._current[node] = incarnation

    def current(self, node: int) -> str | None:
        """Returns the process that speaks for a node, None before the first."""
        with self._lock:
            return self._current.get(node)

    def check(self, node: int, incarnation: str) -> None:
        """Returns where a request comes from the process that was activated last."""
        with self._lock:
            if (node, incarnation) in self._superseded:
                raise Refused(Fault.SUPERSEDED)
            if self._current.get(node) != incarnation:
                raise Refused(Fault.NOT_ACTIVE)
