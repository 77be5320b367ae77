"""Flower's link state and fleet routes, served by this process over TLS."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import Message
from flwr.common.constant import (
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    Status,
    SubStatus,
)
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.state.schema.linkstate_models import Node as NodeModel
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from sqlalchemy import event, update
from sqlalchemy.exc import DatabaseError

from bract.server.flower.connections import PatientUntil
from bract.server.flower.routes import application
from bract.server.incarnations import Incarnations
from bract.server.orders import Orders
from bract.shared import node_keys
from bract.shared.errors import BractError

logger = logging.getLogger("bract.server")

TASK_HEARTBEAT_SECONDS = 15.0
BUSY_SECONDS = 60.0  # another program's backup may hold the link state's file for so long


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to serve, and with which certificate."""

    host: str
    port: int
    certificate: Path
    key: Path


class Host:
    """Flower's SuperLink application in a thread of this process.

    Args:
        database: the link state's SQLite file; made where it is missing.
        sites: each site's node key as one OpenSSH line; only these are registered.
        listener: address and certificate.
        greatest_reply: how many bytes one answer may have.
    """

    def __init__(
        self, *, database: Path, sites: Mapping[str, str], listener: Listener, greatest_reply: int
    ) -> None:
        self._database = database
        self._factory, self.state = _link_state(database)
        self.orders = Orders(greatest_reply)
        self.keys = {
            public_key_to_bytes(node_keys.public(line)): name for name, line in sites.items()
        }
        self.names = _register(self.state, self.keys)
        _end_earlier_runs(self.state)
        self.run, self._task = _begin_run(self.state)
        self.incarnations = Incarnations()
        self.envelopes: dict[str, Message] = {}
        # Held while an order changes both here and in the link state, so that they never differ.
        self.exchange = threading.RLock()
        self.bells: dict[int, asyncio.Event] = {}
        self.newest_wait: dict[int, object] = {}
        self.closing = False
        self._fault = "see the log"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(self, self._factory),
                host=listener.host,
                port=listener.port,
                ssl_certfile=str(listener.certificate),
                ssl_keyfile=str(listener.key),
                http=PatientUntil,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                access_log=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="superlink", daemon=True)
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run-heartbeat", daemon=True)

    @property
    def port(self) -> int:
        """The port that is served; the listener's own where it is not 0."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    def start(self) -> None:
        """Returns once the port answers.

        Raises:
            BractError: where the port cannot be had, in the system's words.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise BractError(
                    f"cannot serve on {self._listener.host}:{self._listener.port}: {self._fault}; "
                    "correct server.listen"
                )
            time.sleep(0.01)
        self._beats.start()

    def close(self) -> None:
        """Ends the run and gives the port back."""
        self.closing = True
        self._stop.set()
        with suppress(DatabaseError):  # the next process ends what this one leaves
            self.state.finish_task(self._task, SubStatus.COMPLETED, "")
        for node in list(self.names):
            self.ring(node)
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def ring(self, node: int) -> None:
        """Wakes the request by which a node waits for its next order."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.bell(node).set())

    def bell(self, node: int) -> asyncio.Event:
        """Returns the event that a node's waiting request waits for."""
        return self.bells.setdefault(node, asyncio.Event())

    def site(self, public_key: bytes) -> str | None:
        """Returns the site that a node key was listed for."""
        return self.keys.get(public_key)

    def offer_again(self, name: str) -> None:
        """Offers an open order anew to a process that may have lost it, half an answer and all."""
        with self.exchange:
            envelope = self.envelopes.get(name)
            if envelope is None or not self.orders.reset(name):
                return  # answered or given up a moment ago
            self.state.delete_messages({name})
            self.offer(envelope)

    def offer(self, envelope: Message) -> None:
        """Puts an order where its node finds it, under another run where Flower ended this one.

        Raises:
            BractError: where it cannot be put there.
        """
        with self.exchange:
            if self._stores(envelope):
                return
            self._keep_alive()
            if not self._stores(envelope):
                raise BractError(
                    f"an order for {self.names.get(envelope.metadata.dst_node_id)} cannot be kept: "
                    "start the server again; it goes on from its last whole round"
                )

    def connected(self) -> list[str]:
        """Returns the names of the sites whose nodes are online.

        Raises:
            BractError: where the link state cannot be used.
        """
        with usable(self._database):
            return sorted(self.names[n] for n in self.state.get_nodes(self.run) if n in self.names)

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve()

        try:
            asyncio.run(serve())
        except SystemExit as error:  # uvicorn's way to say that it cannot bind
            self._fault = _words(error.__context__)
        except OSError as error:
            self._fault = _words(error)

    def _beat(self) -> None:
        while not self._stop.wait(TASK_HEARTBEAT_SECONDS):
            try:
                self._keep_alive()
            except Exception as error:  # its library's own; the main thread meets it, and decides
                logger.warning("a heartbeat could not be noted: %s", type(error).__name__)

    def _keep_alive(self) -> None:
        """Says that the run goes on, or begins another: Flower revives none that it ended.

        It ends one that was silent for a minute by the clock: a machine that slept, or whose clock
        leapt, finds its run ended.
        """
        with self.exchange:
            if self.closing or self.state.acknowledge_task_heartbeat(self._task):
                return
            self.run, self._task = _begin_run(self.state)
        logger.warning("this machine slept, or its clock leapt: the run goes on under another id")

    def _stores(self, envelope: Message) -> bool:
        """Returns whether an order is kept as one of this run, made now; its name stays."""
        facts = envelope.metadata
        facts.__dict__["_run_id"], facts.created_at = self.run, time.time()
        return self.state.store_message_ins(envelope) is not None


def _words(fault: BaseException | None) -> str:
    if isinstance(fault, OSError) and fault.errno == errno.EADDRINUSE:
        return "the port is taken"
    return getattr(fault, "strerror", None) or str(fault)


@contextmanager
def usable(database: Path) -> Iterator[None]:
    """Says in one line that a link state's file cannot be used, where a block meets that.

    Raises:
        BractError: where it is locked for too long, its disk is full, or it was damaged.
    """
    try:
        yield
    except DatabaseError as error:
        raise BractError(
            f"cannot use {database} ({error.orig}): let no other program hold it, free some space, "
            "then start the server again; it goes on from its last whole round"
        ) from error


def _link_state(database: Path) -> tuple[LinkStateFactory, LinkState]:
    """Returns the link state in a file; a new file is whole before it has its name.

    Flower makes its tables one by one, and opens no file again in which a killed process left some
    of them. Nothing in it outlives a process: nodes are registered anew, and earlier runs are
    ended. So a file that does not open is made anew.

    Raises:
        BractError: where none can be made.
    """
    try:
        if database.exists():
            try:
                return _opened(database)
            except Exception as error:  # its library's own
                logger.warning(
                    "%s does not open (%s): made anew", database.name, type(error).__name__
                )
        new = database.with_name(f"new-{database.name}")
        for name in (new.name, database.name):  # with what SQLite keeps beside a file
            for old in database.parent.glob(f"{name}*"):
                old.unlink(missing_ok=True)
        _, state = _opened(new)
        state._engine.dispose()  # type: ignore[attr-defined]  # else its file stays open
        new.replace(database)
        return _opened(database)
    except Exception as error:
        raise BractError(
            f"cannot make {database}: free some space, mend its rights, or name another "
            "server.state"
        ) from error


def _opened(database: Path) -> tuple[LinkStateFactory, LinkState]:
    factory = LinkStateFactory(
        str(database), NoOpFederationManager(), ObjectStoreFactory(":flwr-in-memory:")
    )
    state = factory.state()
    engine = state._engine  # type: ignore[attr-defined]
    engine.dispose()  # Flower's own patience is 5 s; its connections are made anew
    event.listen(engine, "connect", _be_patient)
    return factory, state


def _be_patient(connection: Any, _: object) -> None:
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")


def _register(state: LinkState, keys: Mapping[bytes, str]) -> dict[int, str]:
    """Returns the nodes of the listed keys, alone of all that were ever known.

    The others stay, and nobody speaks for them: Flower keeps a deleted node's key for good, and its
    site could never be listed again. None is online: a killed process leaves those that it knew,
    and they may be gone.
    """
    _take_back_deleted(state)
    for online in state.get_node_info(statuses=[NodeStatus.ONLINE]):
        state.deactivate_node(online.node_id)
    names: dict[int, str] = {}
    for key, name in keys.items():
        node = state.get_node_id_by_public_key(key)
        if node is None:
            node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)
        names[node] = name
    return names


def _take_back_deleted(state: LinkState) -> None:
    """Gives back the nodes that an earlier version deleted, for which Flower has no call."""
    deleted = update(NodeModel).where(NodeModel.status == NodeStatus.UNREGISTERED)
    with state.session() as session:  # type: ignore[attr-defined]
        session.execute(deleted.values(status=NodeStatus.REGISTERED, unregistered_at=None))


def _end_earlier_runs(state: LinkState) -> None:
    """Ends what a killed process left: a late answer to it is refused, never mixed in."""
    for run in state.get_run_info(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
        state.delete_messages(state.get_message_ids_from_run_id(run.run_id))
        state.delete_sessions_in_run(run.run_id)
        state.finish_task(int(run.primary_task_id or 0), SubStatus.FAILED, "")


def _begin_run(state: LinkState) -> tuple[int, int]:
    """Returns the ids of this process's run and of its task."""
    run = state.create_run(
        "", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    (facts,) = state.get_run_info(run_ids=[run])
    task = int(facts.primary_task_id or 0)
    state.claim_task(task)
    state.activate_task(task)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, task, SUPERLINK_NODE_ID
    return run, task
