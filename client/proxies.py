"""The proxies of the environment, which httpx reads; their values may hold a password.

So what is said of them is their names alone.
"""

from __future__ import annotations

import os
import ssl

import httpx

from bract.shared.configuration import host_and_port
from bract.shared.errors import UsageError

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


def check() -> None:
    """Returns where a client can be made with the environment's proxies.

    Raises:
        UsageError: where none can, naming the variables.
    """
    try:
        _client().close()
    except (ImportError, ValueError, httpx.InvalidURL):
        # With nothing of the cause: it quotes what it could not read.
        raise UsageError(
            f"the environment's {_named(*_PROXIES, 'NO_PROXY')} cannot be used: a proxy is "
            "http://HOST:PORT, or socks5://HOST:PORT where the package socksio is installed, and "
            "NO_PROXY lists hosts without brackets; mend what is wrong or unset it"
        ) from None


def used_for(server: str) -> str:
    """Returns, as the end of a fault's line, which proxy stands before a server; else nothing."""
    with _client() as client:
        url = httpx.URL(f"https://{server}")
        if client._transport_for_url(url) is client._transport:
            return ""
    return (
        f" through the proxy of the environment's {_named('HTTPS_PROXY', 'ALL_PROXY')}; to go "
        f"without it, add {host_and_port(server)[0]} to NO_PROXY"
    )


def _client() -> httpx.Client:
    # Its own context would read the authorities of the whole web, of which none is trusted here.
    return httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def _named(*names: str) -> str:
    known = {form for name in names for form in (name, name.lower())}
    return " and ".join(sorted(name for name in known if os.environ.get(name))) or "settings"
