"""What an audit runs, fixed before anything is seen: four contracts, their sizes and thresholds.

All have plain SGD and weights that stay what they were, so that every round asks the same thing.

main    the register far above the clip norm: noise, clip, rate, correlations and the bounds
steps   the same with more local steps, which are recovered given the others
joint   every example in every step, the register as large as the model's own gradients: the whole
        release is known but for its noise, tensor by tensor
sparse  so few examples in a batch that every third one is empty
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bract.shared.errors import UsageError

FAMILY = 1e-3  # how often a correct mechanism may be flagged, all tests together
CONFIDENCES = (0.99, 1 - 1e-5)
DELTA = 1e-5
FAR = 1e4  # S where the register stands far above everything else

Name = Literal["main", "steps", "joint", "sparse"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One audit contract and the data for it.

    `canaries` at each of `sites` are in with probability ½; `blank_rounds` are asked of one site
    more, whose examples have no gradient. `strength` is S, None where it is set to the model's
    own gradients.
    """

    name: Name
    canaries: int
    void: int
    sites: int
    rounds: int
    blank_rounds: int = 0
    local_steps: int = 1
    sampling_rate: float = 0.25
    noise_multiplier: float = 1.0
    clip_norm: float = 1.0
    strength: float | None = FAR

    @property
    def rows(self) -> int:
        """Canaries and void coordinates; the bank has one row more."""
        return self.canaries + self.void

    @property
    def normaliser(self) -> float:
        """The rate times the nominal size, which is how many canaries a site may have."""
        return self.sampling_rate * self.canaries

    @property
    def epoch(self) -> int:
        """How many rounds would show each example once, if batches were dealt out."""
        return max(1, round(1 / (self.sampling_rate * self.local_steps)))


@dataclass(frozen=True, slots=True)
class Suite:
    """The contracts of one audit."""

    main: Setting
    steps: Setting
    joint: Setting
    sparse: Setting

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All of them, in the order in which they run."""
        return self.main, self.steps, self.joint, self.sparse


def suite(*, clip_norm: float = 1.0, canaries: int = 1000, rounds: int = 20) -> Suite:
    """Returns the contracts of an audit.

    With 1000 canaries and 20 rounds at each of two sites every fault of `faults` lies at least
    eight standard errors off in some test, so that it is found with probability over 0.999.

    Args:
        clip_norm: of the contracts.
        canaries: at each site of the main contract.
        rounds: of the main contract.
    """
    if canaries < 100 or rounds < 8:
        raise UsageError(
            f"{canaries} canaries over {rounds} rounds tell nothing apart: take at least 100 "
            "canaries and 8 rounds"
        )
    main = Setting(
        name="main",
        canaries=canaries,
        void=1000,
        sites=2,
        rounds=rounds,
        blank_rounds=4,
        noise_multiplier=0.8,
        clip_norm=clip_norm,
    )
    return Suite(
        main=main,
        steps=replace(main, name="steps", local_steps=4, rounds=2, sites=1, blank_rounds=0),
        joint=replace(
            main,
            name="joint",
            canaries=200,
            sites=1,
            rounds=2,
            blank_rounds=0,
            sampling_rate=1.0,
            strength=None,
        ),
        sparse=replace(
            main,
            name="sparse",
            canaries=500,
            void=500,
            sites=1,
            rounds=16,
            blank_rounds=0,
            sampling_rate=0.002,
        ),
    )
