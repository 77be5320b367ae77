"""What a site checks of a message before its gate is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bract.client.site import Site, Trainers
from bract.client.training.execution import Execution
from bract.client.training.isolation import GREATEST_WEIGHT
from bract.client.training.randomness import SecureRandomness
from bract.client.training.trainer import Trainer
from bract.shared.errors import Reason
from bract.shared.messages import RefusalReply, TrainReply
from bract.shared.privacy.ledger import Ledger


@pytest.fixture
def site(world: Any) -> Site:
    return Site(
        name="alpha",
        gate=world.gate(),
        randomness=SecureRandomness(),
        trainers=Trainers(Execution()),
    )


def test_a_ledger_begun_anew_is_another_ledger(world: Any) -> None:
    order, heads = world.order(world.sign(world.contract())), []
    for name in ("one", "two"):
        gate = world.gate(ledger=Ledger(world.folder / f"{name}.sqlite"))
        gate.admit(order)
        with gate.ledger.transaction() as transaction:
            heads.append(transaction.chain("alpha", "ward", key=world.key.public).genesis_hash)
    assert heads[0] != heads[1]


@pytest.mark.parametrize(
    "changed",
    [
        np.full(10, np.nan, dtype=np.float32),
        np.full(10, 1.001 * GREATEST_WEIGHT, dtype=np.float32),
        np.full(10, -np.inf, dtype=np.float32),
        np.zeros(11, dtype=np.float32),
        np.zeros(10, dtype=np.float64),
    ],
)
def test_weights_that_are_not_the_models_or_are_hostile_are_refused_uncharged(
    world: Any, site: Site, changed: Any
) -> None:
    order = world.order(world.sign(world.contract()))
    hostile = replace(order, weights={**order.weights, "1.bias": changed})
    reply = site.train(hostile)
    assert isinstance(reply, RefusalReply)
    assert reply.reason is Reason.WEIGHTS_INVALID
    assert world.opened == 0
    assert isinstance(site.train(order), TrainReply)
    assert world.opened == 1


@pytest.mark.parametrize("where", ["opened", "trained"])
def test_a_charge_that_a_failure_followed_is_the_last_of_this_process(
    world: Any, site: Site, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A charge for what fails buys nothing, round after round."""
    order, gate = world.order(world.sign(world.contract())), site.gate
    with monkeypatch.context() as broken:
        if where == "opened":
            site.gate = replace(gate, holdings=world.shelf(lambda: 1 / 0))
        else:
            broken.setattr(Trainer, "train", lambda self, **given: 1 / 0)
        for _ in range(3):
            reply = site.train(order)
            assert isinstance(reply, RefusalReply)
            assert reply.reason is Reason.SITE_FAILED
    site.gate = gate
    assert isinstance(site.train(order), RefusalReply)  # what is mended is asked for anew
    with site.gate.ledger.transaction() as transaction:
        chain = transaction.chain("alpha", "ward", key=world.key.public)
    assert len(chain.events) == 1

    again = replace(site, failed=set())  # started again
    reply = again.train(order)
    assert isinstance(reply, TrainReply)
    assert reply.receipt.attempt == 2
