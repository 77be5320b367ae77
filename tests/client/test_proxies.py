"""Proxies of the environment: named where they are in the way, their values never told."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bract.client import settings
from bract.client.flower import Address, Connection, Disconnected
from bract.shared import node_keys
from bract.shared.errors import UsageError
from bract.simulations.federations.loopback import LOOPBACK, Layout

VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")
HOSTS = "localhost,127.0.0.1,[::1]"

UNUSABLE = {
    "a scheme that nobody has": ({"HTTPS_PROXY": "ftp://secret:1"}, "HTTPS_PROXY"),
    "socks without its package": ({"all_proxy": "socks5h://secret:1"}, "all_proxy"),
    "a port that is none": ({"HTTPS_PROXY": "http://user:secret@ss@:x"}, "HTTPS_PROXY"),
    "an address in brackets": (
        {"HTTPS_PROXY": "http://secret:1", "NO_PROXY": HOSTS},
        "HTTPS_PROXY and NO_PROXY",
    ),
}


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def closed() -> Iterator[str]:
    """An address of a port that is taken and not listened at."""
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        yield f"{LOOPBACK}:{held.getsockname()[1]}"


def connection(layout: Layout, server: str) -> Connection:
    chosen = settings.read(layout.site("alpha"))
    address = Address(server, Path(chosen.keys.root_certificate))
    return Connection(address, node_keys.load(Path(chosen.keys.node)), greatest_order=2**20)


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_proxy_that_cannot_be_used_is_named_and_its_value_is_not_told(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    variables, named = UNUSABLE[case]
    if case == "socks without its package":
        monkeypatch.setitem(sys.modules, "socksio", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^the environment's {named} cannot be used") as refused:
        connection(layout, "localhost:1")
    assert "secret" not in str(refused.value)
    assert refused.value.__suppress_context__, "a traceback would show the cause, which quotes it"


def test_a_server_behind_a_proxy_that_is_away_is_told_of_with_the_proxys_name(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@{closed}")
    fault = "fl.example.org:1 cannot be reached: ConnectError"
    behind = connection(layout, "fl.example.org:1")
    with closing(behind._client), pytest.raises(Disconnected, match=fault) as lost:
        behind.open()
    assert str(lost.value).endswith(
        " through the proxy of the environment's HTTPS_PROXY; to go without it, add "
        "fl.example.org to NO_PROXY"
    )
    monkeypatch.setenv("NO_PROXY", LOOPBACK)
    before = connection(layout, closed)
    with closing(before._client), pytest.raises(Disconnected, match=r"ConnectError$"):
        before.open()
