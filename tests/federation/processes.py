"""Processes of a federation forked from one whose imports are done, and the ports they listen on.

A test run has one server of forks, whoever asks for it first: what it holds stands here alone.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from bract.simulations.federations.loopback import ENVIRONMENT, LOOPBACK

WAIT_SECONDS = 120.0
# What a forked process need not import again.
WARM = (
    "bract.client.service",
    "bract.client.commands",
    "bract.server.service",
    "bract.server.commands",
    "bract.client.training.trainer",
    "bract.shared.privacy.accounting",
    "opacus",
    "torch._dynamo",  # of the first backward pass
    "anyio._backends._asyncio",
    "bract.shared.logs",
    "cryptography.hazmat.backends.openssl.backend",
    "httpcore",
    "httptools",
    "pydantic.v1",
    "uvicorn.lifespan.off",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.websockets_impl",
    "sklearn.datasets",
    "sklearn.metrics",
    "pytest",  # its script is the main module of the test run, which a fork imports
)


def until(holds: Callable[[], Any], what: str, *, seconds: float = WAIT_SECONDS) -> Any:
    """Returns the first true value; a condition that never comes is named."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return value


class Forked:
    """A process forked from one whose imports are done; used as a Popen is."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.pid = int(process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def forkserver() -> ForkServerContext:
    """Returns where processes are forked: each start would cost seconds of a core in imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(WARM))
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yields a port that no other process is given, even while no server listens on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((LOOPBACK, 0))
        yield int(held.getsockname()[1])


_PORTS = contextlib.ExitStack()
atexit.register(_PORTS.close)


def held_port() -> int:
    """Returns a port that is reserved until the test run ends."""
    return _PORTS.enter_context(reserved_port())
