"""How long a connection may take to say what it wants, and in how many words.

uvicorn waits for ever for the head of a request. Whoever can reach the port, with no key at all,
could hold all of the process's connections that way.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0


class PatientUntil(H11Protocol):
    """A connection that is dropped where a request's head takes longer than HEAD_SECONDS.

    On h11, which bounds a head to 64 KiB; the faster parser that uvicorn would choose keeps any
    number of headers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to look, twice in HEAD_SECONDS."""
        super().connection_made(transport)
        self._before: tuple[bool, Any] = (False, None)
        self._look = self.loop.call_later(HEAD_SECONDS / 2, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Looks no more."""
        self._look.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        # Between requests uvicorn has a clock of its own, until the first byte of the next.
        unsaid = answered and self.timeout_keep_alive_task is None
        if (unsaid, self.cycle) == self._before == (True, self.cycle):
            self.transport.abort()
            return
        self._before = (unsaid, self.cycle)
        self._look = self.loop.call_later(HEAD_SECONDS / 2, self._check)
