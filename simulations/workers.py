"""Worker processes that answer messages, one torch thread each."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from bract.shared import malloc
from bract.shared.errors import BractError

logger = logging.getLogger("bract.simulations")

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Call:
    """What a worker does before its next task, that is no task."""

    call: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class _Made:
    """The value of a call."""

    value: Any


class Pool(Generic[Task, Answer]):
    """Answers tasks with a handler, in this process or in forked workers.

    Args:
        handler: what answers one task; it must not raise.
        lost: the answer for a task whose worker died.
        workers: how many processes; 1 answers here, as does a process that sees a GPU.
        ahead: what a worker does for its next task, in a thread, while it answers the one before.
    """

    def __init__(
        self,
        handler: Callable[[Task], Answer],
        lost: Callable[[Task], Answer],
        *,
        workers: int,
        ahead: Callable[[Task], None] | None = None,
    ) -> None:
        # One thread everywhere: sums of floats must not depend on how work is spread.
        torch.set_num_threads(1)
        self._handler, self._lost = handler, lost
        self._depth = 1 if ahead is None else 2
        self._workers: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._owed: Connection | None = None  # the worker that makes a call aside
        self._asked: Callable[[], Any] | None = None
        self._value: _Made | None = None
        # fork shares the data sets already read; macOS cannot fork after its frameworks are up.
        fork = sys.platform == "linux"
        if fork and workers > 1 and torch.cuda.device_count():
            # torch has a thread for each GPU once a gradient was formed, and no fork has them
            logger.warning(
                "one process serves all sites, since it sees a GPU: for %d workers on the CPU set "
                "CUDA_VISIBLE_DEVICES to nothing",
                workers,
            )
            workers = 1
        if workers <= 1:
            malloc.keep_freed()
        start: Any = multiprocessing.get_context("fork" if fork else "spawn")
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = start.Pipe()
            inherited = [*self._workers, ours] if fork else []
            process = start.Process(
                target=_serve, args=(theirs, handler, ahead, inherited, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(ours)
            self._processes.append(process)

    def aside(self, call: Callable[[], Value]) -> Callable[[], Value]:
        """Returns what gives a call's value, once: an idle worker makes it before its next task.

        Where there is no worker, or it died, the call is made when its value is asked for. It
        must not raise, and travels to the worker as tasks do.
        """
        self._called()  # of an earlier call nobody asked
        if not self._workers:
            return call
        worker = self._workers[-1]  # the others have their first tasks before it
        try:
            worker.send(_Call(call))
        except OSError:
            self._drop(worker)
            return call
        self._owed, self._asked = worker, call

        def value() -> Value:
            made = self._called() if self._asked is call else None
            return call() if made is None else made.value

        return value

    def _called(self) -> _Made | None:
        """Returns what a worker made aside, waiting for it where no task has."""
        if self._owed is not None:
            try:
                self._value = self._owed.recv()
            except (EOFError, OSError):
                self._drop(self._owed)
        made, self._owed, self._value, self._asked = self._value, None, None, None
        return made

    def map(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yields the answers as they come, in any order; each task is copied on its way."""
        if not self._processes:
            for task in tasks:
                yield copy.deepcopy(self._handler(copy.deepcopy(task)))
            return
        waiting, busy = deque(tasks), dict[Connection, deque[Task]]()
        while waiting or busy:
            for _ in range(self._depth):  # one for each worker, before any has a second
                for worker in list(self._workers):
                    if waiting and len(busy.get(worker, ())) < self._depth:
                        self._send(worker, waiting, busy)
            if waiting and not self._workers:
                raise BractError("every worker process died: lower --workers, or free some memory")
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)  # noqa: S101  only connections were given
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    self._drop(ready)
                    yield from map(self._lost, busy.pop(ready))
                    continue
                if isinstance(answer, _Made):
                    self._owed, self._value = None, answer
                    continue
                busy[ready].popleft()
                if not busy[ready]:
                    del busy[ready]
                yield answer

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()

    def _send(
        self, worker: Connection, waiting: deque[Task], busy: dict[Connection, deque[Task]]
    ) -> None:
        task = waiting.popleft()
        try:
            worker.send(task)
            busy.setdefault(worker, deque()).append(task)
        except OSError:
            waiting.appendleft(task)
            if worker not in busy:  # else what it has not answered is told as lost
                self._drop(worker)

    def _drop(self, worker: Connection) -> None:
        """Forgets a worker that died, and what it was to call."""
        self._workers.remove(worker)
        if self._owed is worker:
            self._owed = None


def _serve(
    tasks: Connection,
    handler: Callable[[Task], Answer],
    ahead: Callable[[Task], None] | None,
    inherited: Sequence[Connection],
    parent: int,
) -> None:
    # The ends of other pipes, inherited by fork, would hide that the parent was killed.
    for end in inherited:
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    malloc.keep_freed()
    torch.set_num_threads(1)
    received = _received(tasks) if ahead is None else _read_ahead(tasks, ahead)
    for task in received:
        if os.getppid() != parent:
            return
        try:
            tasks.send(_Made(task.call()) if isinstance(task, _Call) else handler(task))
        except (EOFError, OSError):
            return


def _received(tasks: Connection) -> Iterator[Any]:
    while True:
        try:
            yield tasks.recv()
        except (EOFError, OSError):
            return


def _read_ahead(tasks: Connection, ahead: Callable[[Any], None]) -> Iterator[Any]:
    """Yields tasks whose reading was done while the one before was answered."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)

    def read() -> None:
        for task in _received(tasks):
            if not isinstance(task, _Call):
                ahead(task)
            ready.put((task,))
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (item := ready.get()) is not None:
        yield item[0]
