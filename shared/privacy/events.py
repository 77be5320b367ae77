"""What a release did to the data: frozen events, and the only codec that reads them back.

dp-accounting can rebuild events from names held in data; nothing from outside is ever fed to it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bract.shared.errors import VerificationFailed


@dataclass(frozen=True, slots=True, order=True)
class PoissonGaussian:
    """`steps` sums over Poisson samples at rate q, each with Gaussian noise of stddev σ·C.

    `noise_multiplier` σ is relative to the clip norm C; q = 1 is the plain Gaussian mechanism.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.sampling_rate <= 1):
            raise ValueError(f"sampling_rate {self.sampling_rate} must be in (0, 1]")
        if not (0 < self.noise_multiplier < math.inf):
            raise ValueError(f"noise_multiplier {self.noise_multiplier} must be above 0 and finite")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps {self.steps} must be a whole number above 0")


@dataclass(frozen=True, slots=True, order=True)
class Unbounded:
    """A release without noise: nothing bounds what it tells."""


@dataclass(frozen=True, slots=True, order=True)
class Spent:
    """Releases whose record was lost: as much as the ceiling `epsilon` that the gate kept to."""

    epsilon: float

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf):
            raise ValueError(f"epsilon {self.epsilon} must be above 0 and finite")


Event = PoissonGaussian | Unbounded | Spent
Kind = tuple[float, float] | Unbounded | Spent  # of steps: their rate and noise multiplier


def encode(event: Event) -> dict[str, Any]:
    """Returns the event as JSON values; floats as `float.hex()`, exact to the last bit."""
    match event:
        case PoissonGaussian():
            return {
                "type": "poisson-gaussian",
                "sampling_rate": float(event.sampling_rate).hex(),
                "noise_multiplier": float(event.noise_multiplier).hex(),
                "steps": event.steps,
            }
        case Unbounded():
            return {"type": "unbounded"}
        case Spent():
            return {"type": "spent", "epsilon": float(event.epsilon).hex()}


def decode(value: Any) -> Event:
    """Returns the event in JSON values.

    Raises:
        VerificationFailed: for a type that is not listed here, a missing or an extra key, a number
            out of range, or a second spelling of the same number.
    """
    try:
        event = _decode(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise VerificationFailed("an event of the ledger cannot be read") from error
    if encode(event) != value:
        raise VerificationFailed("an event of the ledger is not in canonical form")
    return event


def _decode(value: Any) -> Event:
    if value["type"] == "unbounded":
        return Unbounded()
    if value["type"] == "spent":
        return Spent(epsilon=float.fromhex(value["epsilon"]))
    if value["type"] != "poisson-gaussian":
        raise ValueError("unknown type of event")
    return PoissonGaussian(
        sampling_rate=float.fromhex(value["sampling_rate"]),
        noise_multiplier=float.fromhex(value["noise_multiplier"]),
        steps=value["steps"],
    )


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Returns equal mechanisms added up and sorted: same ε, composed in milliseconds.

    Example:
        >>> step = PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.0, steps=5)
        >>> merge([step, step])
        (PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.0, steps=10),)
    """
    return merged(count(events))


def count(events: Iterable[Event]) -> Counter[Kind]:
    """Returns how many steps of each kind of mechanism there are; what has no steps is one."""
    counts: Counter[Kind] = Counter()
    for event in events:
        if isinstance(event, PoissonGaussian):
            counts[event.sampling_rate, event.noise_multiplier] += event.steps
        else:
            counts[event] += 1
    return counts


def merged(counts: Mapping[Kind, int]) -> tuple[Event, ...]:
    """Returns the merged events of counts; a kind whose count is 0 or less is none."""
    held = {kind: number for kind, number in counts.items() if number > 0}
    steps = sorted((kind, number) for kind, number in held.items() if isinstance(kind, tuple))
    others = [kind for kind in held if not isinstance(kind, tuple)]
    return (*(PoissonGaussian(*kind, number) for kind, number in steps), *sorted(others, key=repr))
