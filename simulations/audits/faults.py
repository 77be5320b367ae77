"""Faults of a private mechanism, planted by name: what an audit must find.

Each replaces a part of the private step, the ledger or the message for as long as its block lasts,
in this process alone. Client and server can never import this module; a test holds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bract.client.training import bookkeeping, clipping
from bract.client.training import optimizer as optimizers
from bract.client.training.noise import noised
from bract.client.training.optimizer import PrivateOptimizer
from bract.client.training.randomness import RandomStream
from bract.client.training.sums import BatchSums
from bract.client.training.trainer import Trainer
from bract.shared.errors import UnknownName
from bract.shared.privacy import entries, events
from bract.shared.updates import ProtectedUpdate
from bract.simulations.randomness import SeededRandomness

Fault = Callable[[], AbstractContextManager[Any]]


def planted(name: str) -> AbstractContextManager[Any]:
    """Returns the block in which a fault is there.

    Raises:
        UnknownName: for a fault that does not exist.
    """
    if name not in FAULTS:
        raise UnknownName("fault", name, FAULTS)
    return FAULTS[name]()


def _scaled_noise(scale: Callable[[PrivateOptimizer], float]) -> Fault:
    """Noise of another size than the contract's."""

    def add_noise(optimizer: PrivateOptimizer) -> None:
        honest = optimizer._stddev
        optimizer._stddev = honest * scale(optimizer)
        original(optimizer)
        optimizer._stddev = honest

    original = PrivateOptimizer.add_noise
    return lambda: mock.patch.object(PrivateOptimizer, "add_noise", add_noise)


def _unclipped(norms: Tensor, clip_norm: float) -> Tensor:
    return torch.isfinite(norms).double()


def _no_clip() -> AbstractContextManager[Any]:
    return mock.patch.object(bookkeeping, "clip_factors", _unclipped)


@contextmanager
def _batch_clip() -> Iterator[None]:
    """The sum of a batch is clipped, and no example of it."""
    original = BatchSums.of

    def sums(summing: BatchSums, *given: Any) -> list[Tensor]:
        found = original(summing, *given)
        norm = torch.stack([value.norm() for value in found]).norm()
        bound = summing._contract.privacy.clip_norm
        factor = min(1.0, bound / float(norm)) if float(norm) > 0 else 1.0
        return [value * factor for value in found]

    with _no_clip(), mock.patch.object(BatchSums, "of", sums):
        yield


def _rate(factor: float) -> Fault:
    """Batches are drawn at another rate than the contract's."""
    original = RandomStream.poisson_sample

    def poisson_sample(stream: RandomStream, population: int, rate: float) -> np.ndarray:
        return original(stream, population, min(1.0, factor * rate))

    return lambda: mock.patch.object(RandomStream, "poisson_sample", poisson_sample)


def _more_steps() -> AbstractContextManager[Any]:
    original = Trainer.train

    def train(trainer: Trainer, **given: Any) -> Any:
        agreed = trainer._contract
        steps = agreed.training.model_copy(update={"local_steps": 2 * agreed.training.local_steps})
        trainer._contract = agreed.model_copy(update={"training": steps})
        try:
            return original(trainer, **given)
        finally:
            trainer._contract = agreed

    return mock.patch.object(Trainer, "train", train)


def _one_seed_for_all_rounds() -> AbstractContextManager[Any]:
    original = SeededRandomness.stream
    return mock.patch.object(
        SeededRandomness, "stream", lambda self, round_number: original(self, 1)
    )


def _one_seed_for_all_sites() -> AbstractContextManager[Any]:
    original = SeededRandomness.stream

    def stream(self: SeededRandomness, round_number: int) -> RandomStream:
        return original(SeededRandomness(self._seed, "a-site"), round_number)

    return mock.patch.object(SeededRandomness, "stream", stream)


@contextmanager
def _empty_skipped() -> Iterator[None]:
    """A step whose batch is empty is left out, noise and all."""
    sums, pre_step, empty = BatchSums.of, PrivateOptimizer.pre_step, [False]

    def noting(summing: BatchSums, examples: Any, batch: np.ndarray, *more: Any) -> Any:
        empty[0] = not len(batch)
        return sums(summing, examples, batch, *more)

    def skipping(optimizer: PrivateOptimizer, closure: Any = None) -> bool:
        return not empty[0] and pre_step(optimizer, closure)

    with (
        mock.patch.object(BatchSums, "of", noting),
        mock.patch.object(PrivateOptimizer, "pre_step", skipping),
    ):
        yield


def _extra_buffer() -> AbstractContextManager[Any]:
    original = Trainer._update

    def update(trainer: Trainer, weights: Any) -> ProtectedUpdate:
        honest = original(trainer, weights)
        extra = {"running_mean": np.zeros(1, np.float32)}
        return ProtectedUpdate({**honest.arrays, **extra})

    return mock.patch.object(Trainer, "_update", update)


@contextmanager
def _shuffled() -> Iterator[None]:
    """Batches of one size are dealt out, epoch by epoch, at each site."""
    train = Trainer.train
    left: dict[str, list[int]] = {}
    shuffle, site = np.random.default_rng(), [""]

    def training(trainer: Trainer, **given: Any) -> Any:
        site[0] = given["terms"].domain
        return train(trainer, **given)

    def deal(stream: RandomStream, population: int, rate: float) -> np.ndarray:
        cards, size = left.setdefault(site[0], []), max(1, round(population * rate))
        if len(cards) < size:
            cards[:] = shuffle.permutation(population).tolist()
        batch = [cards.pop() for _ in range(size)]
        return np.sort(np.array(batch, dtype=np.int64))

    with (
        mock.patch.object(Trainer, "train", training),
        mock.patch.object(RandomStream, "poisson_sample", deal),
    ):
        yield


def _under_charged() -> AbstractContextManager[Any]:
    """The ledger is charged for three quarters of the rate that is used."""

    def event_for(agreed: Any) -> dict[str, Any]:
        (event,) = entries.events_of(agreed, rounds=1, evaluations=0)
        if isinstance(event, events.PoissonGaussian):
            event = replace(event, sampling_rate=0.75 * event.sampling_rate)
        return events.encode(event)

    return mock.patch.object(entries, "event_for", event_for)


@contextmanager
def _one_tensor_bare() -> Iterator[None]:
    """The first tensor is released without noise."""
    original = PrivateOptimizer.add_noise

    def add_noise(optimizer: PrivateOptimizer) -> None:
        original(optimizer)
        first = optimizer.params[0]
        first.grad = first.summed_grad.to(first.dtype).view_as(first).clone()

    with mock.patch.object(PrivateOptimizer, "add_noise", add_noise):
        yield


@contextmanager
def _one_noise_for_two() -> Iterator[None]:
    """The second tensor gets the noise of the first, as far as that reaches."""
    add_noise = PrivateOptimizer.add_noise
    drawn: list[Tensor] = []

    def noting(optimizer: PrivateOptimizer) -> None:
        drawn.clear()
        add_noise(optimizer)

    def repeating(
        sums: Sequence[Tensor], places: Sequence[int], *, stddev: float, normals: Tensor
    ) -> Tensor:
        for part in torch.split(normals, list(places)):
            drawn.append(part.clone())
            if len(drawn) == 2:
                width = min(len(drawn[0]), len(part))
                part[:width] = drawn[0][:width]
        return noised(sums, places, stddev=stddev, normals=normals)

    with (
        mock.patch.object(PrivateOptimizer, "add_noise", noting),
        mock.patch.object(optimizers, "noised", repeating),
    ):
        yield


def _partial_norm() -> AbstractContextManager[Any]:
    """The norm leaves out the last parameter that a backward pass reaches, a weight in front."""

    def joint_norms(norms: list[Tensor]) -> Tensor:
        return clipping.joint_norms(norms[:-2] if len(norms) > 2 else norms[:1])

    return mock.patch.object(bookkeeping, "joint_norms", joint_norms)


FAULTS: dict[str, Fault] = {
    "no noise": _scaled_noise(lambda optimizer: 0.0),
    "noise over batch": _scaled_noise(lambda optimizer: 1 / optimizer._normaliser),
    "noise x 0.8": _scaled_noise(lambda optimizer: 0.8),
    "clip skipped": _no_clip,
    "batch clipped": _batch_clip,
    "rate x 2": _rate(2.0),
    "rate x 1.25": _rate(1.25),
    "steps x 2": _more_steps,
    "seed reused over rounds": _one_seed_for_all_rounds,
    "seed shared by sites": _one_seed_for_all_sites,
    "empty batches skipped": _empty_skipped,
    "buffer sent along": _extra_buffer,
    "shuffled batches": _shuffled,
    "ledger under-charges": _under_charged,
    "layer without noise": _one_tensor_bare,
    "one noise for two tensors": _one_noise_for_two,
    "norm over a part": _partial_norm,
}
