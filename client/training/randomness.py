"""Randomness for sampling and noise: AES-256 in counter mode, keyed by the operating system.

torch's CPU generator keeps 32 bits of its seed and its CUDA generator is not cryptographic, so
neither is used. A key is drawn for each round and never written down; there is no seed to set.
"""

from __future__ import annotations

import os
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

Kind = Literal["csprng", "seeded"]


class RandomStream:
    """Uniform words, Bernoulli draws and standard normals from one AES-256-CTR key stream.

    Args:
        key: 32 bytes; who knows them knows the noise.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("a stream takes a key of 32 bytes")
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Returns `count` uniform 64-bit words."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def poisson_sample(self, population: int, rate: float) -> npt.NDArray[np.int64]:
        """Returns the indices of a Poisson sample: each of `population` in, with probability q.

        53-bit uniforms in [0, 1), so that each probability is exact to 2⁻⁵³.
        """
        uniforms = (self.words(population) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.flatnonzero(uniforms < rate)

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """Returns `count` standard normals by inversion of 54-bit uniforms that exclude 0.

        The sign has a bit of its own, so both tails reach 8.3σ; 24-bit uniforms would cut them
        near 5.2σ.
        """
        words = self.words(count)
        halves = ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-54
        magnitudes = ndtri(halves, out=halves)
        signs = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
        return np.asarray(magnitudes * signs)


class Randomness(Protocol):
    """Where a site's streams come from; `kind` is recorded with every charge."""

    @property
    def kind(self) -> Kind:
        """What the ledger says of the noise."""

    def stream(self, round_number: int) -> RandomStream:
        """Returns the stream for one attempt at a round."""


class SecureRandomness:
    """A fresh key from the operating system for every attempt; the only kind outside simulation."""

    kind: Kind = "csprng"

    def stream(self, round_number: int) -> RandomStream:
        """Returns a stream under a new key; `round_number` changes nothing."""
        return RandomStream(os.urandom(32))
