"""What the process of a site does with its memory from round to round."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
