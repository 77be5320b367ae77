"""Sites that one process serves: the one step of each, from the same weights, in one pass.

Their examples are run together; each site's clipped gradients are summed apart, into a row of its
own, and noised by its own stream. For simulations: elsewhere a process serves one site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bract.client.training.noise import drawn, noised
from bract.client.training.randomness import RandomStream
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.terms import SiteTerms

_GREATEST = 1 << 24  # numbers in the sums of all sites: 128 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a site's round needs: its public terms, its opened examples, its randomness."""

    terms: SiteTerms
    examples: Examples
    stream: RandomStream


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where the numbers of a parameter lie in a site's row."""

    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


class SharedStep:
    """The rows of sites that are trained together, and the step that each takes.

    Args:
        contract: of dp-sgd, with one local step a round.
        summed: the parameters by the names under which they are summed.
        named: the same by their own names, in the same order.
    """

    def __init__(
        self,
        contract: Contract,
        summed: Mapping[str, nn.Parameter],
        named: Mapping[str, nn.Parameter],
    ) -> None:
        self._contract, self._summed, self._named = contract, list(summed), list(named)
        self._device = next(iter(named.values())).device
        self._slots, self._size = list[_Slot](), 0
        for parameter in named.values():
            slot = _Slot(self._size, tuple(parameter.shape))
            self._slots.append(slot)
            self._size = slot.end + slot.end % 2  # as a draw of normals for each alone has it

    def holds(self, sites: int) -> bool:
        """Returns whether the sums of so many sites are held in memory at once."""
        return 1 < sites <= _GREATEST // self._size

    def rows(self, sites: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns zeros, a row for each site, and views of it by parameter, a site first."""
        rows = torch.zeros((sites, self._size), dtype=torch.float64, device=self._device)
        views = {
            name: rows[:, slot.start : slot.end].view(sites, *slot.shape)
            for name, slot in zip(self._summed, self._slots, strict=True)
        }
        return rows, views

    def updates(self, rows: Tensor, jobs: Sequence[Job], weights: Arrays) -> list[dict[str, Array]]:
        """Returns the arrays of each site's update, after noise and one step of plain SGD.

        The first step of SGD with momentum is that of SGD without.
        """
        training, privacy = self._contract.training, self._contract.privacy
        stddev = privacy.noise_multiplier * privacy.clip_norm
        flat = np.zeros(self._size, dtype=np.float32)
        for name, slot in zip(self._named, self._slots, strict=True):
            flat[slot.start : slot.end] = weights[name].reshape(-1)
        before = torch.from_numpy(flat).to(self._device)
        moved = []
        for row, job in zip(rows, jobs, strict=True):
            normals = drawn(job.stream, self._size, self._device).taken()
            gradient = noised([row], [self._size], stddev=stddev, normals=normals)
            gradient /= self._contract.normaliser(job.terms)
            moved.append(before.add(gradient, alpha=-training.learning_rate).sub_(before))
        # the last noise has been drawn before a GPU is waited for
        return [self._arrays(row.cpu().numpy()) for row in moved]

    def _arrays(self, row: Array) -> dict[str, Array]:
        return {
            name: row[slot.start : slot.end].reshape(slot.shape)
            for name, slot in zip(self._named, self._slots, strict=True)
        }
