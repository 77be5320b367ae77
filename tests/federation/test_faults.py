"""Real processes are killed, stopped, cut off and starved, and every run completes.

After each fault `Federation.done` checks what must hold: no round is aggregated twice, every
ledger is whole against its head file and against what the server witnessed, and every update that
was received stands behind an earlier charge. The tests say what the fault itself may cost.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.client.flower import HEARTBEAT_SECONDS
from bract.shared.privacy import accounting
from bract.simulations.federations.loopback import Processes

ONCE = {1: 1, 2: 1, 3: 1}
TWICE_IN_ROUND_2 = {1: 1, 2: 2, 3: 1}
# Two runs differ by their noise; an update that was lost or used twice differs by more.
SPREAD = 0.08
WAIT_BEFORE_ROUND = "wait before bract.server.rounds:RoundLoop._round"
PUSHED_ROUND_2 = "bract.server.flower.grid:FleetGrid.push_messages 2"

# Where a client is killed in round 2, and what that round costs it.
# Its ledger grows by a genesis, then by a charge and a release a round.
CLIENT_KILLS = {
    "before its charge": ("kill before bract.client.gate:Gate.admit 2", ONCE),
    "during its charge": (
        "kill after bract.shared.privacy.transaction:Transaction.append 4",
        ONCE,
    ),
    "while its charge is half on disk": (
        "spill after bract.shared.privacy.transaction:Transaction.append 4",
        ONCE,
    ),
    "after its charge, before the head file": (
        "kill before bract.shared.privacy.ledger:Ledger._saw 4",
        TWICE_IN_ROUND_2,
    ),
    "while it trains": (
        "kill after bract.client.training.trainer:Trainer._load 2",
        TWICE_IN_ROUND_2,
    ),
    "while it stores the update": (
        "kill before pathlib:Path.replace 2 updates",
        TWICE_IN_ROUND_2,
    ),
    "after the update, before its hash": (
        "kill after bract.client.updates:UpdateStore.keep 2",
        TWICE_IN_ROUND_2,
    ),
    "before it replies": ("kill after bract.client.gate:Gate.release 2", ONCE),
    "while it replies": (
        "kill after flwr.supernode.fleet_http_client:FleetHttpClient.PushObject 12",
        ONCE,
    ),
    "after it replied": ("kill after bract.client.flower:Connection.send 2", ONCE),
}

# Where the server is killed in round 2; nothing is ever charged again.
SERVER_KILLS = {
    "before it sends orders": "kill before bract.server.flower.grid:FleetGrid.push_messages 2",
    "while it waits for replies": "kill after bract.server.flower.grid:FleetGrid.push_messages 2",
    "with one reply of two": "kill after bract.server.flower.grid:FleetGrid._take 3",
    "while it aggregates": "kill after bract.server.strategy:PublicFedAvg._sort 4",
    "after it aggregated": "kill after bract.server.strategy:PublicFedAvg.aggregate_train 2",
    "while it writes the checkpoint's arrays": "kill before pathlib:Path.replace 3 .weights-",
    "between the checkpoint's two files": (
        "kill before bract.shared.canonical:write_atomically 3 checkpoint/state.json"
    ),
    "before the checkpoint has its name": "kill before pathlib:Path.replace 3 .state.json",
    "after the checkpoint, before the metrics": "kill after bract.server.checkpoint:save 3",
    "while it closes the run": "kill before bract.server.rounds:RoundLoop._close 1",
    "before the summary": "kill after bract.server.rounds:RoundLoop._close 1",
}


def near(outcome: Any, undisturbed: Any) -> bool:
    """Whether a run is as good as one in which nothing went wrong."""
    accuracy = outcome.summary["test_accuracy"]
    return bool(abs(accuracy - undisturbed.summary["test_accuracy"]) < SPREAD)


@pytest.mark.parametrize("moment", CLIENT_KILLS)
def test_killed_client_goes_on_when_started_again(
    moment: str, federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault(f"kill -9 of a client {moment}")
    federation, (point, charges) = federate(), CLIENT_KILLS[moment]
    federation.server()
    federation.client("alpha", point)
    federation.client("beta")
    federation.ended("alpha", -signal.SIGKILL)
    federation.client("alpha")
    outcome = federation.done()
    assert outcome.charges("alpha") == charges
    assert outcome.charges("beta") == ONCE
    # What the server says of the run's ε is what an auditor counts.
    spent = accounting.epsilon(outcome.chains["alpha"].events, outcome.summary["delta"])
    assert outcome.summary["epsilon_run"] == outcome.metrics[-1]["epsilon_run"] == spent
    assert outcome.summary["refused"] == []
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert near(outcome, undisturbed)


@pytest.mark.parametrize("moment", SERVER_KILLS)
def test_killed_server_goes_on_when_started_again(
    moment: str, federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault(f"kill -9 of the server {moment}")
    federation = federate()
    federation.server(SERVER_KILLS[moment])
    federation.clients()
    federation.ended("server", -signal.SIGKILL)
    federation.server()
    outcome = federation.done()
    assert outcome.attempts == 3
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE, "sent again, free"
    assert outcome.summary["refused"] == []
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert near(outcome, undisturbed)


def test_clients_outlast_a_server_that_is_away(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("server away")
    federation = federate()
    federation.server(f"kill after {PUSHED_ROUND_2}")
    federation.clients()
    federation.ended("server", -signal.SIGKILL)
    time.sleep(HEARTBEAT_SECONDS)  # of each client at least one heartbeat fails
    assert all(federation.processes.running[name].poll() is None for name in ("alpha", "beta"))
    federation.server()
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


@pytest.mark.parametrize("answers", ["never", "late"])
def test_round_closes_without_a_client_that_does_not_answer(
    answers: str, federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault(f"a client that answers {answers} (SIGSTOP)")
    # Long enough for the first round of a busy machine; what never comes is waited for once.
    federation = federate(
        "alpha",
        "beta",
        "gamma",
        rounds=3 if answers == "late" else 2,
        deadlines={"reply": 12.0, "close": 2.0},
    )
    federation.server(f"{WAIT_BEFORE_ROUND} 1", f"{WAIT_BEFORE_ROUND} 3")
    federation.client("gamma", "stop after bract.client.gate:Gate.admit 2")
    federation.clients("alpha", "beta")
    federation.waits("server")
    federation.connected()
    federation.go("server")
    federation.stopped("gamma")
    if answers == "late":
        federation.waits("server", 2)  # round 2 is over
        federation.signal("gamma", signal.SIGCONT)
        federation.until(
            lambda: federation.count("server", event="refused", site="gamma"), "gamma is late"
        )
        federation.go("server")
    outcome = federation.done()
    missed = [line["round"] for line in outcome.metrics if line["replied"] == 2]
    assert {(r["site"], r["reason"]) for r in outcome.summary["refused"]} == {
        ("gamma", "node-failed")
    }
    assert missed == [2]
    paid = {number: 1 for number in range(1, len(outcome.metrics) + 1)}
    # What came late, or not at all, was charged all the same.
    assert all(outcome.charges(name) == paid for name in federation.layout.sites)
    if answers == "late":
        assert federation.count("server", event="refused", site="gamma", reason="no-such-order")
        assert near(outcome, undisturbed)


def test_second_answer_to_an_order_is_refused_and_not_used(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("a client that answers twice")
    federation = federate()
    federation.server()
    federation.client("alpha", "twice after bract.client.flower:Connection.send 2")
    federation.clients("beta")
    outcome = federation.done()
    reasons = {
        event["reason"]
        for event in federation.events("server")
        if event.get("event") == "refused" and event.get("site") == "alpha"
    }
    assert reasons
    assert reasons <= {"already-answered", "no-such-order"}
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert outcome.summary["refused"] == []
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


def test_network_cut_in_the_middle_of_an_upload(
    federate: Callable[..., Any], link: Callable[..., Any], fault: Callable[[str], None]
) -> None:
    fault("network cut in the middle of an upload")
    federation = federate(
        model={"name": "mlp", "options": {"hidden": 4096}},
        training={"local_steps": 2, "learning_rate": 0.1},
    )
    cable = link(federation, "alpha")
    cable.cut_after_upload(400_000)  # of the 1.2 MB of an update
    federation.server()
    federation.clients()
    federation.until(lambda: cable.is_cut, "an upload was cut")
    assert federation.rounds() == []
    cable.mend()
    outcome = federation.done()
    assert cable.cuts == 1
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE, "sent again, free"


@pytest.mark.parametrize("side", ["both", "client"])
def test_network_cut_while_a_client_waits_for_an_order(
    side: str,
    federate: Callable[..., Any],
    link: Callable[..., Any],
    undisturbed: Any,
    fault: Callable[[str], None],
) -> None:
    fault(f"network cut while a client waits, noticed by {side}")
    federation = federate()
    cable = link(federation, "alpha")
    federation.server()
    federation.client("alpha")
    federation.connected("alpha")
    time.sleep(0.5)  # its request for an order is on the way
    cable.cut(server_notices=side == "both")
    cable.mend()
    federation.connected("alpha", times=2)
    federation.client("beta")
    outcome = federation.done()
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert outcome.attempts == 3
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


@pytest.mark.parametrize("how", ["no file may grow", "no space on the device"])
def test_full_disk_is_refused_and_outlived(
    how: str,
    federate: Callable[..., Any],
    small_disk: Callable[[Path], None],
    fault: Callable[[str], None],
) -> None:
    fault(f"disk full at a client: {how}")
    federation = federate(minimum_cohort=1, rounds=4)
    state = federation.layout.site("alpha").parent / "state"
    if how == "no space on the device":
        small_disk(state)
    federation.server(*(f"{WAIT_BEFORE_ROUND} {number}" for number in (1, 2, 4)))
    client = federation.client("alpha")
    federation.client("beta")
    federation.connected()
    federation.waits("server")
    federation.go("server")
    federation.waits("server", 2)  # round 1 is over
    filler = state / "filler"
    if how == "no space on the device":
        fill(filler)
    else:
        resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    federation.go("server")
    federation.waits("server", 3)  # rounds 2 and 3 are over
    filler.unlink(missing_ok=True)
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    federation.go("server")
    outcome = federation.done()
    assert {(r["site"], r["round"], r["reason"]) for r in outcome.summary["refused"]} == {
        ("alpha", 2, "ledger-unavailable"),
        ("alpha", 3, "ledger-unavailable"),
    }
    assert outcome.charges("alpha") == {1: 1, 4: 1}
    assert outcome.charges("beta") == {1: 1, 2: 1, 3: 1, 4: 1}
    assert [line["replied"] for line in outcome.metrics] == [2, 1, 1, 2]
    assert client.poll() is None, "it never had to be started again"


def test_site_that_refused_for_good_is_asked_again_once_it_is_mended(
    federate: Callable[..., Any], fault: Callable[[str], None]
) -> None:
    fault("policy that allows too little, mended while the server goes on")
    federation = federate(minimum_cohort=1)
    policy = federation.layout.site("alpha")
    mended = policy.read_text()
    policy.write_text(mended.replace("models =", "min_noise_multiplier = 99.0\nmodels =", 1))
    federation.server(*(f"{WAIT_BEFORE_ROUND} {number}" for number in (1, 2, 3)))
    federation.clients()
    federation.connected()
    for times in (1, 2):
        federation.waits("server", times)
        federation.go("server")
    federation.waits("server", 3)  # rounds 1 and 2 are over
    federation.signal("alpha", signal.SIGTERM)
    federation.ended("alpha", 0)
    policy.write_text(mended)
    federation.client("alpha")
    federation.connected("alpha", times=2)
    federation.go("server")
    outcome = federation.done()
    refused = [(r["site"], r["round"], r["reason"]) for r in outcome.summary["refused"]]
    assert refused == [("alpha", 1, "policy-noise")]
    assert [line["replied"] for line in outcome.metrics] == [1, 1, 2]
    assert (outcome.charges("alpha"), outcome.charges("beta")) == ({3: 1}, ONCE)
    assert federation.count("server", event="retired", site="alpha") == 1


def test_full_disk_without_which_no_round_is_whole_does_not_use_up_the_contract(
    federate: Callable[..., Any], fault: Callable[[str], None]
) -> None:
    fault("disk full at a client that every round needs")
    federation = federate(minimum_cohort=2, spare_attempts=1)
    federation.server(f"{WAIT_BEFORE_ROUND} 1", f"{WAIT_BEFORE_ROUND} 2")
    client = federation.client("alpha")
    federation.client("beta")
    federation.connected()
    federation.waits("server")
    federation.go("server")
    federation.waits("server", 2)  # round 1 is over
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    federation.go("server")
    # As many void rounds as the contract had attempts left; then it is stopped as it waits.
    federation.until(lambda: federation.count("server", event="waiting") == 2, "it was void thrice")
    federation.signal("server", signal.SIGTERM)
    federation.ended("server", 130)
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    federation.server()
    outcome = federation.done()
    # Beta was charged in the first of them, whose update was sent again after that.
    assert outcome.attempts == 4
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    reasons = {(r["site"], r["round"], r["reason"]) for r in outcome.summary["refused"]}
    assert reasons == {("alpha", 2, "ledger-unavailable")}
    assert client.poll() is None, "it never had to be started again"


def test_idle_client_stops_cleanly_and_comes_back(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("SIGTERM of an idle client")
    federation = federate()
    federation.server()
    federation.client("alpha")
    federation.connected("alpha")
    federation.signal("alpha", signal.SIGTERM)
    federation.ended("alpha", 0)
    federation.clients()
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


@pytest.mark.parametrize("patience", ["finishes", "abandons"])
def test_training_client_stops_cleanly_and_comes_back(
    patience: str, federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault(f"SIGTERM of a training client that {patience} its round")
    federation = federate()
    site = federation.layout.site("alpha")
    seconds = 60.0 if patience == "finishes" else 0.0
    site.write_text(f"stop_seconds = {seconds}\n{site.read_text()}")
    # Whole or not, the answer is looked at only once the client is gone.
    federation.server(f"wait after {PUSHED_ROUND_2}")
    federation.client("alpha", "term after bract.client.training.trainer:Trainer._load 2")
    federation.client("beta")
    federation.ended("alpha", 0)
    assert federation.count("alpha", event="stopped") == 1
    federation.waits("server")
    federation.go("server")
    federation.client("alpha")
    outcome = federation.done()
    assert outcome.charges("alpha") == (ONCE if patience == "finishes" else TWICE_IN_ROUND_2)
    assert outcome.charges("beta") == ONCE
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert outcome.summary["refused"] == []
    assert near(outcome, undisturbed)


@pytest.mark.parametrize(
    ("moment", "point"),
    {
        "while it waits for replies": f"term after {PUSHED_ROUND_2}",
        "while it writes a checkpoint": "term before pathlib:Path.replace 3 .state.json",
    }.items(),
)
def test_server_that_is_told_to_stop_goes_on_when_started_again(
    moment: str,
    point: str,
    federate: Callable[..., Any],
    undisturbed: Any,
    fault: Callable[[str], None],
) -> None:
    fault(f"SIGTERM of the server {moment}")
    federation = federate()
    federation.server(point)
    federation.clients()
    federation.ended("server", 130)
    assert "Traceback" not in federation.processes.log("server")
    federation.server()
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


def test_server_that_lost_its_link_state_lets_the_sites_in_again(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("kill -9 of the server, and its link state lost")
    federation = federate()
    federation.server(f"wait after {PUSHED_ROUND_2}")
    federation.client("alpha", "stop after bract.client.training.trainer:Trainer._load 2")
    federation.client("beta")
    federation.stopped("alpha")
    federation.signal("server", signal.SIGKILL)
    federation.ended("server", -signal.SIGKILL)
    shutil.rmtree(federation.layout.federation.parent / "state")
    federation.server()
    federation.connected("beta", times=2)
    federation.signal("alpha", signal.SIGCONT)  # speaks for a node that is unknown now
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert near(outcome, undisturbed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's migrations
@pytest.mark.parametrize("moment", ["between two rounds", "while orders are open"])
def test_server_that_slept_goes_on(
    moment: str,
    federate: Callable[..., Any],
    slept: Callable[[Path], None],
    undisturbed: Any,
    fault: Callable[[str], None],
) -> None:
    fault(f"a server that sleeps {moment}, longer than Flower waits for a heartbeat")
    federation, open_orders = federate(), moment == "while orders are open"
    federation.server(f"wait after {PUSHED_ROUND_2}" if open_orders else f"{WAIT_BEFORE_ROUND} 2")
    federation.client("alpha", *[CLIENT_KILLS["before its charge"][0]] * open_orders)
    federation.client("beta")
    federation.waits("server")
    if open_orders:
        federation.ended("alpha", -signal.SIGKILL)
    slept(federation.layout.federation.parent / "state" / "superlink.sqlite")
    if open_orders:
        federation.client("alpha")  # its order is offered again
        federation.connected("alpha", times=2)
    federation.go("server")
    outcome = federation.done()
    assert "slept" in federation.processes.log("server")
    assert outcome.attempts == 3
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert [line["replied"] for line in outcome.metrics] == [2, 2, 2]
    assert near(outcome, undisturbed)


@pytest.mark.parametrize("backup", ["ends", "never ends"])
def test_server_whose_link_state_is_locked(
    backup: str, federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault(f"a backup that locks the link state and {backup}")
    federation = federate()
    impatient = ["hurry before bract.server.flower.host:_link_state"] * (backup == "never ends")
    # An answer of round 2 has come: its order is deleted next.
    federation.server(*impatient, "wait before bract.server.flower.grid:FleetGrid._take 3")
    federation.clients()
    federation.waits("server")
    path = federation.layout.federation.parent / "state" / "superlink.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as locks:
        locks.execute("BEGIN IMMEDIATE")
        federation.go("server")
        if backup == "ends":
            time.sleep(6)  # Flower itself waits for 5 s
        else:
            federation.ended("server", 1)
            said = federation.events("server")[-1]["message"]
            assert said.startswith(f"cannot use {path} (database is locked): ")
    if backup == "never ends":
        federation.server()
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert outcome.attempts == 3
    assert near(outcome, undisturbed)


def test_everything_is_killed_at_once(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("kill -9 of every process at once")
    federation = federate()
    federation.server(f"kill after {PUSHED_ROUND_2}")
    federation.clients()
    federation.ended("server", -signal.SIGKILL)
    for name in federation.layout.sites:
        federation.signal(name, signal.SIGKILL)
        federation.ended(name, -signal.SIGKILL)
    federation.server()
    federation.clients()
    outcome = federation.done()
    for name in federation.layout.sites:
        assert outcome.charges(name) in (ONCE, TWICE_IN_ROUND_2)
    assert near(outcome, undisturbed)


def test_a_site_that_does_not_come_back_is_not_asked(
    federate: Callable[..., Any], fault: Callable[[str], None]
) -> None:
    fault("kill -9 of the server and of a site that stays away")
    federation = federate(minimum_cohort=1, deadlines={"gather": 20.0})
    federation.server("kill before bract.server.rounds:RoundLoop._round 2")
    federation.clients()
    federation.ended("server", -signal.SIGKILL)
    federation.signal("alpha", signal.SIGKILL)
    federation.ended("alpha", -signal.SIGKILL)
    federation.server()
    outcome = federation.done()
    assert [line["replied"] for line in outcome.metrics] == [2, 1, 1]
    assert outcome.summary["refused"] == [], "no deadline was waited out"
    assert (outcome.charges("alpha"), outcome.charges("beta")) == ({1: 1}, ONCE)
    assert outcome.attempts == 3


def fill(path: Path) -> None:
    """Writes until the disk has no byte left."""
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_superseded_process_does_not_take_its_site_away(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("two processes with the keys of one site")
    federation = federate()
    site = federation.layout.site("alpha")
    copy = shutil.copytree(site.parent, site.parent.with_name("copy")) / site.name
    federation.server()
    federation.processes.points = ()
    federation.processes._start("copy", ["client", str(copy)])
    federation.connected("alpha")
    federation.client("alpha")
    federation.ended("copy", 1)
    assert "another process with this site's key" in federation.processes.log("copy")
    status = federation.layout.federation.parent / "state" / "status.json"
    status.unlink(missing_ok=True)
    federation.until(status.exists, "the server says who is connected")
    assert json.loads(status.read_text())["connected"] == ["alpha"]
    federation.client("beta")
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert outcome.summary["refused"] == []
    assert near(outcome, undisturbed)


def test_second_server_on_the_same_files_leaves_the_first_alone(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    fault("a second server on the same files")
    federation = federate()
    federation.server(f"wait after {PUSHED_ROUND_2}")
    federation.clients()
    federation.waits("server")
    federation.processes.points = ()
    federation.processes._start("second", ["server", str(federation.layout.federation)])
    federation.ended("second", 1)
    assert "another process uses" in federation.processes.log("second")
    federation.go("server")
    outcome = federation.done()
    assert outcome.charges("alpha") == outcome.charges("beta") == ONCE
    assert outcome.summary["refused"] == []
    assert near(outcome, undisturbed)


def test_processes_started_cold_give_the_same(
    federate: Callable[..., Any], undisturbed: Any, fault: Callable[[str], None]
) -> None:
    """The other tests fork processes whose imports are done; this one starts commands anew."""
    fault("kill -9 of a client, every process started by its command")
    federation = federate()
    with Processes(federation.layout) as processes:
        federation.processes, forked = processes, federation.processes
        processes.start_server("--log-format", "json")
        processes.start_client("alpha")
        killed = processes.start_client("beta")
        federation.connected("beta")
        killed.kill()
        killed.wait()
        processes.start_client("beta")
        outcome = federation.done(seconds=240)
        federation.processes = forked
    assert outcome.charges("alpha") == ONCE
    assert sum(outcome.charges("beta").values()) in (3, 4)
    assert near(outcome, undisturbed)
