"""Models of which a part is frozen: which weights those are, and a front that need run only once.

A frozen parameter is never sent. Server and sites hold it from the start, so a contract names it by
its SHA-256; and where all of a model's front is frozen, what comes out of it is a fixed function of
each example, which a site or a server computes once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bract.shared import canonical, tasks
from bract.shared.data.examples import Examples
from bract.shared.models import rounding
from bract.shared.terms import DataTerms

TOGETHER = rounding.UNIT
GREATEST_BYTES = 2**31
_BUCKET = 16


class FrozenFront(nn.Module):
    """A `front` without trainable parameters, and a `back` that is trained on its features.

    Args:
        front: maps each example by itself, whoever is beside it.
        back: maps features of the front to the model's outputs.
        ended: a token that changes no features where it fills up the end of a row, if there is one:
            rows are then cut to about their own length.

    Raises:
        ValueError: where something of the front would be trained.
    """

    def __init__(self, front: nn.Module, back: nn.Module, *, ended: int | None = None) -> None:
        super().__init__()
        if any(p.requires_grad for p in front.parameters()):
            raise ValueError("a frozen front has trainable parameters: freeze them")
        self.front, self.back, self.ended = front, back, ended

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns what the back part makes of the front's features."""
        outputs: Tensor = self.back(self.front(inputs))
        return outputs

    def behind(self) -> nn.Module:
        """Returns the part that takes features; its parameters have the same names as here."""
        return _Behind(self.back)


class _Behind(nn.Module):
    def __init__(self, back: nn.Module) -> None:
        super().__init__()
        self.back = back

    def forward(self, features: Tensor) -> Tensor:
        """Returns the model's outputs."""
        outputs: Tensor = self.back(features)
        return outputs


class _TooLarge(Exception):
    """Features that there is no room to keep."""


class Features:
    """What comes out of a frozen front, as float32, computed once for the same inputs.

    Kept by the content of the inputs, and no more than `greatest_bytes` in all: the oldest go
    first, and what has no room at all is computed whenever it is asked for.

    Args:
        model: on its device.
        data: how inputs are prepared.
        device: the model's.
        greatest_bytes: of the features kept.
    """

    def __init__(
        self,
        model: FrozenFront,
        data: DataTerms,
        device: torch.device | str = "cpu",
        *,
        greatest_bytes: int = GREATEST_BYTES,
    ) -> None:
        self._model, self._data, self._device = model, data, device
        self._greatest = greatest_bytes
        self._kept: dict[str, np.ndarray] = {}
        self._last: tuple[Examples, np.ndarray | None] | None = None
        self._uneven: bool | None = None

    def rows(self, examples: Examples, rows: np.ndarray | slice) -> Tensor:
        """Returns the features of some rows, on the model's device."""
        if self._last is None or self._last[0] is not examples:
            self._last = (examples, self._of(examples.inputs))
        found = self._last[1]
        part = self._computed(examples.inputs[rows]) if found is None else found[rows]
        return tasks.placed(part, self._device)

    def _of(self, inputs: np.ndarray) -> np.ndarray | None:
        """Returns the features of all inputs, or None where there is no room to keep them."""
        name = _content(inputs)
        found = self._kept.pop(name, None)
        if found is None:
            try:
                found = self._computed(inputs, at_most=self._greatest)
            except _TooLarge:
                return None
        self._kept[name] = found  # the newest
        while sum(kept.nbytes for kept in self._kept.values()) > self._greatest:
            del self._kept[next(iter(self._kept))]
        return found

    @torch.inference_mode()
    def _computed(self, inputs: np.ndarray, *, at_most: float = math.inf) -> np.ndarray:
        """Returns the features, in batches of one shape: no example changes another's rounding.

        Raises:
            _TooLarge: where they are over `at_most` bytes.
        """
        found = np.empty(0, np.float32)
        front = self._model.front
        was_training = front.training
        front.eval()
        try:
            for rows, length in self._batches(inputs):
                batch = np.zeros((TOGETHER, *inputs.shape[1:]), inputs.dtype)
                batch[: len(rows)] = inputs[rows]
                prepared = tasks.inputs_of(batch, self._data, self._device)
                out = self._out(prepared if length is None else prepared[:, :length])
                if found.ndim == 1:
                    if 4 * len(inputs) * math.prod(out.shape[1:]) > at_most:
                        raise _TooLarge
                    found = np.empty((len(inputs), *out.shape[1:]), np.float32)
                found[rows] = out[: len(rows)].float().cpu().numpy()
        finally:
            front.train(was_training)
        return found

    def _out(self, inputs: Tensor) -> Tensor:
        """Returns the front's features of a batch, in which no place of an example decides."""
        if self._uneven is None:
            blank = torch.zeros_like(inputs)
            self._uneven = inputs.device.type == "cpu" and not rounding.is_even(
                lambda: self._model.front(blank)
            )
        with rounding.one_thread(self._uneven):
            out: Tensor = self._model.front(inputs)
        return out

    def _batches(self, inputs: np.ndarray) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yields rows that are computed together, and to what length they are cut."""
        ended, full = self._model.ended, inputs.shape[-1]
        if ended is None or not len(inputs):
            for start in range(0, max(len(inputs), 1), TOGETHER):
                yield np.arange(start, min(start + TOGETHER, len(inputs))), None
            return
        # an example's own length decides, never another's
        lengths = _lengths(inputs, ended)
        lengths = np.minimum(-(-np.maximum(lengths, 1) // _BUCKET) * _BUCKET, full)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            for start in range(0, len(rows), TOGETHER):
                yield rows[start : start + TOGETHER], int(length)


def digest(model: nn.Module) -> str | None:
    """Returns the SHA-256 of all frozen parameters, with names and shapes; None where none is.

    Example:
        >>> digest(nn.Linear(2, 1)) is None
        True
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return None
    found = hashlib.sha256()
    for name, parameter in sorted(frozen.items()):
        value = parameter.detach().cpu().contiguous()
        facts = {"name": name, "shape": list(value.shape), "type": str(value.dtype)}
        found.update(canonical.encode(facts))
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _content(inputs: np.ndarray) -> str:
    found = hashlib.sha256(f"{inputs.shape} {inputs.dtype.str}".encode())
    found.update(np.ascontiguousarray(inputs).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _lengths(tokens: np.ndarray, ended: int) -> np.ndarray:
    """Returns how long each row is without the `ended` that fill it up."""
    there = tokens != ended
    return np.where(there.any(1), tokens.shape[1] - there[:, ::-1].argmax(1), 0)
