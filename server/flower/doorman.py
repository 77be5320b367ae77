"""Who is let in: path, key, signature and length, looked at before a byte of the body is read."""

from __future__ import annotations

import base64
import binascii
import datetime
import logging
from typing import TYPE_CHECKING

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bract.server.orders import Fault, Refused
from bract.shared import clocks, incarnation

if TYPE_CHECKING:
    from bract.server.flower.host import Host

logger = logging.getLogger("bract.server")

# A body holds one object of at most 5 MiB and its envelope.
GREATEST_BODY = 8 * 2**20
FLEET = "/v1/fleet/"
HEALTH = "/health"
# Where a request says, further in, whose key signed it.
SITE = "bract-site"
HTTP_STATUS = {
    Fault.UNREGISTERED_KEY: 401,
    Fault.CLOCKS_DIFFER: 401,
    Fault.UNSIGNED: 401,
    Fault.NO_SUCH_ROUTE: 404,
    Fault.NOT_ACTIVE: 412,
    Fault.SUPERSEDED: 409,
    Fault.TOO_LARGE: 413,
    Fault.NOT_YOUR_OBJECT: 404,
    Fault.NO_SUCH_ORDER: 410,
}
# Why an answer that names no fault of ours was given.
_MEANT = {401: Fault.UNSIGNED, 404: Fault.NO_SUCH_ROUTE, 405: Fault.NO_SUCH_ROUTE}
REASON = "bract-refused"
# Read here and again by Flower or FastAPI: two of one name could mean another thing to each.
_SINGLE = frozenset(
    {
        "content-length",
        "content-type",
        "host",
        FLEET_HTTP_PUBLIC_KEY_HEADER,
        FLEET_HTTP_SIGNATURE_HEADER,
        TIMESTAMP_HEADER,
        incarnation.HEADER,
        incarnation.SIGNATURE_HEADER,
    }
)


class Doorman:
    """Turns away strangers and great bodies before anything of theirs is read, and logs why.

    Flower parses a body before it asks who sent it, and knows the bodies of routes that are not
    served here: so nothing but what is served gets as far as that.
    """

    def __init__(self, app: ASGIApp, host: Host, served: frozenset[str]) -> None:
        self._app, self._host, self._served = app, host, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or turns it away; a lifespan's events are nobody's."""
        if scope["type"] != "http":
            return
        site: str | None = None
        try:
            if scope["path"].startswith(FLEET):
                scope[SITE] = site = _caller(scope, self._host)
            # Exactly these: a router would take a line's end after one of them too.
            if scope["path"] not in self._served and scope["path"] != HEALTH:
                raise Refused(Fault.NO_SUCH_ROUTE)
        except Refused as refused:
            await _turn_away(send, refused.fault, site)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                _log_refusal(_fault(message), site)
            await send(message)

        await self._app(scope, receive, watched)


def _caller(scope: Scope, host: Host) -> str:
    """Returns the site whose node key signed a request, its body unread.

    Raises:
        Refused: where no listed key did within the time that a signature is good for, or where the
            body is not of a known, bounded length.
    """
    names = [name.decode("latin-1") for name, _ in scope["headers"]]
    if any(names.count(name) > 1 for name in _SINGLE):
        raise Refused(Fault.BAD_REQUEST)
    headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
    key = _base64(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, b""))
    site = host.site(key)
    if site is None:
        raise Refused(Fault.UNREGISTERED_KEY)
    timestamp = headers.get(TIMESTAMP_HEADER, b"")
    signature = _base64(headers.get(FLEET_HTTP_SIGNATURE_HEADER, b""))
    if not verify_signature(bytes_to_public_key(key), timestamp, signature):
        raise Refused(Fault.UNSIGNED)
    # By now it is known to be the site's own word, so that it may be told what is wrong with it.
    if not -clocks.AHEAD_SECONDS < _age(timestamp) < clocks.BEHIND_SECONDS:
        raise Refused(Fault.CLOCKS_DIFFER)
    length = headers.get("content-length", b"")
    # Without a length a body could grow while it is read; beside chunks a length says nothing.
    if "transfer-encoding" in headers or not length.isdigit() or int(length) > GREATEST_BODY:
        raise Refused(Fault.TOO_LARGE)
    return site


def _age(timestamp: bytes) -> float:
    """Returns how many seconds ago a request was signed, below 0 where that is ahead.

    Raises:
        Refused: where it is no time.
    """
    try:
        return (now() - datetime.datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
    except (ValueError, TypeError, OverflowError):
        raise Refused(Fault.UNSIGNED) from None


def _base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


async def _turn_away(send: Send, fault: Fault, site: str | None) -> None:
    _log_refusal(fault, site)
    body = b'{"detail":"%s"}' % fault.value.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    status = HTTP_STATUS.get(fault, 400)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _fault(response: Message) -> Fault:
    """Returns why a request was not served: the handler's word, else what the status means."""
    named = dict(response.get("headers", ())).get(REASON.encode())
    if named is not None:
        return Fault(named.decode())
    status = response["status"]
    return Fault.SERVER_FAILED if status >= 500 else _MEANT.get(status, Fault.BAD_REQUEST)


def _log_refusal(fault: Fault, site: str | None) -> None:
    logger.warning(
        "refused: %s", fault.value, extra={"event": "refused", "reason": fault.value, "site": site}
    )
