"""Clipped sums by CUDA graphs: the host starts a whole pass at once, and not kernel by kernel.

A step of a small model takes a GPU less time than its host needs to start the kernels. A pass is
recorded for sizes of batches that come again and again, and replayed; the host is then done in some
microseconds. The sizes are few, since batches are filled up (see `sizes`).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bract.client.training.bookkeeping import BookKeepingSum
from bract.client.training.gradients import ClippedSum, zeros
from bract.shared import models

logger = logging.getLogger("bract.client")

# Recording takes as long as some passes, which are not yet lost on a size that comes once.
_BEFORE = 3
# A graph repeats what a pass drew or decided while it was recorded: ours draw and decide nothing.
RECORDED = models.MODELS.keys() - {"hf"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is recorded for: the number of examples, and what each looks like."""

    examples: int
    inputs: tuple[tuple[int, ...], torch.dtype]
    targets: tuple[tuple[int, ...], torch.dtype]


def shape_of(inputs: Tensor, targets: Tensor) -> Shape:
    """Returns the shape of a batch."""
    return Shape(
        len(inputs),
        (tuple(inputs.shape[1:]), inputs.dtype),
        (tuple(targets.shape[1:]), targets.dtype),
    )


class Recorded:
    """One pass over a batch of one shape, as a graph on the device that the sums are on.

    Args:
        summer: whose pass.
        parameters: by the names of the sums.
        shape: of the batch.
        pool: the graphs' memory; none of it outlives a replay.

    Raises:
        RuntimeError: where a pass waits for the GPU, or cannot be recorded for another reason.
    """

    def __init__(
        self, summer: BookKeepingSum, parameters: Mapping[str, Tensor], shape: Shape, pool: Any
    ) -> None:
        self._batch, self._device = Batch(parameters, shape), _device_of(parameters)
        with torch.cuda.device(self._device):
            self._graph: Any = torch.cuda.CUDAGraph()
            apart, now = _recording(self._device), torch.cuda.current_stream()
            try:
                apart.wait_stream(now)
                with torch.cuda.stream(apart), _no_waits():  # torch asks for a pass before
                    self._batch.run(summer)
                # The thread that draws noise asks for memory meanwhile, as it may.
                with torch.cuda.graph(
                    self._graph, pool=pool, stream=apart, capture_error_mode="thread_local"
                ):
                    self._batch.run(summer)
            finally:
                torch.cuda.set_stream(now)  # a recording that failed may leave another
                now.wait_stream(apart)  # and work, on memory that is given back

    def add_(
        self,
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds the clipped gradients of a batch of the shape."""
        with torch.cuda.device(self._device):
            self._batch.take(inputs, targets, counted)
            self._graph.replay()
            self._batch.add_to(sums)


@lru_cache
def _recording(device: torch.device) -> Any:
    """Returns the one stream of a device on which all is recorded: graphs of one share memory.

    torch has 32 of a priority, in turn; the one that noise travels on has another priority.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Batch:
    """Where a recorded pass finds its batch, and leaves its sums."""

    def __init__(self, parameters: Mapping[str, Tensor], shape: Shape) -> None:
        self._sums = zeros(parameters)
        like = next(iter(self._sums.values()))
        (inputs, kind), (targets, label) = shape.inputs, shape.targets
        self._inputs = like.new_zeros((shape.examples, *inputs), dtype=kind)
        self._targets = like.new_zeros((shape.examples, *targets), dtype=label)
        self._counted = like.new_ones(shape.examples, dtype=torch.bool)

    def run(self, summer: BookKeepingSum) -> None:
        """Sums the examples that are counted."""
        torch._foreach_zero_(list(self._sums.values()))
        summer.add_(self._sums, self._inputs, self._targets, self._counted)

    def take(self, inputs: Tensor, targets: Tensor, counted: Tensor | None) -> None:
        """Takes a batch, and which of its examples are counted; None: all."""
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        if counted is None:
            self._counted.fill_(True)
        else:
            self._counted.copy_(counted)

    def add_to(self, sums: dict[str, Tensor]) -> None:
        """Adds what the pass left."""
        torch._foreach_add_([sums[name] for name in self._sums], list(self._sums.values()))


class ReplayedSum:
    """What a summer adds, by graphs where shapes come again and their passes can be recorded.

    Args:
        summer: who adds the rest.
        parameters: by the names of the sums; on a GPU, and never moved in memory.
    """

    def __init__(self, summer: BookKeepingSum, parameters: Mapping[str, Tensor]) -> None:
        self._summer, self._parameters = summer, parameters
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, Recorded] = {}
        self._pool: Any = None
        self._records = True

    def add_(
        self,
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds the clipped gradients of a physical batch."""
        shape = shape_of(inputs, targets)
        if self._records and shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] > _BEFORE:
                self._record(shape)
        self._graphs.get(shape, self._summer).add_(sums, inputs, targets, counted)

    def _record(self, shape: Shape) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._graphs[shape] = Recorded(self._summer, self._parameters, shape, self._pool)
        except RuntimeError:  # lack of memory too: the pass itself may have enough
            self.forget()
            self._records = False
            logger.info("a pass of this model cannot be recorded: its kernels are started singly")

    def forget(self) -> None:
        """Gives the graphs' memory back, as where memory is short."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None


def replayed(summer: ClippedSum, parameters: Mapping[str, Tensor], model: str) -> ClippedSum:
    """Returns what adds the same sums by graphs, where there is a GPU and the model is our own."""
    if type(summer) is not BookKeepingSum or model not in RECORDED:
        return summer
    on_cuda = _device_of(parameters).type == "cuda"
    return ReplayedSum(summer, parameters) if on_cuda else summer


def _device_of(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


@contextmanager
def _no_waits() -> Iterator[None]:
    """Whoever waits for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
