"""What the process of a site does with its memory from round to round, and with its log."""

from __future__ import annotations

import json
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bract.shared import cli
from bract.simulations.federations.loopback import Layout

MIB = 1 << 20
PROGRAM = """
import resource
from pathlib import Path
import numpy as np
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from bract.client.service import Answers, Patience
from bract.simulations import flower

def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])

app, seen = ClientApp(), []

@app.train()
def train(message, context):
    block = np.ones(5 << 20)  # 40 MiB, as a step's activations
    del block
    seen.append(resident())
    return Message(RecordDict(), reply_to=message)

flower.bind_server(1, 1)
context = flower.context(run=1, node=1, node_config={}, run_config={})
order = Message(RecordDict(), dst_node_id=1, message_type="train", group_id="1")
flower.number(order, "order")
answers = Answers(app, context, Patience(1.0))
before = resident()
answers.to(order)
print(seen[0] - before, resident() - before)
"""


SWALLOWED = """
import os, signal, time
from types import SimpleNamespace
from bract.client import service

service.LEAVING_SECONDS = 0.1
try:
    with service._stoppable(SimpleNamespace(stop_seconds=60.0)):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except service.Stopped:
            print("once")
        os.kill(os.getpid(), signal.SIGTERM)  # another one is nothing
        time.sleep(60)
except service.Stopped:
    print("twice")
os.kill(os.getpid(), signal.SIGTERM)
print("ignored")
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.35",
    reason="an allocator that does not keep so large a block",
)
def test_memory_is_kept_from_step_to_step_and_goes_back_before_the_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    training, waiting = map(int, done.stdout.split())
    assert training > 30 * MIB
    assert waiting < 10 * MIB


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_quick_succession_are_one(
    layout: Layout, tmp_path: Path, number: signal.Signals
) -> None:
    with (tmp_path / "log").open("wb") as log:
        client = subprocess.Popen([*cli.PROGRAM, "client", str(layout.site("alpha"))], stderr=log)
        while "trying again" not in (tmp_path / "log").read_text():
            assert client.poll() is None
            time.sleep(0.01)
        while client.poll() is None:  # until it has ended
            client.send_signal(number)
            time.sleep(0.001)
    told = (tmp_path / "log").read_text().splitlines()
    assert (client.returncode, told[-1].split()[2:4]) == (0, ["bract.client", "stopped"])
    status = json.loads((layout.site("alpha").parent / "state" / "status.json").read_text())
    assert status["doing"] == "stopped"


def test_a_stop_comes_again_where_it_was_swallowed_and_is_over_once_it_was_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["once", "twice", "ignored"]


def test_a_server_that_stays_away_is_told_of_once(layout: Layout, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as away, (tmp_path / "log").open("wb") as log:
        port = away.getsockname()[1]
        text = layout.site("alpha").read_text()
        layout.site("alpha").write_text(text.replace("127.0.0.1:1", f"127.0.0.1:{port}"))
        client = subprocess.Popen(
            [*cli.PROGRAM, "client", str(layout.site("alpha")), "--log-format", "json"], stderr=log
        )
        try:
            for _ in range(4):
                away.accept()[0].close()
        finally:
            client.terminate()
            assert client.wait() == 0
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in told] == ["disconnected", "stopped"]
