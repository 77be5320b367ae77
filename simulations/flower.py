"""The simulation's only touch of Flower's internals (1.41): run, task identity, its Ray engine."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from bract.shared.errors import BractError, UsageError

_KNOCK_SECONDS = 5.0
_INTERRUPTED_SECONDS = 15.0  # that an end may take
_POLL_SECONDS = 0.05

__all__ = ["Cluster", "Run", "bind_server", "context", "empty_run", "number", "run_on_ray"]


def bind_server(run: int, node: int) -> None:
    """Names the run and node that new messages of this process come from; one run a process."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, run, node


def empty_run(run: int) -> Run:
    """Returns a run with nothing but its id."""
    return Run.create_empty(run_id=run)


def number(message: Message, name: str) -> None:
    """Gives a message the id that its reply will name."""
    message.metadata.__dict__["_message_id"] = name


def context(
    *, run: int, node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]
) -> Context:
    """Returns the context that an app is called with."""
    return Context(
        run_id=run,
        node_id=node,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray that an engine works on.

    Args:
        address: of a cluster to join; None starts one on this machine.
        workers: the processes of one that is started here; a joined cluster has its own number.
        gpus: whether the workers share the GPUs.
        environment: variables of every worker process.
    """

    address: str | None
    workers: int
    gpus: bool
    environment: Mapping[str, str]


def run_on_ray(
    server: ServerApp,
    client: ClientApp,
    *,
    sites: Sequence[str],
    run_config: Mapping[str, Any],
    cluster: Cluster,
) -> int:
    """Returns how many actors Ray ran, when the ServerApp has ended in Flower's own engine.

    Args:
        server: is told by its grid's `site_names` which node is which site.
        client: serves every site.
        sites: their names, in the order of the partitions.
        run_config: the ServerApp's.
        cluster: where the ClientApp runs.

    Raises:
        UsageError: where no Ray answers at the address, or it has no processor to give.
    """
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    stopped = threading.Event()

    def serve(*, grid: Grid, context: Context) -> None:
        _stop_pulling_(grid, stopped)
        grid.site_names = _named(grid, sites, stopped)  # type: ignore[attr-defined]
        server(grid, context)

    try:
        resources, actors = _connect(cluster)
        _run_simulation(
            num_supernodes=len(sites),
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
            client_app=client,
            server_app=serve,  # type: ignore[arg-type]  # it is called, and nothing else
            server_app_context=context(run=0, node=0, node_config={}, run_config=run_config),
            backend_config={"client_resources": resources},  # type: ignore[dict-item]
        )
    except KeyboardInterrupt:
        # A thread of Flower's or Ray's may wait for ever, and Python for it.
        ended = threading.Timer(_INTERRUPTED_SECONDS, os._exit, [130])
        ended.daemon = True
        ended.start()
        raise
    finally:
        stopped.set()
        _disconnect()
    return actors


def _connect(cluster: Cluster) -> tuple[dict[str, float], int]:
    """Returns what one actor takes and how many there will be, with Ray up and connected."""
    # Neither Ray's usage reports nor its dashboard have a place in a training run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change
    if cluster.address is None:
        # Ray listens on every interface, and by default runs what anybody sends it.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray

    shared = {
        "runtime_env": {"env_vars": dict(cluster.environment)},
        "include_dashboard": False,
        "logging_level": logging.ERROR,
        # Ray prints what workers write on stdout, which --json keeps for itself.
        "log_to_driver": False,
    }
    if cluster.address is None:
        # "local", lest Ray joins whichever cluster this machine started last.
        ray.init("local", num_cpus=cluster.workers, **shared)
    else:
        try:
            _knock(cluster.address)
            ray.init(cluster.address, **shared)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"no Ray cluster answers at {cluster.address}: name its head as HOST:PORT, or "
                "leave --ray-address out to start one here"
            ) from error
    return _share(ray.cluster_resources(), gpus=cluster.gpus)


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _share(total: Mapping[str, float], *, gpus: bool) -> tuple[dict[str, float], int]:
    actors = int(total.get("CPU", 0))
    if actors < 1 or (gpus and not total.get("GPU")):
        kind = "GPU" if actors else "processor"
        raise UsageError(
            f"the Ray cluster has no {kind} to give: add a machine, or use --device cpu"
        )
    # Ray counts in ten-thousandths: rounded up, the last actor would not fit.
    share = math.floor(1e4 * min(1.0, total["GPU"] / actors)) / 1e4 if gpus else 0.0
    return {"num_cpus": 1, "num_gpus": share}, actors


def _named(grid: Grid, sites: Sequence[str], stopped: threading.Event) -> dict[int, str]:
    """Returns the site of each node, once all are there: Flower makes one for each partition.

    It makes them in their order, under ids that are new at each start, while the ServerApp runs.
    """
    state = grid.state  # type: ignore[attr-defined]  # in this process, and in that order
    while len(nodes := state.get_node_info()) < len(sites):
        if stopped.wait(_POLL_SECONDS):
            raise BractError("the simulation engine stopped before its nodes were there")
    return {node.node_id: name for node, name in zip(nodes, sites, strict=True)}


def _stop_pulling_(grid: Grid, stopped: threading.Event) -> None:
    """Makes a grid fail once its engine is gone: the ServerApp's thread would wait for ever."""
    pull = grid.pull_messages

    def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
        if stopped.is_set():
            raise BractError("the simulation engine stopped; every charge is kept")
        return pull(message_ids)

    grid.pull_messages = pull_messages  # type: ignore[method-assign]
