"""The ServerApp: the same object in every grid.

Its run configuration names files on the server's own disk: `contract` (signed), `out` (the run
folder), `data-dir` or `data-folder` (public examples), `delta`, `init-seed` and `wait-seconds` (how
long to wait for the sites before the first round).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from bract.server import checkpoint
from bract.server.evaluation import Evaluator
from bract.server.rounds import RoundLoop, await_nodes, initial_state
from bract.server.strategy import PublicFedAvg
from bract.shared import arrays, canonical, contract, models
from bract.shared.data import load
from bract.shared.data.locations import folder_of

_WAIT_SECONDS = 60.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the contract's rounds over a grid and leaves the run folder behind."""
    configured = context.run_config
    signed = contract.read(Path(str(configured["contract"])))
    agreed = signed.verify(signed.contract.coordinator)
    out = Path(str(configured["out"]))
    model = _initial_model(agreed, int(configured["init-seed"]))
    evaluator = Evaluator(model, agreed.data)
    folder = folder_of(
        agreed.data.name,
        folder=_path(configured.get("data-folder")),
        root=_path(configured.get("data-dir")),
    )
    splits = load(agreed.data.name, folder)
    state = checkpoint.load(out / "checkpoint", agreed.sha256)
    if state is None:
        parameters = models.released_parameters(model)
        weights = {name: p.detach().numpy().copy() for name, p in parameters.items()}
        state = initial_state(agreed, weights)
        checkpoint.save(state, out / "checkpoint")
    loop = RoundLoop(
        contract=agreed,
        strategy=PublicFedAvg(signed, models.released_shapes(model)),
        evaluator=evaluator,
        validation=splits.validation,
        out=out,
        delta=float(configured["delta"]),
    )
    wait = float(configured.get("wait-seconds", _WAIT_SECONDS))
    await_nodes(grid, len(agreed.cohort), wait)
    state = loop.run(grid, state)
    score = evaluator.score(state.weights, splits.test)
    result = {
        "rounds": state.round,
        "seconds": state.seconds,
        "heads": state.heads,
        "refused": list(state.refused),
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        **evaluator.report(state.weights, splits.test),
    }
    model_bytes = arrays.to_bytes({k: np.asarray(v) for k, v in state.weights.items()})
    canonical.write_atomically(out / "model.safetensors", model_bytes)
    canonical.write_atomically(out / "checkpoint" / "result.json", canonical.encode(result))


def _initial_model(agreed: contract.Contract, seed: int) -> nn.Module:
    """Returns the model before round 1; its start is public, so its seed needs no secrecy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        terms, data = agreed.model, agreed.data
        return models.build(terms.name, data.shape, data.classes, terms.options)


def _path(value: Any) -> Path | None:
    return Path(str(value)) if value else None
