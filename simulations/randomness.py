"""Seeded randomness, so that a simulation can be repeated; it never protects anything.

Lives above the client, which cannot import it: there is no seed to set at a real site.
"""

from __future__ import annotations

from bract.client.training.randomness import Kind, RandomStream
from bract.shared import canonical


class SeededRandomness:
    """Streams keyed by (seed, site, round): a round run again gives the same update."""

    kind: Kind = "seeded"

    def __init__(self, seed: int, site: str) -> None:
        self._seed, self._site = seed, site

    def stream(self, round_number: int) -> RandomStream:
        """Returns the stream of a round, the same for every attempt."""
        parts = (str(self._seed).encode(), self._site.encode(), str(round_number).encode())
        return RandomStream(canonical.tagged("seeded/1", *parts))
