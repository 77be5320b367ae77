"""How long a connection may take to say what it wants, and in how many words.

uvicorn waits for ever for the head of a request, and for the rest of a body. Whoever can reach the
port, with no key at all, could hold all of the process's connections that way; and a link that dies
in the middle of an upload would leave one behind each time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
# A body may take its time, if something of it comes.
BODY_SILENCE_SECONDS = 60.0


class PatientUntil(H11Protocol):
    """A connection that is dropped where a request's head or the rest of its body does not come.

    On h11, which bounds a head to 64 KiB; the faster parser that uvicorn would choose keeps any
    number of headers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to look, twice in HEAD_SECONDS."""
        super().connection_made(transport)
        self._before: tuple[bool, Any] = (False, None)
        self._heard = self.loop.time()
        self._look = self.loop.call_later(HEAD_SECONDS / 2, self._check)

    def data_received(self, data: bytes) -> None:
        """Notes when something came last."""
        self._heard = self.loop.time()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Looks no more."""
        self._look.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        # Between requests uvicorn has a clock of its own, until the first byte of the next.
        unsaid = answered and self.timeout_keep_alive_task is None
        # While uvicorn does not read, what is not heard is no silence of the other side.
        if answered or not self.cycle.more_body or self.flow.read_paused:
            self._heard = self.loop.time()
        silent = self.loop.time() - self._heard > BODY_SILENCE_SECONDS
        if silent or (unsaid, self.cycle) == self._before == (True, self.cycle):
            self.transport.abort()
            return
        self._before = (unsaid, self.cycle)
        self._look = self.loop.call_later(HEAD_SECONDS / 2, self._check)
