"""The host's run in Flower's link state, and what becomes of it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import NOOP_FLWR_AID

from bract.client import settings
from bract.client.flower import Address, Connection
from bract.server.flower import host as hosts
from bract.server.flower.grid import FleetGrid
from bract.server.flower.host import Host, Listener
from bract.shared import federation, node_keys
from bract.shared.errors import BractError
from bract.simulations.federations.loopback import LOOPBACK, Layout

# Flower's migrations, as Alembic sees them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def made(layout: Layout, sites: Mapping[str, str] | None = None) -> Host:
    chosen = federation.read(layout.federation)
    server = chosen.server
    return Host(
        database=layout.root / "superlink.sqlite",
        sites=listed(layout) if sites is None else sites,
        listener=Listener(LOOPBACK, 0, Path(server.certificate), Path(server.key)),
        greatest_reply=2**20,
    )


def listed(layout: Layout) -> dict[str, str]:
    return {site.name: site.node_key for site in federation.read(layout.federation).sites}


def connects(layout: Layout, host: Host) -> None:
    """Returns once alpha's own process is let in."""
    chosen = settings.read(layout.site("alpha"))
    address = Address(f"{LOOPBACK}:{host.port}", Path(chosen.keys.root_certificate))
    key = node_keys.load(Path(chosen.keys.node))
    connection = Connection(address, key, greatest_order=2**20)
    with contextlib.closing(connection._client), connection:
        connection.open()
        assert host.connected() == ["alpha"]


@pytest.fixture
def host(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host that says every moment that its run goes on."""
    monkeypatch.setattr(hosts, "TASK_HEARTBEAT_SECONDS", 0.05)
    begun = made(layout)
    begun.start()
    yield begun
    begun.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.02)


def test_a_run_that_was_taken_for_dead_is_followed_by_another(
    host: Host, layout: Layout, slept: Callable[[Path], None]
) -> None:
    for _ in range(2):
        before = host.run
        slept(layout.root / "superlink.sqlite")
        until(lambda before=before: host.run != before)
    assert host.connected() == []


def test_a_link_state_that_is_locked_does_not_end_the_heartbeats(
    layout: Layout,
    slept: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hosts, "TASK_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(hosts, "BUSY_SECONDS", 0.1)
    host, path = made(layout), layout.root / "superlink.sqlite"
    host.start()
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as locks:
            locks.execute("BEGIN IMMEDIATE")
            until(lambda: "could not be noted: OperationalError" in caplog.text)
        before = host.run
        slept(path)
        until(lambda: host.run != before)
    finally:
        host.close()


def test_an_order_that_cannot_be_kept_is_no_attempt(host: Host) -> None:
    (node,) = host.names  # it never came: Flower keeps nothing for it
    order = Message(RecordDict(), node, MessageType.TRAIN)
    with pytest.raises(BractError, match="an order for alpha cannot be kept: start the server"):
        FleetGrid(host, reply_seconds=1.0).push_messages([order])


def test_a_site_of_a_killed_server_is_not_there_before_it_comes_back(
    host: Host, layout: Layout
) -> None:
    (node,) = host.names
    host.state.activate_node(node, 30.0)
    assert host.connected() == ["alpha"]
    following = made(layout)  # of the same file, which nobody closed
    assert (
        following.connected() == list(FleetGrid(following, reply_seconds=1.0).get_node_ids()) == []
    )
    assert following.state.activate_node(node, 30.0)
    assert following.connected() == ["alpha"]


@pytest.mark.parametrize("earlier", [False, True], ids=["by this version", "by an earlier one"])
def test_a_site_that_was_left_out_is_refused_and_let_in_once_it_is_listed_again(
    layout: Layout, *, earlier: bool
) -> None:
    first = made(layout)
    (node,) = first.names
    first.state.activate_node(node, 30.0)  # it was there when the server was killed
    if earlier:
        first.state.delete_node(NOOP_FLWR_AID, node)
    another = made(layout, {"beta": node_keys.public_line(node_keys.new().public_key())})
    another.start()
    try:
        with pytest.raises(BractError, match="unregistered-key"):
            connects(layout, another)
        grid = FleetGrid(another, reply_seconds=1.0)
        assert "alpha" not in grid.site_names.values()
        another.state.activate_node(node, 30.0)  # not even one that is online is asked
        assert another.connected() == list(grid.get_node_ids()) == []
    finally:
        another.close()
    again = made(layout)
    assert again.names == {node: "alpha"}
    again.start()
    try:
        connects(layout, again)
    finally:
        again.close()
