"""What is on the network: /health, and eight of Flower's fleet routes, with handlers of our own.

Flower's control and runtime routes, by which anyone could start code, are not there at all, nor
are those by which a node would register itself or ask for code. What its fleet routes leave open
is closed:

every route: path, key, signature and length are looked at first (`doorman`).
activate: a node killed a moment ago is let in at once, and its open orders are offered again.
deactivate: the newest process of a node alone; an older one that ends does not take it along.
pull-messages: waits for an order instead of being asked again and again.
pull-object, confirm, push-messages, push-object: a node has its own orders and no other's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.routing import APIRoute
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL, HEARTBEAT_MIN_INTERVAL
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
from flwr.supercore.error import FlowerError, http_error_translator
from flwr.supercore.protobuf.routing import ProtobufRoute
from flwr.supercore.protobuf.translation import (
    PROTOBUF_REQUEST_DEPENDENCY,
    ProtobufTranslationMiddleware,
)
from flwr.supercore.routers import health
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp

from bract.server import memory
from bract.server.flower.doorman import HTTP_STATUS, REASON, SITE, Doorman
from bract.server.orders import Fault, Refused
from bract.shared import flower, incarnation
from bract.shared.errors import VerificationFailed
from bract.shared.flower import GrewTooLarge
from bract.shared.incarnation import Incarnation

if TYPE_CHECKING:
    from bract.server.flower.host import Host

logger = logging.getLogger("bract.server")

POLL_HOLD_SECONDS = 10.0
Process = Annotated[str, Header(alias=incarnation.HEADER)]
Signature = Annotated[str, Header(alias=incarnation.SIGNATURE_HEADER)]
T = TypeVar("T")


def application(host: Host, factory: LinkStateFactory) -> ASGIApp:
    """Returns what uvicorn serves: /health and the fleet routes, strangers turned away first."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.linkstate_factory = factory
    app.include_router(health.router)
    messages = _messages(host)
    app.include_router(messages)
    app.add_middleware(ProtobufTranslationMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=http_error_translator)
    served = {route.path for route in messages.routes if isinstance(route, APIRoute)}
    return Doorman(app, host, frozenset(served))


def _messages(host: Host) -> APIRouter:
    """Returns the routes of activation, heartbeat and messages."""

    async def as_itself(request: Request) -> None:
        """Returns where a request speaks for the node whose key signed it.

        The doorman has checked signature and time, more widely than Flower's own check would.
        """
        asked, site = request.state.protobuf_request, request.scope[SITE]
        if isinstance(asked, ActivateNodeRequest):
            spoken_for = host.site(asked.public_key)
        else:
            node = asked.node_id if isinstance(asked, DeactivateNodeRequest) else asked.node.node_id
            # A node of an earlier link state is nobody's; `_check` asks for a new connection.
            spoken_for = host.names.get(node, site)
        if spoken_for != site:
            raise _refusal(Fault.UNSIGNED)

    router = APIRouter(
        prefix="/v1/fleet", route_class=ProtobufRoute, dependencies=[Depends(as_itself)]
    )

    @router.post("/activate-node")
    def activate(
        request: Annotated[ActivateNodeRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
        signature: Signature = "",
    ) -> ActivateNodeResponse:
        shown = Incarnation(name=process, signature=signature)
        return _answered(lambda: _activate(host, request, shown))

    @router.post("/deactivate-node")
    def deactivate(
        request: Annotated[DeactivateNodeRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> DeactivateNodeResponse:
        _check(host, request.node_id, process)
        host.state.deactivate_node(request.node_id)
        return DeactivateNodeResponse()

    @router.post("/send-node-heartbeat")
    def heartbeat(
        request: Annotated[SendNodeHeartbeatRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> SendNodeHeartbeatResponse:
        _check(host, request.node.node_id, process)
        interval = _answered(lambda: _interval(request.heartbeat_interval))
        known = host.state.acknowledge_node_heartbeat(request.node.node_id, interval)
        return SendNodeHeartbeatResponse(success=known)

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
        _check(host, request.node.node_id, process)
        return _answered(lambda: _push(host, request))

    @router.post("/pull-object")
    def pull_object(
        request: Annotated[PullObjectRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PullObjectResponse:
        node = request.node.node_id
        _check(host, node, process)
        _answered(lambda: host.orders.check_fetch(node, request.object_id))
        return _object(host, request.object_id)

    @router.post("/push-object")
    def push_object(
        request: Annotated[PushObjectRequest, PROTOBUF_REQUEST_DEPENDENCY],
        process: Process = "",
    ) -> PushObjectResponse:
        node = request.node.node_id
        _check(host, node, process)
        _answered(
            lambda: host.orders.upload(
                node, request.session_id, request.object_id, request.object_content
            )
        )
        memory.collect(len(request.object_content))
        return PushObjectResponse(stored=True)

    return router


def _activate(host: Host, request: ActivateNodeRequest, shown: Incarnation) -> ActivateNodeResponse:
    node = host.state.get_node_id_by_public_key(request.public_key)
    if node is None or node not in host.names:
        raise Refused(Fault.UNREGISTERED_KEY)
    interval = _interval(request.heartbeat_interval)
    try:
        incarnation.verify(request.public_key, shown)
    except VerificationFailed:
        raise Refused(Fault.BAD_REQUEST) from None
    host.incarnations.activate(node, shown.name)
    try:
        fleet_handlers.activate_node(request=request, state=host.state)
    except FlowerError:  # it still counts as online: its last process was killed
        host.state.acknowledge_node_heartbeat(node, interval)
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


def _interval(seconds: float) -> float:
    """Returns a heartbeat interval; one that never ended would keep a dead node in every round."""
    if not HEARTBEAT_MIN_INTERVAL <= seconds <= HEARTBEAT_MAX_INTERVAL:
        raise Refused(Fault.BAD_REQUEST)
    return seconds


def _object(host: Host, name: str) -> PullObjectResponse:
    content = host.state.object_store.get(name)
    return PullObjectResponse(
        object_found=content is not None,
        object_available=bool(content),
        object_content=content or b"",
    )


def _push(host: Host, request: PushMessagesRequest) -> PushMessagesResponse:
    """Begins an answer; of what its envelope says only the order and the root are used."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise Refused(Fault.BAD_REQUEST)
    facts, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    if facts.src_node_id != request.node.node_id:
        raise Refused(Fault.FOR_ANOTHER)
    try:
        parts = flower.parts(tree)
    except GrewTooLarge:
        raise Refused(Fault.TOO_LARGE) from None
    except VerificationFailed:
        raise Refused(Fault.BAD_REQUEST) from None
    if tree.object_id != facts.message_id:
        raise Refused(Fault.BAD_REQUEST)
    session = host.orders.begin_answer(
        request.node.node_id, facts.reply_to_message_id, reply=tree.object_id, parts=parts
    )
    return PushMessagesResponse(
        results={tree.object_id: 0}, objects_to_push=parts, session_id=session
    )


def _check(host: Host, node: int, process: str) -> None:
    """Returns where a request comes from the newest process of its node."""
    _answered(lambda: host.incarnations.check(node, process))


def _answered(serve: Callable[[], T]) -> T:
    """Returns what a handler returns; its refusal becomes an answer of one word."""
    try:
        return serve()
    except Refused as refused:
        raise _refusal(refused.fault) from None


def _refusal(fault: Fault) -> HTTPException:
    return HTTPException(
        status_code=HTTP_STATUS.get(fault, 400), detail=fault.value, headers={REASON: fault.value}
    )
