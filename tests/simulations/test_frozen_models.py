"""A model with a frozen front from its federation file, or its experiment, to a trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.numpy import load_file

from bract.server import app, service
from bract.shared import contract as contracts
from bract.shared import federation, models
from bract.shared.errors import UsageError, VerificationFailed
from bract.simulations.federations.loopback import Layout

Bract = Callable[..., Any]
FACTORY = """
import torch
from torch import nn
from bract.shared.models.frozen import FrozenFront

def fronted(shape, classes, *, seed=1):
    front = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh()).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    front[1].weight.copy_(torch.randn(16, 64, generator=generator) / 8)
    front[1].bias.zero_()
    return FrozenFront(front, nn.Linear(16, classes))
"""


@pytest.fixture(autouse=True)
def name(install: Callable[[str, str], None]) -> str:
    install("simulated_models", FACTORY)
    return "simulated_models:fronted"


def rewritten(layout: Layout, name: str, **model: Any) -> federation.Federation:
    """The federation of one site with another model, and the contract that it proposes."""
    text = layout.federation.read_text()
    found = tomli_w.dumps({"model": {"name": name, **model}})
    layout.federation.write_text(text.replace('[model]\nname = "linear"\n', found))
    return federation.read(layout.federation)


def test_proposed_contract_names_the_frozen_weights_and_its_file_need_not(
    layout: Layout, name: str
) -> None:
    chosen = rewritten(layout, name)
    signed = federation.propose(chosen)
    agreed = signed.contract
    assert chosen.model.frozen is None
    assert agreed.model == models.pinned(chosen.model, agreed.data)
    assert agreed.model.frozen is not None
    layout.contract.write_bytes(signed.to_bytes())
    assert service.read_contract(chosen) == agreed


def test_file_that_names_other_frozen_weights_is_refused(layout: Layout, name: str) -> None:
    chosen = rewritten(layout, name)
    layout.contract.write_bytes(federation.propose(chosen).to_bytes())
    named = chosen.model_copy(
        update={"model": chosen.model.model_copy(update={"frozen": "0" * 64})}
    )
    with pytest.raises(UsageError, match="another model than"):
        service.read_contract(named)
    with pytest.raises(VerificationFailed, match="the frozen weights here are not"):
        federation.propose(named)


def test_simulated_run_is_pinned_trains_behind_the_front_and_scores(
    bract: Bract, tmp_path: Path, name: str
) -> None:
    done = bract("simulate", "digits", "--rounds", "2", "--sites", "3", "--model", name,
                 "--out", str(tmp_path / "run"), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rounds"] == 2
    assert summary["refused"] == []
    assert 0 <= summary["test_accuracy"] <= 1
    agreed = contracts.read(tmp_path / "run" / "contract.json").contract
    assert agreed.model.frozen is not None
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert {n: v.shape for n, v in trained.items()} == {"back.weight": (10, 16), "back.bias": (10,)}


def test_server_with_other_frozen_weights_begins_no_round(layout: Layout, name: str) -> None:
    agreed = federation.propose(rewritten(layout, name)).contract
    assert app._initial_model(agreed, 0)
    other = agreed.model.model_copy(update={"options": {"seed": 2}})
    with pytest.raises(VerificationFailed, match="the frozen weights here are not"):
        app._initial_model(agreed.model_copy(update={"model": other}), 0)
