"""A round's state on disk, so that a killed coordinator goes on where it was.

One safetensors file for the arrays and one JSON file that names it; the JSON is replaced last and
at once, so a kill leaves the state of one whole round or of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bract.shared import arrays as named
from bract.shared import canonical
from bract.shared.arrays import Array
from bract.shared.errors import VerificationFailed

_WEIGHTS, _VELOCITY = "weights/", "velocity/"


@dataclass(frozen=True, slots=True, eq=False)
class RoundState:
    """Everything the round loop carries from one round to the next.

    `round` is the last completed one; `attempts` counts rounds sent, void ones included; `heads`
    are the ledger heads that sites last signed; `refused` lists {site, round, reason};
    `velocity` is the server's momentum; `seconds` is the time spent so far.
    """

    contract: str
    weights: Mapping[str, Array]
    velocity: Mapping[str, Array]
    round: int = 0
    attempts: int = 0
    seconds: float = 0.0
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: tuple[Mapping[str, Any], ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()


def save(state: RoundState, folder: Path) -> None:
    """Writes a state; earlier arrays are removed once nothing names them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{_WEIGHTS}{name}": value for name, value in state.weights.items()}
    arrays |= {f"{_VELOCITY}{name}": value for name, value in state.velocity.items()}
    name = f"arrays-{state.round:06d}-{state.attempts:06d}.safetensors"
    canonical.write_atomically(folder / name, named.to_bytes(arrays))
    facts = {
        "arrays": name,
        "arrays_sha256": named.digest(arrays),
        "contract": state.contract,
        "round": state.round,
        "attempts": state.attempts,
        "seconds": state.seconds,
        "heads": state.heads,
        "refused": state.refused,
        "metrics": state.metrics,
    }
    canonical.write_atomically(folder / "state.json", canonical.encode(facts))
    for old in folder.glob("arrays-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path, contract: str) -> RoundState | None:
    """Returns the state in a folder, None where no round was ever saved.

    Raises:
        VerificationFailed: where the state is of another contract or its arrays are damaged.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    facts = canonical.decode(path.read_bytes())
    if facts["contract"] != contract:
        raise VerificationFailed(f"{path} is the checkpoint of another contract")
    arrays = named.from_bytes((folder / facts["arrays"]).read_bytes())
    if named.digest(arrays) != facts["arrays_sha256"]:
        raise VerificationFailed(f"{folder / facts['arrays']} is damaged")
    return RoundState(
        contract=contract,
        weights=_under(_WEIGHTS, arrays),
        velocity=_under(_VELOCITY, arrays),
        round=facts["round"],
        attempts=facts["attempts"],
        seconds=facts["seconds"],
        heads=facts["heads"],
        refused=tuple(facts["refused"]),
        metrics=tuple(facts["metrics"]),
    )


def _under(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
