"""The client's only touch of Flower's internals (1.41): its fleet connection and message objects.

What arrives is data for the INSTALLED ClientApp: there is no road here by which code could come.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
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

from bract.client import bounds, faults, proxies
from bract.client.faults import TOO_LARGE, UNREADABLE, Disconnected, NotTaken, Unknown
from bract.shared import clocks, flower, incarnation
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.flower import GrewTooLarge
from bract.shared.incarnation import Incarnation

logger = logging.getLogger("bract.client")

HEARTBEAT_SECONDS = 10.0


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
        proxies.check()
        self._address, self._greatest = address, greatest_order
        self._public = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            address.server,
            False,
            bounds.root(address.root_certificate),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
                _Incarnated(incarnation.new(key)),
            ],
        )
        bounds.guard(self._client._client, greatest_order)
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
        pull = bounds.bounded(
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
            raise faults.explained(error.response) from None
        except httpx.TransportError as error:
            address = self._address
            raise faults.unreachable(error, address.server, address.root_certificate) from None
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


@dataclass(frozen=True, slots=True)
class _Incarnated:
    """Puts the incarnation into every request."""

    incarnation: Incarnation

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self.incarnation.headers)
        return call_next(context)
