"""The ServerApp: the same object in every grid.

Its run configuration names files on the server's own disk: `contract` (signed), `out` (the run
folder), `data-folder` (public examples; private ones beside them are not opened), `delta`,
`init-seed`, `wait-seconds` (how long to wait for the whole cohort before the first round),
`minimum-cohort`, `sites-seconds`, `pause-seconds`, `round-seconds` and `close-seconds` (see
`rounds.Patience`),
`witness-key`, by which ledger heads are countersigned, `head-file`, which keeps them over runs, and
`device`, where public examples are scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from bract.server import checkpoint, fairness
from bract.server.checkpoint import RoundState
from bract.server.rounds import Patience, RoundLoop, initial_state
from bract.server.strategy import PublicFedAvg
from bract.server.witnesses import WitnessDesk
from bract.shared import arrays, canonical, contract, keys, models
from bract.shared.data import load_public, public
from bract.shared.data.locations import folder_of
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.evaluation import Evaluator
from bract.shared.privacy.head_file import HeadFile
from bract.shared.reports.runs import Traffic

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
    evaluator = Evaluator(model, agreed.data, str(configured.get("device", "cpu")))
    folder = folder_of(agreed.data.name, folder=_path(configured.get("data-folder")), root=None)
    validation, test = load_public(agreed.data, folder)
    if agreed.data.public not in (None, public.sha256(agreed.data, folder)):
        raise VerificationFailed(
            "the public examples here are not those that the contract declares: name their folder "
            "with server.public_data"
        )
    state = checkpoint.load(out / "checkpoint", agreed.sha256)
    if state is None:
        parameters = models.released_parameters(model)
        weights = {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}
        state = initial_state(agreed, weights)
        checkpoint.save(state, out / "checkpoint")
    loop = RoundLoop(
        contract=agreed,
        strategy=PublicFedAvg(
            signed,
            models.released_shapes(model),
            WitnessDesk(
                _witness_key(agreed, configured.get("witness-key")),
                HeadFile(Path(str(heads))) if (heads := configured.get("head-file")) else None,
            ),
            getattr(grid, "site_names", None),
            seed=int(configured["init-seed"]) if agreed.simulation else None,
        ),
        evaluator=evaluator,
        validation=validation,
        out=out,
        delta=float(configured["delta"]),
        patience=Patience(
            minimum_cohort=int(configured.get("minimum-cohort", 1)),
            gather_seconds=float(configured.get("wait-seconds", _WAIT_SECONDS)),
            sites_seconds=float(configured.get("sites-seconds", _WAIT_SECONDS)),
            pause_seconds=float(configured.get("pause-seconds", 0.0)),
            round_seconds=_seconds(configured.get("round-seconds")),
            close_seconds=_seconds(configured.get("close-seconds")),
        ),
    )
    state = loop.run(grid, state)
    model_bytes = arrays.to_bytes({k: np.asarray(v) for k, v in state.weights.items()})
    result = {
        "rounds": state.round,
        "charges": state.charges,
        "seconds": state.seconds,
        "heads": state.heads,
        "refused": list(state.refused),
        **fairness.last(state.metrics),
        **_traffic(state),
        **evaluator.report(state.weights, test),
        "model_sha256": canonical.sha256(model_bytes),
    }
    canonical.write_atomically(out / "model.safetensors", model_bytes)
    canonical.write_atomically(out / "checkpoint" / "result.json", canonical.encode(result))


def _traffic(state: RoundState) -> dict[str, Any]:
    """Returns the bytes of the last round, which are those of every round."""
    line = state.metrics[-1] if state.metrics else {}
    return {name: line.get(name) for name in Traffic.model_fields}


def _initial_model(agreed: contract.Contract, seed: int) -> nn.Module:
    """Returns the model before round 1; its start is public, so its seed needs no secrecy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.of(agreed.model, agreed.data)


def _witness_key(agreed: contract.Contract, path: Any) -> keys.SigningKey | None:
    """Returns the key that the contract names as its witness.

    Raises:
        UsageError: where another key was given, or none.
    """
    if agreed.witness is None:
        return None
    key = keys.load(Path(str(path)))
    if key.public != agreed.witness:
        raise UsageError(f"{path} is not the witness key that the contract names")
    return key


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)


def _path(value: Any) -> Path | None:
    return Path(str(value)) if value else None
