"""The client's only touch of Flower's internals (1.41): its fleet connection and message objects.

What arrives is data for the INSTALLED ClientApp: there is no road here by which code could come.
"""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from bract.shared import clocks, flower, incarnation
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.flower import GrewTooLarge
from bract.shared.incarnation import Incarnation
from bract.shared.logs import printable

logger = logging.getLogger("bract.client")

HEARTBEAT_SECONDS = 10.0
ENVELOPE_BYTES = 2**20
FIRST_DELAY_SECONDS, GREATEST_DELAY_SECONDS = 0.2, 15.0
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


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is, and the certificate of the authority that vouches for it."""

    server: str
    root_certificate: Path


class Connection:
    """One process's connection to a server, opened anew as often as needed.

    Args:
        address: the server.
        key: the node key that the federation file lists for this site.
        greatest_order: how many bytes one order may have.
    """

    def __init__(
        self, address: Address, key: ec.EllipticCurvePrivateKey, *, greatest_order: int
    ) -> None:
        self._address, self._greatest = address, greatest_order
        self._public = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            address.server,
            False,
            _root(address.root_certificate),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
                _Incarnated(incarnation.new(key)),
            ],
        )
        _guard(self._client._client, greatest_order)
        self._node: Node | None = None
        self._stopped = threading.Event()
        self._beats: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if self._node is not None:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, ValueError, BractError) as lost:
                logger.debug("not told to the server: %s", type(lost).__name__)

    def open(self) -> None:
        """Returns once the server knows this process as the site's newest.

        Raises:
            Disconnected: where it cannot be reached now.
            BractError: where trying again is useless: the server does not list this site's key, or
                never let this process in.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            response = self._call(lambda: self._client.ActivateNode(request))
        except Unknown as error:
            # Its key held before: a clock was set, and what is set is mended without this process.
            if self._node is not None and error.reason != clocks.UNREGISTERED_KEY:
                raise
            raise BractError(str(error)) from error
        self._node = Node(node_id=response.node_id)
        TaskIdentity.node_id = response.node_id
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beats.start()

    def receive(self) -> Message | None:
        """Returns the next order, whole; None where the server had none for a while.

        Raises:
            Disconnected: where the connection is lost.
        """
        node = self._known()
        response = self._call(lambda: self._client.PullMessages(PullMessagesRequest(node=node)))
        if not response.messages_list:
            return None
        if len(response.messages_list) != len(response.message_object_trees):
            raise NotTaken("an order without its objects", reason=UNREADABLE)
        run = response.messages_list[0].metadata.run_id
        tree = response.message_object_trees[0]
        pull = _bounded(
            make_pull_object_fn_protobuf(self._client.PullObject, node, run), self._greatest
        )
        try:
            names = flower.parts(tree)
            contents = self._call(lambda: pull_objects(names, pull, max_tries_per_object=3))
            message = flower.inflate(tree.object_id, contents, greatest=self._greatest)
        except GrewTooLarge as error:
            raise NotTaken(f"more than this site takes: {error}", reason=TOO_LARGE) from None
        except VerificationFailed as error:
            raise NotTaken(str(error), reason=UNREADABLE) from None
        message.metadata.__dict__["_message_id"] = tree.object_id
        TaskIdentity.run_id = run
        TaskIdentity.task_id = 1
        return message

    def send(self, reply: Message) -> None:
        """Returns once the server has the whole answer.

        Raises:
            Disconnected: where the connection is lost on the way.
            NotTaken: where the server no longer wants it.
        """
        node, run = self._known(), reply.metadata.run_id
        with no_object_id_recompute():
            name = reply.object_id
            reply.metadata.__dict__["_message_id"] = name
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
            )
            response = self._call(lambda: self._client.PushMessages(request))
            push = make_push_object_fn_protobuf(
                self._client.PushObject, node, run, response.session_id
            )
            wanted = set(response.objects_to_push)
            self._call(
                lambda: push_objects(objects, push, object_ids_to_push=wanted, keep_objects=True)
            )

    def _call(self, request: Callable[[], object]) -> Any:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            raise _explained(error.response) from None
        except httpx.TransportError as error:
            raise _unreachable(error, self._address) from None
        except (ObjectPullError, ObjectPushError) as error:
            raise NotTaken("the server dropped it on the way") from error
        except GrewTooLarge as error:
            raise NotTaken(f"more than this site takes: {error}", reason=TOO_LARGE) from None
        except ValueError as error:  # no protobuf, or none that Flower's client can read
            raise NotTaken("an answer that cannot be read", reason=UNREADABLE) from error

    def _known(self) -> Node:
        if self._node is None:
            raise Disconnected("not connected yet")
        return self._node

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS * 0.7):
            try:
                self._client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
                )
            except (httpx.HTTPError, ValueError, BractError):
                continue  # the main loop meets the same fault, and decides


class BackOff:
    """Waits longer after each failure, up to a bound, and from the start again after a success."""

    def __init__(self) -> None:
        self._delay = FIRST_DELAY_SECONDS

    def reset(self) -> None:
        """Notes a success."""
        self._delay = FIRST_DELAY_SECONDS

    def wait(self) -> None:
        """Waits, with a fifth of jitter so that many sites do not come at once."""
        time.sleep(self._delay * (0.8 + 0.4 * secrets.randbelow(1000) / 1000))
        self._delay = min(self._delay * 2, GREATEST_DELAY_SECONDS)


@dataclass(frozen=True, slots=True)
class _Incarnated:
    """Puts the incarnation into every request."""

    incarnation: Incarnation

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self.incarnation.headers)
        return call_next(context)


def _guard(client: httpx.Client, greatest: int) -> None:
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


def _root(path: Path) -> bytes:
    try:
        text = path.read_bytes()
        ssl.create_default_context(cadata=text.decode("ascii"))
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"no root certificate at {path}: copy ca.pem from the coordinator"
        ) from error
    return text


def _bounded(pull: Callable[[str], bytes], greatest: int) -> Callable[[str], bytes]:
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


def _explained(response: httpx.Response) -> BractError:
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


def _unreachable(error: Exception, address: Address) -> BractError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return BractError(
                f"the certificate of {address.server} is not vouched for by "
                f"{address.root_certificate} ({cause.verify_message}): nothing was sent"
            )
        cause = cause.__cause__ or cause.__context__
    return Disconnected(f"{address.server} cannot be reached: {type(error).__name__}")
