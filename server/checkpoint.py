"""A round's state on disk, so that a killed coordinator goes on where it was.

Two safetensors files, and one JSON file that names them by content; the JSON is replaced last and
at once, so a kill leaves the state of one whole round or of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bract.shared import arrays, canonical
from bract.shared.arrays import Array
from bract.shared.errors import VerificationFailed


@dataclass(frozen=True, slots=True, eq=False)
class RoundState:
    """Everything the round loop carries from one round to the next.

    `round` is the last completed one; `attempts` counts rounds sent, void ones included but for
    those of which it is known that they charged no site; `charges` is the most that one site was
    charged, as receipts show, and `tries` what of it is for the round that comes next: more than
    were sent where a site was killed and took an order up anew; `paid` counts the charges that each
    site's links showed, up to an entry of its ledger; `heads` are the ledger heads that sites last
    signed; `refused` lists {site, round, reason}; `velocity` is the server's momentum; `seconds` is
    the time spent so far.
    """

    contract: str
    weights: Mapping[str, Array]
    velocity: Mapping[str, Array]
    round: int = 0
    attempts: int = 0
    charges: int = 0
    tries: int = 0
    seconds: float = 0.0
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paid: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    refused: tuple[Mapping[str, Any], ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()


def save(state: RoundState, folder: Path) -> None:
    """Writes a state; earlier arrays are removed once nothing names them."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{state.round:06d}-{state.attempts:06d}.safetensors"
    files = {"weights": f"weights-{stem}", "velocity": f"velocity-{stem}"}
    for name, values in zip(files.values(), (state.weights, state.velocity), strict=True):
        arrays.save(values, folder / name)
    facts = {
        "files": files,
        "sha256": {
            "weights": arrays.digest(state.weights),
            "velocity": arrays.digest(state.velocity),
        },
        "contract": state.contract,
        "round": state.round,
        "attempts": state.attempts,
        "charges": state.charges,
        "tries": state.tries,
        "seconds": state.seconds,
        "heads": state.heads,
        "paid": state.paid,
        "refused": state.refused,
        "metrics": state.metrics,
    }
    canonical.write_atomically(folder / "state.json", canonical.encode(facts))
    for old in folder.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink(missing_ok=True)


def load(folder: Path, contract: str) -> RoundState | None:
    """Returns the state in a folder, None where no round was ever saved.

    Raises:
        VerificationFailed: where the state is of another contract or its arrays are damaged.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        facts = canonical.decode(path.read_bytes())
    except VerificationFailed as error:
        raise VerificationFailed(f"{path} is damaged: put it back") from error
    if facts["contract"] != contract:
        raise VerificationFailed(
            f"{path} is the checkpoint of another contract: name another folder as out"
        )
    return RoundState(
        contract=contract,
        weights=_load(folder, facts, "weights"),
        velocity=_load(folder, facts, "velocity"),
        round=facts["round"],
        attempts=facts["attempts"],
        charges=facts.get("charges", facts["attempts"]),  # a run of before these were counted
        tries=facts.get("tries", 0),
        seconds=facts["seconds"],
        heads=facts["heads"],
        paid=facts.get("paid", {}),
        refused=tuple(facts["refused"]),
        metrics=tuple(facts["metrics"]),
    )


def _load(folder: Path, facts: Mapping[str, Any], name: str) -> dict[str, Array]:
    path = folder / facts["files"][name]
    try:
        found = arrays.from_bytes(path.read_bytes())
    except (OSError, VerificationFailed) as error:
        raise VerificationFailed(f"{path} is gone or damaged: put it back") from error
    if arrays.digest(found) != facts["sha256"][name]:
        raise VerificationFailed(f"{path} is damaged")
    return found
