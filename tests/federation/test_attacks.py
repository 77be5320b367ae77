"""Attacks on real processes over TLS: each is refused for a typed reason, and the run goes on."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import select
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attack_helpers import (
    HONEST,
    HOSTILE,
    Caller,
    Insider,
    Logged,
    caller,
    give,
    lay_out,
    memory_mib,
    summary,
    trust,
)
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.date import now
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from processes import WAIT_SECONDS, until

from bract.server.flower import connections, doorman, routes
from bract.server.flower.host import Host, Listener
from bract.shared import incarnation, node_keys, wire
from bract.shared.incarnation import Incarnation
from bract.simulations.federations.loopback import LOOPBACK, Layout

SERVED = {
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "pull-object",
    "push-object",
    "confirm-message-received",
}
ROUTES = sorted(path for _, path in PROTOBUF_REQUEST_TYPES)
FLEET = [path for path in ROUTES if path.startswith("/v1/fleet/")]
OTHERS = [path for path in ROUTES if not path.startswith("/v1/fleet/")]


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    """A real server that waits for three sites; at the end they come, and its run completes.

    Two are real processes, and the third is the attacker's, who has become honest.
    """
    root = tmp_path_factory.mktemp("idle") / "federation"
    layout = lay_out(root, (*HONEST, HOSTILE), minimum_cohort=3)
    with Logged(layout) as processes:
        server = processes.serve()
        yield processes
        assert server.poll() is None, processes.log("server")
        processes.join(*HONEST)
        insider = Insider(layout)
        with caller(layout) as one:
            one.activate()
            for _ in range(2):
                order, tree = one.order()
                reply = insider.reply(wire.decode_order(one.read(tree).content))
                give(one, order.message_id, wire.encode_reply(reply))
        processes.wait_for_server(WAIT_SECONDS)
        assert summary(layout)["rounds"] == 2
        assert summary(layout)["refused"] == []
        assert "server-failed" not in processes.reasons("server")


@pytest.fixture
def mallory(idle: Logged) -> Iterator[Caller]:
    """A registered site's own key, in an attacker's hands; its node is connected."""
    with caller(idle.layout) as one:
        yield one.activate()
        one.shown = incarnation.new(one.key)  # a test may have let another process speak
        one.activate().post("deactivate-node", DeactivateNodeRequest(node_id=one.node))


@pytest.fixture
def stranger(idle: Logged) -> Iterator[Caller]:
    """A key that no federation file lists."""
    with Caller(idle.layout, node_keys.new()) as one:
        yield one


@contextlib.contextmanager
def refused(
    processes: Logged, reason: str, *, site: str | None = None, times: int = 1
) -> Iterator[None]:
    """Holds where the server logs more refusals for this reason (and of this site)."""

    def count() -> int:
        facts = {"reason": reason} if site is None else {"reason": reason, "site": site}
        return len(processes.lines("server", event="refused", **facts))

    before = count()
    yield
    until(lambda: count() >= before + times, f"{reason} in the server's log", seconds=20)


def test_an_unregistered_node_key_is_not_let_in(idle: Logged, stranger: Caller) -> None:
    with refused(idle, "unregistered-key"):
        request = ActivateNodeRequest(public_key=stranger.public, heartbeat_interval=30)
        assert stranger.post("activate-node", request).status_code == 401


def test_a_listed_key_without_its_private_half_is_not_let_in(
    idle: Logged, stranger: Caller, mallory: Caller
) -> None:
    claimed = {**stranger.headers(), "flwr-public-key": mallory.headers()["flwr-public-key"]}
    request = ActivateNodeRequest(public_key=mallory.public, heartbeat_interval=30)
    with refused(idle, "unsigned-request"):
        assert stranger.post("activate-node", request, claimed).status_code == 401


def test_control_and_runtime_routes_are_not_there(idle: Logged, mallory: Caller) -> None:
    assert len(OTHERS) == 62
    with refused(idle, "no-such-route", times=2 * len(OTHERS)):
        for path in OTHERS:
            assert mallory.post(path, headers={}).status_code == 404, path
            assert mallory.post(path).status_code == 404, path


def test_fleet_routes_are_closed_to_the_anonymous(idle: Logged, mallory: Caller) -> None:
    assert {path.rpartition("/")[2] for path in FLEET} > SERVED
    with refused(idle, "unregistered-key", times=len(FLEET)):
        for path in FLEET:
            assert mallory.post(path, headers={}).status_code == 401, path


@pytest.mark.parametrize(
    ("route", "request_of"),
    [
        ("register-node", lambda who: RegisterNodeFleetRequest(public_key=who.public)),
        ("unregister-node", lambda who: UnregisterNodeFleetRequest(node_id=who.node)),
        ("get-run", lambda who: GetRunRequest(node=who.who(), run_id=1)),
        ("get-fab", lambda who: GetFabRequest(node=who.who(), hash_str="x\nforged line")),
    ],
)
def test_a_listed_site_finds_no_route_to_register_or_to_fetch_code(
    idle: Logged, mallory: Caller, route: str, request_of: Callable[[Caller], Any]
) -> None:
    with refused(idle, "no-such-route", site=HOSTILE):
        assert mallory.post(route, request_of(mallory)).status_code == 404
    assert "\nforged line" not in idle.log("server")


PATHS = {
    "two slashes": "//v1/fleet/pull-messages",
    "slash at the end": "/v1/fleet/pull-messages/",
    "dots": "/v1/fleet/../control/start-run",
    "encoded dots": "/v1/fleet/%2e%2e/control/start-run",
    "encoded line's end": "/v1/fleet/pull-messages%0a",
    "encoded question": "/v1/control/start-run%3f",
    "encoded null": "/v1/fleet/pull-messages%00",
    "another case": "/V1/FLEET/pull-messages",
    "schema": "/openapi.json",
    "pages": "/docs",
    "nothing": "/",
}


@pytest.mark.parametrize("case", PATHS)
def test_a_crooked_path_leads_nowhere(idle: Logged, mallory: Caller, case: str) -> None:
    """As the anonymous, and as a listed site whose request would be good on the straight path."""
    body = PullMessagesRequest(node=mallory.who()).SerializeToString()
    fleet = PATHS[case].startswith("/v1/fleet/")
    assert raw_status(idle, PATHS[case], {}, body) == (401 if fleet else 404)
    with refused(idle, "no-such-route"):
        assert raw_status(idle, PATHS[case], mallory.headers(), body) == 404


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_another_method_leads_nowhere(idle: Logged, mallory: Caller, method: str) -> None:
    body = PullMessagesRequest(node=mallory.who()).SerializeToString()
    headers = {**mallory.headers(), "x-http-method-override": "POST"}
    with refused(idle, "no-such-route", site=HOSTILE):
        assert raw_status(idle, "/v1/fleet/pull-messages", headers, body, method=method) == 405


def test_a_host_that_rewrites_the_path_changes_nothing(idle: Logged, mallory: Caller) -> None:
    """As it is read for URLs, such a host would name a route that asks for no signature."""
    headers = {"flwr-public-key": mallory.headers()["flwr-public-key"]}
    body = PushObjectRequest(node=mallory.who()).SerializeToString()
    with refused(idle, "unsigned-request"):
        assert (
            raw_status(
                idle, "/v1/fleet/push-object", headers, body, host="a/v1/runtime/push-object?"
            )
            == 401
        )
    headers = mallory.headers()
    host = "a/v1/runtime/push-object?"
    # Whatever the host says, the body is read as the route's own kind: no session, no object.
    with refused(idle, "not-your-object", site=HOSTILE):
        assert raw_status(idle, "/v1/fleet/push-object", headers, body, host=host) == 404


@pytest.mark.parametrize(
    "name",
    [
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
        "bract-incarnation",
        "content-type",
    ],
)
def test_a_header_given_twice_is_refused(
    idle: Logged, mallory: Caller, stranger: Caller, name: str
) -> None:
    """The doorman and the handlers could read a different one of the two."""
    body = PullMessagesRequest(node=mallory.who()).SerializeToString()
    for twice in (
        [*stranger.headers().items(), (name, mallory.headers()[name])],
        [(name, stranger.headers()[name]), *mallory.headers().items()],
    ):
        with refused(idle, "bad-request"):
            assert raw_status(idle, "/v1/fleet/pull-messages", twice, body) == 400


def test_a_websocket_is_not_opened(idle: Logged, mallory: Caller) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": base64.b64encode(bytes(16)).decode(),
    }
    for path, headers, status in (
        ("/v1/fleet/pull-messages", upgrade, 401),
        ("/v1/control/stream-logs", upgrade, 404),
        ("/v1/fleet/pull-messages", {**mallory.headers(), **upgrade}, 405),
    ):
        assert raw_status(idle, path, headers, b"", method="GET") == status


def test_plaintext_gets_no_answer_at_the_port_of_tls(idle: Logged) -> None:
    with socket.create_connection((LOOPBACK, idle.layout.port), timeout=30) as plain:
        plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not plain.recv(64).startswith(b"HTTP")
    with pytest.raises(httpx.TransportError), httpx.Client() as client:
        client.get(f"http://{LOOPBACK}:{idle.layout.port}/health")


def test_an_old_version_of_tls_is_not_spoken(idle: Logged) -> None:
    context = trust(idle.layout)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((LOOPBACK, idle.layout.port), timeout=30) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname=LOOPBACK)


# Sizes


def test_a_body_that_calls_itself_two_gigabytes_is_not_read(idle: Logged, mallory: Caller) -> None:
    headers = {**mallory.headers(), "content-length": str(2**31)}
    with refused(idle, "too-large"):
        status, sent = flood(idle, "/v1/fleet/push-object", headers, b"\0" * 65536)
    assert status == 413
    assert sent < 64 * 2**20


@pytest.mark.parametrize("beside", ["alone", "beside a length"])
def test_a_body_in_chunks_is_not_read(idle: Logged, mallory: Caller, beside: str) -> None:
    """Its end is not known; beside a length, the length would be a lie."""
    headers = {**mallory.headers(), "transfer-encoding": "chunked"}
    if beside != "alone":
        headers["content-length"] = "10"
    status, sent = flood(
        idle, "/v1/fleet/push-object", headers, b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    )
    assert status in (400, 413)
    assert sent < 64 * 2**20


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/push-object", "/health"])
def test_no_route_reads_the_body_of_the_anonymous(idle: Logged, path: str) -> None:
    """Flower's translation would read it whole, of any size, before the route is looked for."""
    headers = {"content-type": "application/protobuf", "content-length": str(2**31)}
    before = memory_mib(idle.running["server"].pid)
    status, sent = flood(idle, path, headers, b"\0" * 65536)
    assert status in (404, 405)
    assert sent < 64 * 2**20
    assert memory_mib(idle.running["server"].pid) < before + 100


def test_a_head_without_an_end_is_cut_off(idle: Logged) -> None:
    before = memory_mib(idle.running["server"].pid)
    with wire_to(idle) as wire:
        sent = 0
        wire.sendall(b"POST /health HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            while sent < 64 * 2**20:
                wire.sendall(b"x-pad: " + b"a" * 8000 + b"\r\n")
                sent += 8009
    assert sent < 8 * 2**20
    assert memory_mib(idle.running["server"].pid) < before + 50


@pytest.mark.parametrize("case", ["not signed", "signed by another", "signed long ago"])
def test_no_body_is_read_for_a_public_key_alone(
    idle: Logged, mallory: Caller, stranger: Caller, case: str
) -> None:
    """It is in every federation file; only the head is sent here, and is answered."""
    headers = mallory.headers()
    if case == "not signed":
        del headers["flwr-signature"]
    elif case == "signed by another":
        headers = {**stranger.headers(), "flwr-public-key": headers["flwr-public-key"]}
    else:
        ago = now() - datetime.timedelta(seconds=400)
        headers = mallory.headers(at=ago.isoformat())
    lines = _head("/v1/fleet/push-object", {**headers, "content-length": "4000000"})
    reason = "clocks-differ" if case == "signed long ago" else "unsigned-request"
    with wire_to(idle) as wire, refused(idle, reason):
        wire.settimeout(20)
        wire.sendall(lines + b"\r\n")
        assert _status(wire) == 401


PATHOLOGICAL = {
    "random": b"\xff" * 1000,
    "a group without an end": b"\x0b" * 100_000,
    "a length beyond the body": b"\x0a\xff\xff\xff\xff\x07",
    "no UTF-8": b"\x12\x02\xff\xfe",
}


@pytest.mark.parametrize("case", [*PATHOLOGICAL, "a deep tree", "a broad tree", "another kind"])
def test_a_pathological_body_is_refused(idle: Logged, mallory: Caller, case: str) -> None:
    headers, reason, status = mallory.headers(), "bad-request", 400
    if case == "a deep tree":
        body = b""
        for _ in range(50_000):  # far beyond where a reader that recurses ends
            body = b"\x12" + _varint(len(body)) + body
            if len(body) > 2**18:
                break
        body = b"\x1a" + _varint(len(body)) + body
    elif case == "a broad tree":
        tree = b"\x0a\x40" + b"0" * 64 + b"\x12\x00" * 2_000_000
        said = PushMessagesRequest(node=mallory.who())
        said.messages_list.add().metadata.src_node_id = mallory.node
        number = PushMessagesRequest.DESCRIPTOR.fields_by_name["message_object_trees"].number
        body = said.SerializeToString() + _varint(number << 3 | 2) + _varint(len(tree)) + tree
        reason, status = "too-large", 413
    elif case == "another kind":
        body, headers["content-type"] = b"{}", "application/json"
        status = 415
    else:
        body = PATHOLOGICAL[case]
    with refused(idle, reason, site=HOSTILE):
        assert mallory.post("push-messages", body, headers).status_code == status


def test_half_open_connections_do_not_hold_up_a_site(idle: Logged, mallory: Caller) -> None:
    with contextlib.ExitStack() as stack:
        for place in range(60):
            wire = stack.enter_context(wire_to(idle))
            wire.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost:"[: 10 + place])
        with caller(idle.layout, HONEST[0]) as site:
            assert site.activate().node
            beat = SendNodeHeartbeatRequest(node=site.who(), heartbeat_interval=10)
            assert site.post("send-node-heartbeat", beat).status_code == 200
            site.post("deactivate-node", DeactivateNodeRequest(node_id=site.node))


@contextlib.contextmanager
def hosted(layout: Layout, folder: Path) -> Iterator[Host]:
    """The server's side of the network alone, in this process."""
    beside = layout.federation.parent
    key = node_keys.load(layout.site(HOSTILE).parent / "node-key.pem")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No path_separator", DeprecationWarning)  # of alembic
        host = Host(
            database=folder / "link.sqlite",
            sites={HOSTILE: node_keys.public_line(key.public_key())},
            listener=Listener(
                LOOPBACK, layout.port, beside / "server.pem", beside / "server-key.pem"
            ),
            greatest_reply=2**20,
        )
    host.start()
    try:
        yield host
    finally:
        host.close()


def test_a_head_that_never_comes_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connections, "BODY_SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(routes, "POLL_HOLD_SECONDS", 2.0)
    layout = lay_out(tmp_path / "federation", (HOSTILE,), minimum_cohort=1)
    with hosted(layout, tmp_path):
        served = Logged(layout)
        whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        for first, then in ((b"", b""), (b"POST /health HT", b""), (whole, b"GET ")):
            with wire_to(served) as wire:
                wire.sendall(first)
                if then:
                    assert _status(wire) == 200
                    time.sleep(0.5)  # until it waits for another request, as it may for a minute
                    wire.sendall(then)
                with contextlib.suppress(ConnectionError):
                    while wire.recv(4096):
                        pass
        with caller(layout) as patient:  # one that waits for an order is not cut off
            patient.activate()
            asked = PullMessagesRequest(node=patient.who())
            assert patient.post("pull-messages", asked).status_code == 200


@pytest.mark.parametrize("sent", [0, 300_000])
def test_a_body_that_stops_half_way_loses_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: int
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connections, "BODY_SILENCE_SECONDS", 0.4)
    layout = lay_out(tmp_path / "federation", (HOSTILE,), minimum_cohort=1)
    with hosted(layout, tmp_path), caller(layout) as site:
        headers = {**site.headers(), "content-length": "4000000"}
        with wire_to(Logged(layout)) as wire:
            wire.sendall(_head("/v1/fleet/push-object", headers) + b"\r\n" + b"x" * sent)
            with contextlib.suppress(ConnectionError):
                while wire.recv(4096):
                    pass
        site.activate()  # who speaks on is served
    assert "Traceback" not in caplog.text


# Who speaks for a node


@pytest.mark.parametrize("seconds", [0, -1, 1e18, float("inf"), float("nan"), 9.9])
def test_an_extreme_heartbeat_is_refused(idle: Logged, mallory: Caller, seconds: float) -> None:
    """A node that counted as online for ever would be asked in every round."""
    with refused(idle, "bad-request", site=HOSTILE):
        beat = SendNodeHeartbeatRequest(node=mallory.who(), heartbeat_interval=seconds)
        assert mallory.post("send-node-heartbeat", beat).status_code == 400
    with refused(idle, "bad-request", site=HOSTILE):
        request = ActivateNodeRequest(public_key=mallory.public, heartbeat_interval=seconds)
        assert mallory.post("activate-node", request).status_code == 400


@pytest.mark.parametrize("case", ["none", "unsigned", "another key's", "another name", "too long"])
def test_an_incarnation_that_the_node_key_did_not_sign_is_refused(
    idle: Logged, mallory: Caller, stranger: Caller, case: str
) -> None:
    mine, other = mallory.shown, stranger.shown
    shown = {
        "none": Incarnation("", ""),
        "unsigned": Incarnation(other.name, ""),
        "another key's": other,
        "another name": Incarnation(other.name, mine.signature),
        "too long": Incarnation(mine.name + "0", mine.signature),
    }[case]
    request = ActivateNodeRequest(public_key=mallory.public, heartbeat_interval=30)
    with refused(idle, "bad-request", site=HOSTILE):
        headers = {**mallory.headers(), **shown.headers}
        assert mallory.post("activate-node", request, headers).status_code == 400
    # What was there before still speaks.
    beat = SendNodeHeartbeatRequest(node=mallory.who(), heartbeat_interval=30)
    assert mallory.post("send-node-heartbeat", beat).status_code == 200


def test_the_newest_process_speaks_and_the_older_one_neither_speaks_nor_ends_it(
    idle: Logged, mallory: Caller
) -> None:
    with caller(idle.layout) as newer:
        newer.activate()
        for route, request in (
            ("pull-messages", PullMessagesRequest(node=mallory.who())),
            (
                "send-node-heartbeat",
                SendNodeHeartbeatRequest(node=mallory.who(), heartbeat_interval=30),
            ),
            ("deactivate-node", DeactivateNodeRequest(node_id=mallory.node)),
            (
                "activate-node",
                ActivateNodeRequest(public_key=mallory.public, heartbeat_interval=30),
            ),
        ):
            with refused(idle, "superseded", site=HOSTILE):
                assert mallory.post(route, request).status_code == 409
        beat = SendNodeHeartbeatRequest(node=newer.who(), heartbeat_interval=30)
        assert newer.post("send-node-heartbeat", beat).status_code == 200
        until(lambda: HOSTILE in connected(idle), "still connected", seconds=20)


def test_a_site_cannot_retire_another_sites_incarnation(idle: Logged, mallory: Caller) -> None:
    """Knowing its id, signed anew by a listed key of its own, and then superseded."""
    with caller(idle.layout, HONEST[0]) as victim:
        victim.activate()
        name = victim.shown.name
        signature = mallory.key.sign(incarnation._digest(name), ec.ECDSA(hashes.SHA256()))
        mallory.shown = Incarnation(name, base64.b64encode(signature).decode())
        mallory.activate()
        mallory.shown = incarnation.new(mallory.key)
        mallory.activate()
        beat = SendNodeHeartbeatRequest(node=victim.who(), heartbeat_interval=10)
        assert victim.post("send-node-heartbeat", beat).status_code == 200
        victim.post("deactivate-node", DeactivateNodeRequest(node_id=victim.node))


def test_a_site_cannot_act_under_the_id_of_anothers_node(idle: Logged, mallory: Caller) -> None:
    with caller(idle.layout, HONEST[0]) as victim:
        victim.activate()
        for route, request in (
            ("pull-messages", PullMessagesRequest(node=victim.who())),
            ("push-messages", PushMessagesRequest(node=victim.who())),
            ("push-object", PushObjectRequest(node=victim.who())),
            ("deactivate-node", DeactivateNodeRequest(node_id=victim.node)),
        ):
            with refused(idle, "unsigned-request"):
                assert mallory.post(route, request).status_code == 401
        victim.post("deactivate-node", DeactivateNodeRequest(node_id=victim.node))


# Replays


@pytest.mark.parametrize("seconds", [-310, -3600, 70, 1e6])
def test_a_signature_of_another_time_is_refused(
    idle: Logged, mallory: Caller, seconds: float
) -> None:
    at = (now() + datetime.timedelta(seconds=seconds)).isoformat()
    asked = PullMessagesRequest(node=mallory.who())
    with refused(idle, "clocks-differ"):
        assert mallory.post("pull-messages", asked, mallory.headers(at=at)).status_code == 401


@pytest.mark.parametrize("seconds", [-290, 50])
def test_a_clock_may_be_a_little_off(idle: Logged, mallory: Caller, seconds: float) -> None:
    at = (now() + datetime.timedelta(seconds=seconds)).isoformat()
    beat = SendNodeHeartbeatRequest(node=mallory.who(), heartbeat_interval=30)
    assert mallory.post("send-node-heartbeat", beat, mallory.headers(at=at)).status_code == 200


def test_only_a_sites_own_word_is_told_that_its_time_is_off(
    idle: Logged, mallory: Caller, stranger: Caller
) -> None:
    ago = (now() - datetime.timedelta(seconds=400)).isoformat()
    claimed = {
        **stranger.headers(at=ago),
        "flwr-public-key": mallory.headers()["flwr-public-key"],
    }
    with refused(idle, "unsigned-request"):
        assert stranger.post("pull-messages", headers=claimed).status_code == 401


def test_a_site_whose_clock_is_off_for_a_while_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(routes, "POLL_HOLD_SECONDS", 0.5)
    layout = lay_out(tmp_path / "federation", (HOSTILE,), minimum_cohort=1)
    minutes = 0
    monkeypatch.setattr(doorman, "now", lambda: now() + datetime.timedelta(minutes=minutes))
    with hosted(layout, tmp_path) as host, Logged(layout) as processes:
        processes.join(HOSTILE)
        until(host.connected, "the site is connected")
        minutes = 10
        until(lambda: caplog.text.count("clocks-differ") >= 4, "it tries again", seconds=30)
        (off,) = processes.lines(HOSTILE, event="disconnected")
        assert "(clocks-differ): this machine's clock may be 60 s ahead" in off["message"]
        minutes = 0
        until(lambda: len(processes.lines(HOSTILE, event="connected")) == 2, "it is back")
        assert len(processes.lines(HOSTILE, event="disconnected")) == 1
        assert processes.running[HOSTILE].poll() is None
        processes.stop(HOSTILE)
        minutes = 10
        processes.join(HOSTILE)  # one that was never let in is told at once
        code, told = processes.ended(HOSTILE)
        assert (code, "clocks-differ" in told) == (1, True)


@pytest.mark.parametrize("at", ["", "yesterday", "2026-01-01T00:00:00", "9" * 400, "0001-01-01"])
def test_a_time_that_is_none_is_refused(idle: Logged, mallory: Caller, at: str) -> None:
    headers = {**mallory.headers(at=at or "-"), "flwr-timestamp": at}
    with refused(idle, "unsigned-request"):
        reply = mallory.post("pull-messages", PullMessagesRequest(node=mallory.who()), headers)
    assert reply.status_code == 401


def test_captured_headers_are_void_once_the_site_has_connected_anew(
    idle: Logged, mallory: Caller
) -> None:
    """Flower signs a time and nothing else, good for 300 s; the incarnation bounds it further.

    Nobody outside of TLS sees them. Whoever did speaks for the node until its next connection.
    """
    captured = mallory.headers()
    asked = PullMessagesRequest(node=mallory.who())
    with caller(idle.layout) as newer:
        newer.activate()
        with refused(idle, "superseded", site=HOSTILE):
            assert mallory.post("pull-messages", asked, captured).status_code == 409
        # Without the new process's incarnation, which they do not hold, they are good for nothing.
        for name in ("bract-incarnation", "bract-incarnation-signature"):
            captured.pop(name)
        request = ActivateNodeRequest(public_key=mallory.public, heartbeat_interval=30)
        assert mallory.post("activate-node", request, captured).status_code == 400
        assert mallory.post("pull-messages", asked, captured).status_code == 412
        newer.post("deactivate-node", DeactivateNodeRequest(node_id=newer.node))


def connected(processes: Logged) -> list[str]:
    path = processes.layout.federation.parent / "state" / "status.json"
    return list(json.loads(path.read_bytes())["connected"])


@contextlib.contextmanager
def wire_to(processes: Logged) -> Iterator[ssl.SSLSocket]:
    address = (LOOPBACK, processes.layout.port)
    with (
        socket.create_connection(address, timeout=60) as plain,
        trust(processes.layout).wrap_socket(plain, server_hostname=LOOPBACK) as secure,
    ):
        yield secure


def _head(path: str, headers: Any, *, method: str = "POST", host: str = LOOPBACK) -> bytes:
    pairs = headers.items() if isinstance(headers, dict) else headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in pairs)
    return f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n{lines}".encode()


def raw_status(processes: Logged, path: str, headers: Any, body: bytes, **more: str) -> int:
    """Returns the status of a request that is written as it stands."""
    with wire_to(processes) as wire:
        length = f"content-length: {len(body)}\r\n\r\n".encode()
        wire.sendall(_head(path, headers, **more) + length + body)
        return _status(wire)


def flood(processes: Logged, path: str, headers: dict[str, str], piece: bytes) -> tuple[int, int]:
    """Returns the status, and how many bytes of an endless body were taken before it."""
    with wire_to(processes) as wire:
        wire.sendall(_head(path, headers) + b"\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 128 * 2**20 and not select.select([wire], [], [], 0)[0]:
                wire.sendall(piece)
                sent += len(piece)
        return _status(wire), sent


def _status(wire: ssl.SSLSocket) -> int:
    said = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while b"\r\n" not in said and (piece := wire.recv(4096)):
            said += piece
    assert said.startswith(b"HTTP/1.1 "), said[:50]
    return int(said.split()[1])


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
