"""SIGTERM and SIGINT end what a server does, even where what they raise is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN_SECONDS = 5.0


@contextmanager
def stoppable() -> Iterator[None]:
    """Ends a block at SIGTERM and SIGINT, asked for again and again until that is `heard`.

    Raises:
        KeyboardInterrupt: where the block is ended so.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    earlier = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        heard()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def heard() -> None:
    """Asks no more: what is about to end is let end."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # Python drops what is raised while it calls a weak reference's callback or a finalizer.
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    raise KeyboardInterrupt
