"""One round at one site: Poisson batches, clipped sums, one noise draw a step, an update."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bract.client.training import admission, gradients, graphs, scoring, views
from bract.client.training.bookkeeping import BookKeepingSum, Loss
from bract.client.training.clipping import SLACK
from bract.client.training.gradients import ClippedSum, Mode, PlainSum, Precision
from bract.client.training.optimizer import PlainOptimizer, PrivateOptimizer, Sgd
from bract.client.training.randomness import RandomStream, check_turning
from bract.client.training.sizes import Sizes, fill
from bract.client.training.together import Job, SharedStep
from bract.client.training.views import Moves
from bract.shared import arrays, models, tasks
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import ModelRejected, Reason, Refusal
from bract.shared.models.frozen import Features, FrozenFront
from bract.shared.terms import SiteTerms
from bract.shared.updates import KINDS, ProtectedScore, Update

# Trained weights stay far below it. Public, so that refusing tells nothing.
GREATEST_WEIGHT = 1e3


@dataclass(frozen=True, slots=True)
class Execution:
    """How to compute, which cannot change privacy: device, per-example mode, memory bound.

    `physical_batch` is the greatest number of examples in memory at once, None what suits the
    device; a logical batch is split into pieces of it. `precision` is that of the products of the
    two passes; norms and sums are float64 in either, of the very numbers that the passes gave.
    `noise_ahead` lets a thread draw a step's noise while its gradients are formed: for where a
    core is idle.
    """

    device: str = "cpu"
    mode: Mode = "book-keeping"
    physical_batch: int | None = None
    precision: Precision = "float32"
    noise_ahead: bool = True

    @property
    def at_once(self) -> int:
        """The greatest number of examples in memory: a GPU is idle with few."""
        suits = 256 if torch.device(self.device).type == "cpu" else 1024
        return self.physical_batch or suits


T = TypeVar("T")


class Trainer:
    """A model kept warm on its device, and the private rounds it runs.

    Of a model with a frozen front only what lies behind it is run in a step: the front's features
    of the same examples are computed once.

    Args:
        contract: the verified contract; model, data terms and mechanism come from it.
        execution: how to compute.

    Raises:
        ModelRejected: where the model cannot be trained with per-example privacy.
        UsageError: where a GPU would make other noise of the host's words than the host.
        VerificationFailed: where its frozen weights are not those of the contract.
    """

    def __init__(self, contract: Contract, execution: Execution) -> None:
        # TF32 keeps 10 bits of a product: a norm in it could pass the bound.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        model = models.of(contract.model, contract.data)
        admission.admit_once(model, terms=contract.model, data=contract.data)
        self._device = torch.device(execution.device)
        model = model.to(self._device).train()
        self._features = None
        if isinstance(model, FrozenFront) and contract.training.views == 1:
            self._features = Features(model, contract.data, self._device)
            model = model.behind()
        self._model, self._contract = model, contract
        self._noise_ahead = execution.noise_ahead
        self._pieces = max(1, execution.at_once // contract.training.views)
        self.parameters = models.released_parameters(self._model)
        self.shapes = models.released_shapes(self._model)
        self._summer, self._summed = _summer(contract, execution, self._model)
        self._adder: ClippedSum | PlainSum = self._summer
        if not isinstance(self._summer, PlainSum):
            self._adder = graphs.replayed(self._summer, self._summed, contract.model.name)
        self._shared = SharedStep(contract, self._summed, self.parameters)
        self._sizes = Sizes(self._probed)
        if self._device.type == "cuda":  # before any charge, by the name that noise knows it by
            check_turning(next(iter(self.parameters.values())).device)
        self._rehearse()

    def check(self, weights: Arrays) -> None:
        """Returns where weights are exactly those that are trained, finite and not too large.

        Raises:
            Refusal: otherwise.
        """
        fault = arrays.fault(weights, self.shapes)
        if fault or any(np.abs(v).max(initial=0) > GREATEST_WEIGHT for v in weights.values()):
            raise Refusal(Reason.WEIGHTS_INVALID, fault or f"a weight is over {GREATEST_WEIGHT:g}")

    def train(
        self, *, terms: SiteTerms, examples: Examples, weights: Arrays, stream: RandomStream
    ) -> Update:
        """Returns the update of one round: the contract's local steps from `weights`.

        Runs exactly `local_steps` steps, empty batches included: a skipped one would tell.

        Args:
            terms: this site's public terms.
            examples: opened by the gate, after the charge.
            weights: exactly the released parameters.
            stream: the randomness of this attempt.
        """
        self._load(weights)
        optimizer = self._optimizer(terms, stream)
        rate, expected = self._contract.privacy.sampling_rate, self._contract.normaliser(terms)
        with gradients.expected_warnings():
            for _ in range(self._contract.training.local_steps):
                batch = stream.poisson_sample(len(examples), rate)
                moves = self._moves(len(batch), stream)
                if self._noise_ahead and isinstance(optimizer, PrivateOptimizer):
                    optimizer.draw_ahead(_drawing(os.getpid()))
                optimizer.put(list(self._sums(examples, batch, moves, expected).values()))
                optimizer.step()
                optimizer.zero_grad()
        return self._update(weights)

    def train_together(self, jobs: Sequence[Job], weights: Arrays) -> list[Update]:
        """Returns the update of each of several sites that one process serves, as `train` does.

        Sites whose one step starts from the same weights share its pass: their examples are run
        together, and each site's clipped gradients are summed and noised apart. The numbers are
        those of `train` but for how a product of more rows is rounded.
        """
        if not self._shares_a_pass(len(jobs)):
            return [
                self.train(
                    terms=job.terms, examples=job.examples, weights=weights, stream=job.stream
                )
                for job in jobs
            ]
        self._load(weights)
        rate = self._contract.privacy.sampling_rate
        batches = [job.stream.poisson_sample(len(job.examples), rate) for job in jobs]
        with gradients.expected_warnings():
            rows = self._sums_apart(jobs, batches)
        kind = KINDS[self._contract.privacy.mechanism]
        return [kind(values) for values in self._shared.updates(rows, jobs, weights)]

    def _shares_a_pass(self, sites: int) -> bool:
        training = self._contract.training
        return (
            isinstance(self._summer, BookKeepingSum)
            and self._features is None
            and training.local_steps == 1
            and training.augmentation == "none"
            and self._shared.holds(sites)
        )

    def _sums_apart(self, jobs: Sequence[Job], batches: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """Returns each site's sums over its own batch; a pass holds examples of several sites.

        Its size follows the batches: in a simulation no server is a stranger.
        """
        summer = self._summer
        assert isinstance(summer, BookKeepingSum)  # noqa: S101  the caller asked
        bounds = np.cumsum([0, *map(len, batches)])

        def run(size: int) -> Tensor:
            rows, totals = self._shared.rows(len(jobs))
            for start in range(0, int(bounds[-1]), size):
                piece = slice(start, start + size)
                cuts = np.clip(bounds, piece.start, piece.stop)
                pairs = [
                    self._batch(job.examples, batch[start - begin : stop - begin])
                    for job, batch, begin, (start, stop) in zip(
                        jobs, batches, bounds, pairwise(cuts), strict=False
                    )
                    if start < stop
                ]
                inputs, targets = (torch.cat(side) for side in zip(*pairs, strict=True))
                parts = [slice(start, stop) for start, stop in pairwise(cuts - piece.start)]
                with self._weights_stay():
                    summer.add_parts_(totals, parts, inputs, targets)
            return rows

        return self._in_pieces(run)

    def _in_pieces(self, run: Callable[[int], T]) -> T:
        """Returns what running with pieces of so many examples gives; of fewer as memory asks.

        The same batch again: no new sample, no new charge.
        """
        while True:
            try:
                return run(self._pieces)
            except (RuntimeError, MemoryError) as error:
                if self._pieces == 1 or not _out_of_memory(error):
                    raise
                self._pieces //= 2
                if isinstance(self._adder, graphs.ReplayedSum):
                    self._adder.forget()

    @contextmanager
    def _weights_stay(self) -> Iterator[None]:
        """Raises where a pass writes into a weight: what it wrote would leave without noise."""
        before = [parameter._version for parameter in self._summed.values()]
        yield
        if [parameter._version for parameter in self._summed.values()] != before:
            raise ModelRejected(
                f"model {self._contract.model.name!r} changes its weights while it answers"
            )

    def _zeros(self) -> dict[str, Tensor]:
        return gradients.zeros(self._summed)

    def score(self, *, examples: Examples, weights: Arrays, stream: RandomStream) -> ProtectedScore:
        """Returns how `weights` do on a site's own examples, with the contract's noise.

        Args:
            examples: opened by the gate, after the charge of the evaluation.
            weights: as the order brought them.
            stream: the randomness of this attempt.
        """
        asked = self._contract.evaluation
        if asked is None:
            raise ValueError("the contract asks for no evaluation")
        self._load(weights)
        correct, total = scoring.counts(self._model, examples, self._batch)
        return scoring.protect(
            correct, total, noise_multiplier=asked.noise_multiplier, stream=stream
        )

    def _rehearse(self) -> None:
        """Runs one sum on zeros: a mode that cannot take the model says so before any charge."""
        data = self._contract.data
        targets = (2, *data.shape) if data.task == "next-token" else (2,)
        blank = Examples(inputs=np.zeros((2, *data.shape)), targets=np.zeros(targets, np.int64))
        try:
            with gradients.expected_warnings():
                moves = self._moves(2, RandomStream(bytes(32)))  # no secret: of zeros
                self._sums(blank, np.arange(2), moves, 2.0)
        except NotImplementedError as error:
            raise ModelRejected(f"model {self._contract.model.name!r}: {error}") from error

    def _moves(self, count: int, stream: RandomStream) -> Moves | None:
        """Returns the views of a logical batch, drawn once: smaller pieces see the same."""
        return views.draw(self._contract.training, self._contract.data.shape, count, stream)

    def _sums(
        self,
        examples: Examples,
        batch: npt.NDArray[np.int64],
        moves: Moves | None,
        expected: float,
    ) -> dict[str, Tensor]:
        """Returns the summed (clipped) gradients of a logical batch, piece by piece.

        Args:
            examples: of the site.
            batch: which of them were drawn.
            moves: their views, if there are any.
            expected: how many are drawn on the mean at a site of the contract's nominal size.
        """

        def run(most: int) -> dict[str, Tensor]:
            adder = self._adder
            if isinstance(adder, PlainSum):
                return self._plain_sums(adder, examples, batch, moves, most)
            sums = self._zeros()
            for part, size in self._sizes.pieces(len(batch), expected=expected, most=most):
                seen = None if moves is None else moves.take(part)
                given = self._batch(examples, batch[part], seen)
                inputs, targets = (fill(side, size) for side in given)
                counted = torch.arange(size, device=self._device) < part.stop - part.start
                with self._weights_stay():
                    adder.add_(sums, inputs, targets, counted)
            return sums

        return self._in_pieces(run)

    def _plain_sums(
        self,
        summer: PlainSum,
        examples: Examples,
        batch: npt.NDArray[np.int64],
        moves: Moves | None,
        most: int,
    ) -> dict[str, Tensor]:
        if 0 < len(batch) <= most:
            return summer.gradients(*self._batch(examples, batch, moves))
        sums = self._zeros()
        for start in range(0, len(batch), most):
            part = slice(start, start + most)
            seen = None if moves is None else moves.take(part)
            summer.add_(sums, *self._batch(examples, batch[part], seen))
        return sums

    def _probed(self, size: int) -> list[Tensor]:
        """Returns the mean clipped gradient of so many equal, made-up examples.

        At made-up weights: a server's may be such that every kernel gives the same.
        """
        weights, one = admission.trial(self.parameters.values(), self._contract.data)
        rows, moves = np.zeros(size, np.int64), self._moves(1, RandomStream(bytes(32)))
        seen = None if moves is None else moves.take(rows)
        sums, kept = self._zeros(), [p.detach().clone() for p in self.parameters.values()]
        try:
            self._set(weights)
            self._summer.add_(sums, *self._batch(one, rows, seen))
        finally:
            self._set(kept)
        return [total / size for total in sums.values()]

    def _batch(
        self, examples: Examples, piece: npt.NDArray[np.int64], moves: Moves | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of some examples; with moves the views come second."""
        data = self._contract.data
        if self._features is not None:
            inputs = self._features.rows(examples, piece)
        else:
            raw = examples.inputs[piece]
            raw = raw if moves is None else views.moved(raw, moves)
            inputs = tasks.inputs_of(raw, data, self._device)
        return inputs, tasks.targets_of(examples.targets[piece], data, self._device)

    def _optimizer(
        self, terms: SiteTerms, stream: RandomStream
    ) -> PlainOptimizer | PrivateOptimizer:
        training, privacy = self._contract.training, self._contract.privacy
        normaliser = self._contract.normaliser(terms)
        parameters, rate = self.parameters.values(), training.learning_rate
        if privacy.mechanism != "dp-sgd":
            return PlainOptimizer(
                parameters, lr=rate, momentum=training.momentum, normaliser=normaliser
            )
        return PrivateOptimizer(
            Sgd(parameters, lr=rate, momentum=training.momentum),
            noise_multiplier=privacy.noise_multiplier,
            clip_norm=privacy.clip_norm,
            normaliser=normaliser,
            stream=stream,
        )

    def _load(self, weights: Arrays) -> None:
        found = (np.array(weights[name], dtype=np.float32) for name in self.parameters)
        self._set([torch.from_numpy(value) for value in found])

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.copy_(value)

    def _update(self, weights: Arrays) -> Update:
        values: dict[str, Array] = {
            # in C's order, though a mode may keep a weight with its channels last
            name: np.ascontiguousarray(parameter.detach().cpu().numpy() - weights[name])
            for name, parameter in self.parameters.items()
        }
        if self._contract.privacy.mechanism == "user-level":
            values = clipped(values, self._contract.privacy.clip_norm)
        return KINDS[self._contract.privacy.mechanism](values)


def clipped(update: Arrays, clip_norm: float) -> dict[str, Array]:
    """Returns an update whose joint norm is C(1 − 1e-3) at the most; zeros where it is not finite.

    The slack is for float32, in which the scaled numbers are rounded.
    """
    norm = arrays.norm(update)
    if not math.isfinite(norm):
        return {name: np.zeros_like(value) for name, value in update.items()}
    factor = min(1.0, clip_norm * (1 - SLACK) / norm) if norm > 0 else 1.0
    return {name: (value * factor).astype(np.float32) for name, value in update.items()}


@lru_cache(maxsize=1)
def _drawing(process: int) -> ThreadPoolExecutor:
    """Returns the one thread of this process that draws noise; a forked one has its own."""
    return ThreadPoolExecutor(1, thread_name_prefix="noise")


def _summer(
    contract: Contract, execution: Execution, model: nn.Module
) -> tuple[ClippedSum | PlainSum, dict[str, nn.Parameter]]:
    """Returns the way to sum, and the parameters by the names that it gives them, in one order."""
    losses: Loss = partial(tasks.losses, task=contract.data.task)
    if contract.training.augmentation != "none":
        model, losses = views.Viewed(model), views.mean_loss(losses)
    parameters = models.released_parameters(model)
    if contract.privacy.mechanism == "dp-sgd":
        clip_norm = contract.privacy.clip_norm
        chosen = gradients.clipped_sum(
            execution.mode, model, losses, clip_norm, execution.precision
        )
        return chosen, parameters
    return PlainSum(model, losses), parameters


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # The CPU's allocator has no type of its own.
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
