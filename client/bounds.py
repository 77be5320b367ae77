"""What a server can have a site do: nothing but answer it, and hold so many bytes."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from bract.shared.errors import UsageError
from bract.shared.flower import GrewTooLarge

ENVELOPE_BYTES = 2**20


def guard(client: httpx.Client, greatest: int) -> None:
    """Holds a client to its one server, and to answers of a bounded size.

    A server that could redirect would have this site post to any address that the site can reach.
    httpx itself reads a body of any length, and unpacks what calls itself compressed.
    """
    client.follow_redirects = False
    client.headers["accept-encoding"] = "identity"
    client.event_hooks = {"response": [lambda response: _bound(response, greatest)]}


def _bound(response: httpx.Response, greatest: int) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError("an answer that is compressed, unasked")
    assert isinstance(response.stream, httpx.SyncByteStream)  # noqa: S101  a client that waits
    response.stream = _Counted(response.stream, greatest + ENVELOPE_BYTES)


class _Counted(httpx.SyncByteStream):
    """An answer's bytes, up to a bound."""

    def __init__(self, stream: httpx.SyncByteStream, left: int) -> None:
        self._stream, self._left = stream, left

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._left -= len(piece)
            if self._left < 0:
                raise GrewTooLarge("an answer of the server has no end")
            yield piece

    def close(self) -> None:
        self._stream.close()


def root(path: Path) -> bytes:
    """Returns the certificate of the authority that vouches for the server.

    Raises:
        UsageError: where there is none at that path.
    """
    try:
        text = path.read_bytes()
        ssl.create_default_context(cadata=text.decode("ascii"))
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"no root certificate at {path}: copy ca.pem from the coordinator"
        ) from error
    return text


def bounded(pull: Callable[[str], bytes], greatest: int) -> Callable[[str], bytes]:
    """Returns a fetch that stops once an order has more bytes than a site wants to hold."""
    left, lock = greatest, threading.Lock()

    def fetch(object_id: str) -> bytes:
        nonlocal left
        content = pull(object_id)
        with lock:
            left -= len(content)
            if left < 0:
                raise GrewTooLarge(f"over {greatest} bytes")
        return content

    return fetch
