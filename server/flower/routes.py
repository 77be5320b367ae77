"""What is on the network: /health, and Flower's fleet routes behind checks of our own.

Flower's control and runtime routes, by which anyone could start code, are not there at all. What
its fleet routes leave open is closed in front of them:

activate: a node killed a moment ago is let in at once, and its open orders are offered again.
deactivate: only the newest process of a node takes it away.
pull-messages: waits for an order instead of being asked again and again.
pull-object, confirm, push-messages, push-object: a node has its own orders and no other's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import APIRouter, FastAPI, Header, HTTPException
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.error import FlowerError, http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.routing import ProtobufRoute
from flwr.supercore.protobuf.translation import (
    PROTOBUF_REQUEST_DEPENDENCY,
    ProtobufTranslationMiddleware,
)
from flwr.supercore.routers import health
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from bract.server.orders import Fault, Refused
from bract.shared import incarnation
from bract.shared.errors import VerificationFailed
from bract.shared.incarnation import Incarnation

if TYPE_CHECKING:
    from bract.server.flower.host import Host

logger = logging.getLogger("bract.server")

# A body holds one object of at most 5 MiB and its envelope.
GREATEST_BODY = 8 * 2**20
GREATEST_TREE = 20_000
POLL_HOLD_SECONDS = 10.0
HTTP_STATUS = {
    Fault.UNREGISTERED_KEY: 401,
    Fault.NOT_ACTIVE: 412,
    Fault.SUPERSEDED: 409,
    Fault.TOO_LARGE: 413,
    Fault.NOT_YOUR_OBJECT: 404,
    Fault.NO_SUCH_ORDER: 410,
}
Process = Annotated[str, Header(alias=incarnation.HEADER)]
Signature = Annotated[str, Header(alias=incarnation.SIGNATURE_HEADER)]
T = TypeVar("T")


def application(host: Host, factory: LinkStateFactory) -> ASGIApp:
    """Returns what uvicorn serves: /health and the fleet routes, strangers turned away first."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.include_router(health.router)
    app.include_router(_messages(host))  # before the stock routes: the first match wins
    app.include_router(fleet_router)
    app.add_middleware(NodeAuthMiddleware)
    app.add_middleware(ProtobufTranslationMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=http_error_translator)
    return _Doorman(app, host)


class _Doorman:
    """Turns away strangers and great bodies before anything of theirs is read."""

    def __init__(self, app: ASGIApp, host: Host) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            key = base64.b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, b""), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        site = self._host.keys.get(key)
        length = headers.get("content-length", b"")
        if site is None:
            await _turn_away(send, Fault.UNREGISTERED_KEY, None)
        elif not length.isdigit() or int(length) > GREATEST_BODY:
            # Without a length a body could grow while it is read.
            await _turn_away(send, Fault.TOO_LARGE, site)
        else:
            await self._app(scope, receive, send)


async def _turn_away(send: Send, fault: Fault, site: str | None) -> None:
    _log_refusal(fault, site)
    body = b'{"detail":"%s"}' % fault.value.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": HTTP_STATUS[fault], "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _messages(host: Host) -> APIRouter:
    """Returns the routes of activation, heartbeat and messages."""
    router = APIRouter(prefix="/v1/fleet", route_class=ProtobufRoute)

    @router.post("/activate-node")
    def activate(
        request: Annotated[ActivateNodeRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
        signature: Signature = "",
    ) -> ActivateNodeResponse:
        shown = Incarnation(name=process, signature=signature)
        return _answered(lambda: _activate(host, request, shown), host.site(request.public_key))

    @router.post("/deactivate-node")
    def deactivate(
        request: Annotated[DeactivateNodeRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> DeactivateNodeResponse:
        _check(host, request.node_id, process)
        return fleet_handlers.deactivate_node(request=request, state=host.state)

    @router.post("/send-node-heartbeat")
    def heartbeat(
        request: Annotated[SendNodeHeartbeatRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> SendNodeHeartbeatResponse:
        _check(host, request.node.node_id, process)
        return fleet_handlers.send_node_heartbeat(request=request, state=host.state)

    @router.post("/pull-messages")
    async def pull(
        request: Annotated[PullMessagesRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PullMessagesResponse:
        return await _pull(host, request, process)

    @router.post("/confirm-message-received")
    def confirm(
        request: Annotated[ConfirmMessageReceivedRequest, PROTOBUF_REQUEST_DEPENDENCY],
    ) -> ConfirmMessageReceivedResponse:
        # Its objects are kept until it is answered: the node may be killed and ask again.
        return ConfirmMessageReceivedResponse()

    @router.post("/push-messages")
    def push(
        request: Annotated[PushMessagesRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PushMessagesResponse:
        node = request.node.node_id
        _check(host, node, process)
        return _answered(lambda: _push(host, request), host.names.get(node))

    @router.post("/pull-object")
    def pull_object(
        request: Annotated[PullObjectRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PullObjectResponse:
        node = request.node.node_id
        _check(host, node, process)
        _answered(lambda: host.orders.check_fetch(node, request.object_id), host.names.get(node))
        return fleet_handlers.pull_object(request=request, state=host.state)

    @router.post("/push-object")
    def push_object(
        request: Annotated[PushObjectRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PushObjectResponse:
        node = request.node.node_id
        _check(host, node, process)
        return _answered(lambda: _push_object(host, request), host.names.get(node))

    return router


def _activate(host: Host, request: ActivateNodeRequest, shown: Incarnation) -> ActivateNodeResponse:
    node = host.state.get_node_id_by_public_key(request.public_key)
    if node is None or node not in host.names:
        raise Refused(Fault.UNREGISTERED_KEY)
    try:
        incarnation.verify(request.public_key, shown)
    except VerificationFailed:
        raise Refused(Fault.BAD_REQUEST) from None
    host.incarnations.activate(node, shown.name)
    try:
        fleet_handlers.activate_node(request=request, state=host.state)
    except FlowerError:  # it still counts as online: its last process was killed
        host.state.acknowledge_node_heartbeat(node, request.heartbeat_interval)
    for name in host.orders.of(node):
        host.offer_again(name)
    host.ring(node)
    logger.info("connected", extra={"event": "connected", "site": host.names[node]})
    return ActivateNodeResponse(node_id=node)


async def _pull(host: Host, request: PullMessagesRequest, process: str) -> PullMessagesResponse:
    node, deadline = request.node.node_id, time.monotonic() + POLL_HOLD_SECONDS
    _check(host, node, process)
    bell, mine = host.bell(node), object()
    # An order given to an older request would be lost: its connection is gone, since a node asks
    # once at a time.
    host.newest_wait[node] = mine
    bell.set()
    while host.newest_wait[node] is mine:
        bell.clear()
        _check(host, node, process)
        response: PullMessagesResponse = await run_in_threadpool(
            fleet_handlers.pull_messages, request, host.state, host.state.object_store
        )
        given = [message.metadata.message_id for message in response.messages_list]
        if host.newest_wait[node] is not mine:
            for name in given:
                await run_in_threadpool(host.offer_again, name)
            host.bell(node).set()
            break
        for name in given:
            host.orders.delivered(node, name)
        left = deadline - time.monotonic()
        if given or left <= 0 or host.closing:
            return response
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), timeout=left)
    return PullMessagesResponse()


def _push(host: Host, request: PushMessagesRequest) -> PushMessagesResponse:
    node = request.node.node_id
    order, reply = _reply_of(request)
    with host.exchange:
        host.orders.check_answer(node, order)
        response = fleet_handlers.push_messages(request=request, state=host.state)
        if reply not in host.state.object_store:  # Flower did not take it
            raise Refused(Fault.BAD_REQUEST)
        host.answers[order] = message_from_proto(request.messages_list[0])
        host.orders.begin_answer(
            node,
            order,
            reply=reply,
            session=response.session_id,
            awaited=response.objects_to_push,
        )
    return response


def _reply_of(request: PushMessagesRequest) -> tuple[str, str]:
    """Returns the order that a reply answers, and the reply's id."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise Refused(Fault.BAD_REQUEST)
    facts, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    if facts.src_node_id != request.node.node_id:
        raise Refused(Fault.FOR_ANOTHER)
    if tree.object_id != facts.message_id:
        raise Refused(Fault.BAD_REQUEST)
    if sum(1 for _ in iterate_object_tree(tree)) > GREATEST_TREE:
        raise Refused(Fault.TOO_LARGE)
    return facts.reply_to_message_id, facts.message_id


def _push_object(host: Host, request: PushObjectRequest) -> PushObjectResponse:
    node, session, name = request.node.node_id, request.session_id, request.object_id
    host.orders.check_upload(node, session, name, len(request.object_content))
    try:
        response = fleet_handlers.push_object(request=request, state=host.state)
    except (NoObjectInStoreError, ValueError):
        # Not what its id says, or dropped since: the round is over.
        raise Refused(Fault.BAD_REQUEST) from None
    if response.stored:
        host.orders.uploaded(node, session, name)
    return response


def _check(host: Host, node: int, process: str) -> None:
    """Returns where a request comes from the newest process of its node."""
    _answered(lambda: host.incarnations.check(node, process), host.names.get(node))


def _answered(serve: Callable[[], T], site: str | None) -> T:
    """Returns what a handler returns; its refusal becomes an answer of one word, and a log line."""
    try:
        return serve()
    except Refused as refused:
        _log_refusal(refused.fault, site)
        raise HTTPException(
            status_code=HTTP_STATUS.get(refused.fault, 400), detail=refused.fault.value
        ) from None


def _log_refusal(fault: Fault, site: str | None) -> None:
    logger.warning(
        "refused: %s", fault.value, extra={"event": "refused", "reason": fault.value, "site": site}
    )
