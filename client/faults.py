"""What can be wrong between a site and its server, and what mends it."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx

from bract.client import proxies
from bract.shared import clocks
from bract.shared.errors import BractError
from bract.shared.logs import printable

# Why this site does not take an order.
TOO_LARGE, UNREADABLE = "order-too-large", "unreadable-order"
_UNAUTHORIZED, _CONFLICT, _NOT_ACTIVE = 401, 409, 412
_KEY = "its federation file must list the node key that `bract keys site` printed"
_CLOCK = (
    f"this machine's clock may be {clocks.AHEAD_SECONDS} s ahead of the server's or "
    f"{clocks.BEHIND_SECONDS} s behind, no more"
)
_REMEDIES = {
    clocks.CLOCKS_DIFFER: f"{_CLOCK}; set the one that is wrong",
    clocks.UNREGISTERED_KEY: _KEY,
}


class Disconnected(BractError):
    """The server cannot be reached, or no longer knows this process: connect again."""


class Unknown(Disconnected):
    """The server does not let this process in.

    Args:
        reason: the server's word for why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        remedy = _REMEDIES.get(reason, f"{_KEY}, and {_CLOCK}")
        super().__init__(f"the server does not let this site in ({reason}): {remedy}")


class NotTaken(BractError):
    """The server does not take an answer (it came late), or this site does not take an order.

    Args:
        message: the line for the site's log.
        reason: why the site refuses; None where it was the server.
    """

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(message)


def explained(response: httpx.Response) -> BractError:
    """Returns what a server's refusal means for this site."""
    detail = _detail(response)
    if response.status_code == _CONFLICT:
        return BractError(
            "another process with this site's key has connected since: this one ends; run one "
            "process for a site"
        )
    if response.status_code == _UNAUTHORIZED:
        return Unknown(detail or "unauthorized")
    if response.status_code == _NOT_ACTIVE or response.status_code >= 500:
        return Disconnected("the server asks for a new connection")
    return NotTaken(f"the server refused: {detail or response.status_code}")


def _detail(response: httpx.Response) -> str:
    try:
        return printable(str(response.json().get("detail", ""))[:100])
    except (ValueError, AttributeError):
        return ""


def unreachable(error: Exception, server: str, authority: Path) -> BractError:
    """Returns why a server could not be reached, its certificate where that was it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return BractError(
                f"the certificate of {server} is not vouched for by {authority} "
                f"({cause.verify_message}): nothing was sent"
            )
        cause = cause.__cause__ or cause.__context__
    way = proxies.used_for(server)
    return Disconnected(f"{server} cannot be reached: {type(error).__name__}{way}")
