"""Randomness for sampling and noise: AES-256 in counter mode, keyed by the operating system.

torch's CPU generator keeps 32 bits of its seed and its CUDA generator is not cryptographic, so
neither is used. A key is drawn for each round and never written down; there is no seed to set.
"""

from __future__ import annotations

import hashlib
import math
import os
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from bract.shared.errors import UsageError

Kind = Literal["csprng", "seeded"]
# Words turned into normals at once, so that they stay in a core's cache; even.
_BLOCK = 1 << 15
_GPU_BLOCK = 1 << 20
_ZEROS = memoryview(bytes(8 * _BLOCK))


class RandomStream:
    """Uniform words, Bernoulli draws and standard normals from one AES-256-CTR key stream.

    Args:
        key: 32 bytes; who knows them knows the noise.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError("a stream takes a key of 32 bytes")
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        # The cipher asks for a block more than it fills.
        self._room = np.empty(_ZEROS.nbytes + 15, dtype=np.uint8)

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
        """Returns `count` standard normals, two from each two words (Box & Muller 1958).

        A word gives a radius √(−2·ln u) with u of 63 bits that exclude 0, the next one an angle
        of 64 bits in [−π, π], all in float64: tails reach 9.4σ, where 24-bit uniforms would cut
        them near 5.2σ. An odd count throws one normal away.
        """
        normals = np.empty(count + count % 2)
        for start in range(0, len(normals), _BLOCK):
            part = normals[start : start + _BLOCK]
            _box_muller(self._passing(len(part)).view("<i8"), part)
        return normals[:count]

    def normals_on(self, count: int, device: torch.device) -> Tensor:
        """Returns what `normals` does, on a GPU, which turns the host's words into them.

        It does so where it is told to and is not waited for. The numbers are those of `normals`
        but for the last bits of a logarithm, a sine or a cosine; the words are the same.

        Raises:
            UsageError: where the GPU turns words that are no secret into other numbers.
        """
        check_turning(device)
        words = torch.empty(count + count % 2, dtype=torch.int64, pin_memory=device.type == "cuda")
        flat = words.numpy()
        for start in range(0, len(flat), _BLOCK):
            part = flat[start : start + _BLOCK]
            part[:] = self._passing(len(part)).view("<i8")
        try:
            found = _box_muller_on(words.to(device, non_blocking=True))
        except torch.OutOfMemoryError:  # the host needs none of the GPU's to turn them
            turned = np.empty(len(flat))
            _box_muller(flat, turned)
            found = torch.from_numpy(turned).to(device)
        return found[:count]

    def _passing(self, count: int) -> npt.NDArray[np.uint64]:
        """Returns up to a block of the next words, which the next call writes over.

        Memory that is new to a process costs more than the words in it.
        """
        self._encryptor.update_into(_ZEROS[: 8 * count], self._room.data)
        return self._room[: 8 * count].view("<u8")


def _box_muller(words: npt.NDArray[np.int64], normals: npt.NDArray[np.float64]) -> None:
    """Fills `normals` from signed words, two by two; torch's sine and cosine are vectorised."""
    radii, angles = words[0::2].astype(np.float64), words[1::2].astype(np.float64)
    np.abs(radii, out=radii)
    radii += 0.5  # never 0
    radii *= 2.0**-63
    np.log(radii, out=radii)
    radii *= -2.0
    np.sqrt(radii, out=radii)
    angles *= math.pi * 2.0**-63
    turned = torch.from_numpy(angles)
    np.multiply(radii, torch.cos(turned).numpy(), out=normals[0::2])
    np.multiply(radii, turned.sin_().numpy(), out=normals[1::2])


def _box_muller_on(words: Tensor) -> Tensor:
    """Returns what `_box_muller` fills in, where the words are; some at a time, to save memory."""
    normals = torch.empty(len(words), dtype=torch.float64, device=words.device)
    pieces = (torch.split(values, _GPU_BLOCK) for values in (words, normals))
    for some, part in zip(*pieces, strict=True):
        radii = some[0::2].double().abs_().add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
        angles = some[1::2].double().mul_(math.pi * 2.0**-63)
        torch.mul(radii, angles.cos(), out=part[0::2])
        torch.mul(radii, angles.sin_(), out=part[1::2])
    return normals


@lru_cache
def check_turning(device: torch.device) -> None:
    """Returns where a device turns words as the host does; each is asked once a process.

    Raises:
        UsageError: elsewhere: noise must not depend on what nobody looked at.
    """
    words = np.frombuffer(hashlib.shake_256(b"no secret").digest(8 * 4096), "<i8").copy()
    words[:4] = np.iinfo(np.int64).min, 0, 1, np.iinfo(np.int64).max
    expected = np.empty(len(words))
    _box_muller(words, expected)
    found = _box_muller_on(torch.from_numpy(words).to(device)).cpu().numpy()
    if not np.allclose(found, expected, rtol=1e-12, atol=1e-12):
        raise UsageError(
            f"device {device} makes other normals of the same words than the host: use cpu"
        )


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
