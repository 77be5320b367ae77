"""The summed gradients of a logical batch: piece by piece, in passes of public sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bract.client.training import admission, gradients, graphs, views
from bract.client.training.bookkeeping import BookKeepingSum, Loss
from bract.client.training.execution import Execution
from bract.client.training.gradients import ClippedSum, PlainSum
from bract.client.training.randomness import RandomStream
from bract.client.training.sizes import fill, filled
from bract.client.training.together import Job, SharedStep
from bract.client.training.trials import NotedLoss, Trials
from bract.client.training.views import Moves
from bract.shared import models, tasks
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import ModelRejected
from bract.shared.models import rounding
from bract.shared.models.frozen import Features

T = TypeVar("T")
# Numbers of inputs that are made ready at once: so few that calls cost more than what they do.
_GREATEST_READY = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """All of a site's examples as the model takes them, for the steps of one round."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


class BatchSums:
    """Sums of the gradients of logical batches, clipped where the contract's mechanism clips them.

    Args:
        contract: the verified contract.
        execution: how to compute.
        model: on its device, in training; without its frozen front where there are features.
        features: what the front makes of examples, None where all of the model is run.

    Attributes:
        parameters: those that are summed, by the names under which they are, in one order.
    """

    def __init__(
        self, contract: Contract, execution: Execution, model: nn.Module, features: Features | None
    ) -> None:
        self._contract, self._features = contract, features
        self._weights = list(models.released_parameters(model).values())
        self._pieces = max(1, execution.at_once // contract.training.views)
        self._summer, self.parameters, loss = _summer(contract, execution, model)
        self._device = self._weights[0].device
        self._adder: ClippedSum | PlainSum = self._summer
        self._trials = Trials(self._summer, loss, self.parameters, self._made_up)
        if not isinstance(self._summer, PlainSum):
            self._adder = graphs.replayed(self._summer, self.parameters, contract.model.name)

    def of(
        self,
        examples: Examples | Ready,
        batch: npt.NDArray[np.int64],
        moves: Moves | None,
        expected: float,
    ) -> list[Tensor]:
        """Returns the sums over a logical batch, one tensor a parameter.

        Args:
            examples: of the site, as they are or made ready.
            batch: which of them were drawn.
            moves: their views, if there are any.
            expected: how many are drawn on the mean at a site of the contract's nominal size.
        """
        adder = self._adder
        if isinstance(adder, PlainSum):
            sums = self._in_pieces(lambda most: self._plain(adder, examples, batch, moves, most))
            return list(sums.values())

        def pieces(most: int) -> Iterator[tuple[slice, int]]:
            return self._trials.sizes.pieces(len(batch), expected=expected, most=most)

        with rounding.one_thread(self._trials.uneven):
            return self._summed(adder, examples, batch, moves, pieces)

    def _summed(
        self,
        adder: ClippedSum,
        examples: Examples | Ready,
        batch: npt.NDArray[np.int64],
        moves: Moves | None,
        pieces: Callable[[int], Iterable[tuple[slice, int]]],
    ) -> list[Tensor]:
        """Returns the clipped sums over a batch, in passes of sizes that hold its parts."""

        def run(most: int) -> dict[str, Tensor]:
            sums = gradients.zeros(self.parameters)
            for part, size in pieces(most):
                seen = None if moves is None else moves.take(part)
                given = self.batch(examples, batch[part], seen)
                inputs, targets = (fill(side, size) for side in given)
                counted = torch.arange(size, device=self._device) < part.stop - part.start
                with self._weights_stay():
                    adder.add_(sums, inputs, targets, counted)
            return sums

        return list(self._in_pieces(run).values())

    @property
    def may_be_shared(self) -> bool:
        """Whether the one step of several sites can be formed by one pass (`apart`)."""
        training = self._contract.training
        return (
            isinstance(self._summer, BookKeepingSum)
            and self._features is None
            and training.local_steps == 1
            and training.augmentation == "none"
        )

    def apart(
        self, shared: SharedStep, jobs: Sequence[Job], batches: Sequence[npt.NDArray[np.int64]]
    ) -> Tensor:
        """Returns each site's sums over its own batch; a pass holds examples of several sites.

        Its size follows the batches: in a simulation no server is a stranger.
        """
        summer = self._summer
        assert isinstance(summer, BookKeepingSum)  # noqa: S101  the caller asked
        bounds = np.cumsum([0, *map(len, batches)])

        def run(size: int) -> Tensor:
            rows, totals = shared.rows(len(jobs))
            for start in range(0, int(bounds[-1]), size):
                piece = slice(start, start + size)
                cuts = np.clip(bounds, piece.start, piece.stop)
                pairs = [
                    self.batch(job.examples, batch[start - begin : stop - begin])
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

    def moves(self, count: int, stream: RandomStream) -> Moves | None:
        """Returns the views of a logical batch, drawn once: smaller pieces see the same."""
        return views.draw(self._contract.training, self._contract.data.shape, count, stream)

    def ready(self, examples: Examples) -> Examples | Ready:
        """Returns examples made ready once, where a round's steps draw each of them and more."""
        training, rate = self._contract.training, self._contract.privacy.sampling_rate
        if (
            self._features is not None
            or training.augmentation != "none"
            or training.local_steps * rate < 1
            or len(examples) * math.prod(self._contract.data.shape) > _GREATEST_READY
        ):
            return examples
        return Ready(*self.batch(examples, np.arange(len(examples))))

    def batch(
        self, examples: Examples | Ready, piece: npt.NDArray[np.int64], moves: Moves | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of some examples; with moves the views come second."""
        if isinstance(examples, Ready):
            rows = tasks.placed(piece, self._device)
            return examples.inputs.index_select(0, rows), examples.targets.index_select(0, rows)
        data = self._contract.data
        if self._features is not None:
            inputs = self._features.rows(examples, piece)
        else:
            raw = examples.inputs[piece]
            raw = raw if moves is None else views.moved(raw, moves)
            inputs = tasks.inputs_of(raw, data, self._device)
        return inputs, tasks.targets_of(examples.targets[piece], data, self._device)

    def rehearse(self) -> None:
        """Runs a pass of zeros: a mode that cannot take the model says so before any charge.

        Raises:
            ModelRejected: with its reason.
        """
        data = self._contract.data
        targets = (1, *data.shape) if data.task == "next-token" else (1,)
        blank = Examples(inputs=np.zeros((1, *data.shape)), targets=np.zeros(targets, np.int64))
        try:
            with gradients.expected_warnings():
                one, moves = np.arange(1), self.moves(1, RandomStream(bytes(32)))  # no secret
                if isinstance(self._adder, PlainSum):
                    self.of(blank, one, moves, 1.0)
                    return
                # How sizes round is asked where a batch is summed.
                self._summed(
                    self._adder, blank, one, moves, lambda most: [(slice(0, 1), filled(1, most))]
                )
        except NotImplementedError as error:
            raise ModelRejected(f"model {self._contract.model.name!r}: {error}") from error
        except Exception as error:
            if isinstance(error, ModelRejected) or _out_of_memory(error):
                raise
            # of zeros: its text holds no data
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelRejected(
                f"model {self._contract.model.name!r} fails on zeros: {reason}"
            ) from error

    def _plain(
        self,
        summer: PlainSum,
        examples: Examples | Ready,
        batch: npt.NDArray[np.int64],
        moves: Moves | None,
        most: int,
    ) -> dict[str, Tensor]:
        if 0 < len(batch) <= most:
            return summer.gradients(*self.batch(examples, batch, moves))
        sums = gradients.zeros(self.parameters)
        for start in range(0, len(batch), most):
            part = slice(start, start + most)
            seen = None if moves is None else moves.take(part)
            summer.add_(sums, *self.batch(examples, batch[part], seen))
        return sums

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
        before = [parameter._version for parameter in self._weights]
        yield
        if [parameter._version for parameter in self._weights] != before:
            raise ModelRejected(
                f"model {self._contract.model.name!r} changes its weights while it answers"
            )

    def _made_up(self, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Returns made-up weights, and so many equal, made-up examples as the model takes them."""
        weights, one = admission.trial(self._weights, self._contract.data)
        rows, moves = np.zeros(size, np.int64), self.moves(1, RandomStream(bytes(32)))
        seen = None if moves is None else moves.take(rows)
        return weights, *self.batch(one, rows, seen)


def _summer(
    contract: Contract, execution: Execution, model: nn.Module
) -> tuple[ClippedSum | PlainSum, dict[str, nn.Parameter], NotedLoss]:
    """Returns the way to sum, the parameters by the names that it gives them, and its loss."""
    losses: Loss = partial(tasks.losses, task=contract.data.task)
    if contract.training.augmentation != "none":
        model, losses = views.Viewed(model), views.mean_loss(losses)
    loss, parameters = NotedLoss(losses), models.released_parameters(model)
    if contract.privacy.mechanism == "dp-sgd":
        clip_norm = contract.privacy.clip_norm
        chosen = gradients.clipped_sum(execution.mode, model, loss, clip_norm, execution.precision)
        return chosen, parameters, loss
    return PlainSum(model, loss), parameters, loss


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no type of its own.
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
