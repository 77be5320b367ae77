"""What an attacker has: raw requests under any key, a server that says anything, a site's keys.

Nothing here is part of the product; real processes are on the other side of every one of these.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import Message as Protobuf
from processes import WAIT_SECONDS, Forked, forkserver, held_port, until

from bract.client import settings
from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.training.randomness import SecureRandomness
from bract.client.updates import UpdateStore
from bract.shared import canonical, cli, flower, incarnation, keys, node_keys, wire
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.incarnation import Incarnation
from bract.shared.messages import RefusalReply, TrainOrder, TrainReply
from bract.shared.privacy.ledger import Ledger
from bract.shared.updates import ProtectedUpdate
from bract.simulations.federations import loopback
from bract.simulations.federations.loopback import LOOPBACK, Layout, Processes, SitePlan

HONEST, HOSTILE = ("alpha", "beta"), "mallory"
TERMS: dict[str, Any] = {
    "run": "attacked",
    "rounds": 2,
    "spare_attempts": 3,
    "minimum_cohort": 2,
    "deadlines": {"sites": 600.0, "round": 120.0, "reply": 120.0, "close": 2.0},
    "model": {"name": "linear"},
    "data": {"name": "digits"},
    "training": {"local_steps": 2, "learning_rate": 0.5},
    "privacy": {
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "batch": 32.0,
        "noise_multiplier": 4.0,
    },
}


def lay_out(root: Path, names: Sequence[str], **terms: Any) -> Layout:
    """Returns a federation on digits, its true sizes unlike its nominal ones."""
    plans = [
        SitePlan(name, nominal_size=400, data_name="digits", part=f"{place}/{len(names)}")
        for place, name in enumerate(names, start=1)
    ]
    return loopback.lay_out(root, sites=plans, port=held_port(), terms={**TERMS, **terms})


def _command(arguments: list[str], log: str) -> None:
    """Is the `bract` command, in a process of its own."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["bract", *arguments]
    cli.main()


class Logged(Processes):
    """Real processes whose logs are read line by line."""

    def _start(self, name: str, arguments: Sequence[str]) -> Any:
        before = self.running.get(name)
        assert before is None or before.poll() is not None, f"{name} is running already"
        process = forkserver().Process(
            target=_command, args=(list(arguments), str(self.log_path(name)))
        )
        process.start()
        self.running[name] = Forked(process)  # type: ignore[assignment]
        return self.running[name]

    def serve(self, *options: str) -> subprocess.Popen[bytes]:
        process = self.start_server("--log-format", "json", *options)
        until(
            lambda: process.poll() is not None or self.lines("server", event="serving"),
            "the server serves",
        )
        assert process.poll() is None, self.log("server")
        return process

    def join(self, *names: str) -> None:
        for name in names:
            self.start_client(name, "--log-format", "json")

    def lines(self, name: str, **facts: Any) -> list[dict[str, Any]]:
        """Returns the events of a log that have these facts."""
        found = []
        for line in self.log(name).splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if all(event.get(key) == value for key, value in facts.items()):
                    found.append(event)
        return found

    def reasons(self, name: str) -> list[str]:
        return [str(line.get("reason")) for line in self.lines(name, event="refused")]

    def await_refusal(self, name: str, reason: str, before: int = 0) -> None:
        until(
            lambda: self.reasons(name).count(reason) > before,
            f"{name} refuses for {reason}; so far {self.reasons(name)}",
        )

    def kill(self, name: str) -> None:
        process = self.running[name]
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        process = self.running[name]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=WAIT_SECONDS)

    def ended(self, name: str) -> tuple[int, str]:
        """Returns how a process ended, and what the last line of its log says."""
        code = self.running[name].wait(timeout=WAIT_SECONDS)
        return code, json.loads(self.log(name).strip().splitlines()[-1])["message"]


def summary(layout: Layout) -> dict[str, Any]:
    return dict(canonical.decode((layout.out / "summary.json").read_bytes()))


def state(layout: Layout) -> dict[str, Any]:
    """Returns the checkpoint, empty before the first."""
    path = layout.out / "checkpoint" / "state.json"
    return dict(canonical.decode(path.read_bytes())) if path.exists() else {}


def charges(layout: Layout, name: str) -> int:
    """Returns how many charges a site's ledger holds; 0 where it was never begun."""
    return entries_of(layout.ledger(name), "charge")


def entries_of(ledger: Path, kind: str) -> int:
    """Returns how many entries of a kind a ledger holds, while its site may be writing it."""
    if not ledger.exists():
        return 0
    uri = f"file:{ledger}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as connection:
        try:
            rows = connection.execute("SELECT body FROM entries").fetchall()
        except sqlite3.OperationalError:  # begun a moment ago
            return 0
    return sum(json.loads(body)["kind"] == kind for (body,) in rows)


def trust(layout: Layout, name: str = HOSTILE) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(layout.site(name).parent / "ca.pem"))


@dataclass(slots=True)
class Caller:
    """Raw requests of one node key, every part of which can be swapped."""

    layout: Layout
    key: ec.EllipticCurvePrivateKey
    shown: Incarnation = None  # type: ignore[assignment]
    node: int = 0
    http: httpx.Client = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.shown = self.shown or incarnation.new(self.key)
        self.http = self.http or httpx.Client(
            base_url=f"https://{LOOPBACK}:{self.layout.port}",
            verify=trust(self.layout),
            timeout=60,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @property
    def public(self) -> bytes:
        return public_key_to_bytes(self.key.public_key())

    def headers(self, *, at: str | None = None) -> dict[str, str]:
        """Returns what Flower's client and ours put into a request."""
        import base64

        from flwr.supercore.date import now

        timestamp = at or now().isoformat()
        signature = sign_message(self.key, timestamp.encode())
        return {
            "content-type": "application/protobuf",
            "flwr-public-key": base64.b64encode(self.public).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": base64.b64encode(signature).decode(),
            **self.shown.headers,
        }

    def post(
        self, route: str, body: Protobuf | bytes = b"", headers: Any = None, **more: Any
    ) -> httpx.Response:
        content = body if isinstance(body, bytes) else body.SerializeToString()
        path = route if route.startswith("/") else f"/v1/fleet/{route}"
        return self.http.post(
            path, content=content, headers=self.headers() if headers is None else headers, **more
        )

    def activate(self, *, seconds: float = 60.0) -> Self:
        reply = self.post(
            "activate-node", ActivateNodeRequest(public_key=self.public, heartbeat_interval=seconds)
        )
        assert reply.status_code == 200, reply.text
        self.node = ActivateNodeResponse.FromString(reply.content).node_id
        return self

    def who(self) -> Node:
        return Node(node_id=self.node)

    def order(self) -> tuple[Any, ObjectTree]:
        """Returns the envelope and tree of the next order."""

        def ask() -> Any:
            reply = self.post("pull-messages", PullMessagesRequest(node=self.who()))
            assert reply.status_code == 200, reply.text
            found = PullMessagesResponse.FromString(reply.content)
            return found if found.messages_list else None

        found = until(ask, "an order comes")
        return found.messages_list[0].metadata, found.message_object_trees[0]

    def fetch(self, name: str) -> httpx.Response:
        return self.post("pull-object", PullObjectRequest(node=self.who(), object_id=name))

    def read(self, tree: ObjectTree) -> Message:
        contents = {
            name: PullObjectResponse.FromString(self.fetch(name).content).object_content
            for name in flower.parts(tree)
        }
        return flower.inflate(tree.object_id, contents, greatest=2**30)

    def begin(self, order: str, tree: ObjectTree, **facts: Any) -> httpx.Response:
        """Begins an answer: an envelope and the tree of its objects."""
        request = PushMessagesRequest(node=self.who(), message_object_trees=[tree])
        said = request.messages_list.add().metadata
        said.message_id, said.reply_to_message_id = tree.object_id, order
        said.src_node_id, said.dst_node_id, said.message_type = self.node, 1, "train"
        for name, value in facts.items():
            setattr(said, name, value)
        return self.post("push-messages", request)

    def upload(self, session: str, name: str, content: bytes) -> httpx.Response:
        return self.post(
            "push-object",
            PushObjectRequest(
                node=self.who(), session_id=session, object_id=name, object_content=content
            ),
        )

    def answer(self, order: str, root: str, objects: Mapping[str, bytes]) -> None:
        """Gives a whole answer of any objects at all, in a flat tree that holds them once each."""
        others = [ObjectTree(object_id=name) for name in objects if name != root]
        reply = self.begin(order, ObjectTree(object_id=root, children=others))
        assert reply.status_code == 200, reply.text
        session = PushMessagesResponse.FromString(reply.content).session_id
        for name, content in objects.items():
            assert self.upload(session, name, content).status_code == 200


def caller(layout: Layout, name: str = HOSTILE) -> Caller:
    """Returns raw requests under a site's own node key."""
    return Caller(layout, node_keys.load(layout.site(name).parent / "node-key.pem"))


def raw_object(kind: str, children: Sequence[str], body: bytes) -> tuple[str, bytes]:
    """Returns an object of Flower's form, with its name."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
    return canonical.sha256(content), content


def message(content: RecordDict, **facts: Any) -> Message:
    """Returns a message whose every fact can be chosen."""
    said = {
        "run_id": 1,
        "message_id": "",
        "src_node_id": 1,
        "dst_node_id": 7,
        "reply_to_message_id": "",
        "group_id": "1",
        "created_at": time.time(),
        "ttl": 3600.0,
        "message_type": "train",
        **facts,
    }
    kind, said["message_type"] = said["message_type"], "train"
    metadata = Metadata(**said)
    metadata.__dict__["_message_type"] = kind  # Flower's own class would refuse a strange one
    return make_message(metadata=metadata, content=content)


def objects_of(whole: Message) -> tuple[str, dict[str, bytes]]:
    return whole.object_id, {n: o.deflate() for n, o in get_all_nested_objects(whole).items()}


def give(one: Caller, order: str, content: RecordDict, **facts: Any) -> None:
    """Gives an answer of this content to an order, honest in form."""
    facts = {"src_node_id": one.node, "dst_node_id": 1, "reply_to_message_id": order, **facts}
    root, objects = objects_of(message(content, **facts))
    one.answer(order, root, objects)


@dataclass
class NoHoldings:
    """A gate's holdings that hold nothing."""

    def check(self, domain: str, data: Any) -> None:
        """Takes every kind of data."""

    def open(self, domain: str, data: Any) -> Examples:
        raise AssertionError("the attacker trains on nothing")


@dataclass
class Insider:
    """A site that an attacker runs: real keys, a real gate and ledger, and no scruples."""

    layout: Layout
    name: str = HOSTILE
    ledger: Path | None = None
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        chosen = settings.read(self.layout.site(self.name))
        folder = Path(chosen.state)
        folder.mkdir(parents=True, exist_ok=True)
        self.key = keys.load(Path(chosen.keys.ledger))
        randomness = SecureRandomness()
        self.gate = Gate(
            policy=chosen.policy(),
            key=self.key,
            ledger=Ledger(self.ledger or folder / "ledger.sqlite"),
            updates=UpdateStore(folder / "updates"),
            holdings=NoHoldings(),
            simulation=False,
            randomness=randomness.kind,
        )

    def reply(self, order: TrainOrder, fill: float = 0.01) -> TrainReply:
        """Returns what an honest site might have answered, charged and released."""
        order = replace(order, witness=None)  # what it says of the ledger is not listened to
        permit = self.gate.admit(order)
        if not isinstance(permit, Permit):
            return permit
        update = {n: np.full_like(value, fill) for n, value in order.weights.items()}
        return self.gate.release(permit, ProtectedUpdate(update))


class MaliciousServer:
    """A server with a genuine certificate (or any other), under nobody's rules.

    Orders given to `offer` are handed to whoever asks; `override` answers a route with
    (status, headers, pieces of the body) instead.
    """

    def __init__(self, layout: Layout, certificate: Path | None = None, key: Path | None = None):
        folder = layout.federation.parent
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            certificate or folder / "server.pem", key or folder / "server-key.pem"
        )
        self.waiting: list[tuple[Message, ObjectTree, dict[str, bytes]]] = []
        self.objects: dict[str, bytes] = {}
        self.answers: dict[str, bytes] = {}
        self.roots: list[str] = []
        self.asked: list[str] = []
        self.override: dict[str, tuple[int, dict[str, str], Callable[[], Iterator[bytes]]]] = {}
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer((LOOPBACK, layout.port), self._handler())
        self.http.daemon_threads = True
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def offer(self, whole: Message) -> None:
        _, objects = objects_of(whole)
        self.offer_raw(whole, get_object_tree(whole), objects)

    def offer_raw(self, envelope: Message, tree: ObjectTree, objects: dict[str, bytes]) -> None:
        with self.lock:
            self.objects.update(objects)
            self.waiting.append((envelope, tree, objects))

    def reply_to(self, whole: Message, what: str) -> TrainReply | RefusalReply:
        """Returns the answer to an order that is sent now."""
        before = len(self.roots)
        self.offer(whole)
        until(lambda: len(self.roots) > before, f"an answer to {what}")
        root = self.roots[before]
        until(lambda: self._whole(root), f"a whole answer to {what}")
        return wire.decode_reply(flower.inflate(root, dict(self.answers), greatest=2**30).content)

    def _whole(self, root: str) -> bool:
        try:
            flower.inflate(root, dict(self.answers), greatest=2**30)
        except flower.VerificationFailed:
            return False
        return True

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

            def do_POST(self) -> None:
                route = self.path.rpartition("/")[2]
                server.asked.append(route)
                body = self.rfile.read(int(self.headers["content-length"]))
                if route in server.override:
                    status, headers, pieces = server.override[route]
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("connection", "close")
                    self.end_headers()
                    with contextlib.suppress(OSError):
                        for piece in pieces():
                            self.wfile.write(piece)
                    self.close_connection = True
                    return
                reply = server._reply(route, body).SerializeToString()
                self.send_response(200)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

        return Handler

    def _reply(self, route: str, body: bytes) -> Protobuf:
        if route == "activate-node":
            return ActivateNodeResponse(node_id=7)
        if route == "pull-messages":
            deadline = time.monotonic() + 1
            while not self.waiting and time.monotonic() < deadline:
                time.sleep(0.02)
            with self.lock:
                if not self.waiting:
                    return PullMessagesResponse()
                envelope, tree, _ = self.waiting.pop(0)
            sent = message_to_proto(remove_content_from_message(envelope))
            return PullMessagesResponse(messages_list=[sent], message_object_trees=[tree])
        if route == "pull-object":
            content = self.objects.get(PullObjectRequest.FromString(body).object_id)
            return PullObjectResponse(
                object_found=content is not None,
                object_available=content is not None,
                object_content=content or b"",
            )
        if route == "push-messages":
            tree = PushMessagesRequest.FromString(body).message_object_trees[0]
            self.roots.append(tree.object_id)
            return PushMessagesResponse(session_id="s", objects_to_push=flower.parts(tree))
        if route == "push-object":
            pushed = PushObjectRequest.FromString(body)
            self.answers[pushed.object_id] = pushed.object_content
            return PushObjectResponse(stored=True)
        return PushObjectResponse()


def train_message(order: TrainOrder, **facts: Any) -> Message:
    return message(wire.encode_order(order), **facts)


def contract_of(layout: Layout) -> Contract:
    from bract.shared import contract

    return contract.read(layout.contract).contract


def memory_mib(pid: int) -> float:
    """Returns the most memory that a process ever held."""
    text = Path(f"/proc/{pid}/status").read_text()
    (line,) = [one for one in text.splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text, (path, before)
    path.write_text(text.replace(before, after))
