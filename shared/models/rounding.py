"""Does an operation round a number otherwise where it lies at the end of a tensor?

On a CPU many do: what is left over behind the last whole vector goes through other code (torch's
elu, sigmoid and silu, for example). Then the rows behind an example, and their numbers with them,
would tell whether it is there. Where the number of rows is a multiple of `UNIT`, and one thread
computes all of them, nothing is left over. On a GPU every number goes through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

UNIT = 64  # a multiple of all that a CPU's vector loops take at a time
# So many numbers are tried, of which torch 2.13 rounds 2 % or more otherwise where it does; and so
# many at a time that no vector holds them.
_TRIED, _END = 1024, 7
# What moves numbers, compares them or multiplies two, rounds in one way: not tried.
_EXACT = {
    "_to_copy", "_unsafe_view", "abs", "alias", "as_strided", "cat", "clamp", "clamp_max",
    "clamp_min", "clone", "copy", "detach", "empty_like", "expand", "maximum", "minimum",
    "mul", "nan_to_num", "neg", "new_empty", "ones_like", "permute", "relu", "select",
    "slice", "split", "stack", "t", "threshold_backward", "transpose", "unbind", "unsqueeze",
    "view", "where", "zeros_like",
}  # fmt: skip
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class _Operand:
    """Stands for a tensor of an operation that is tried: of one number, or of many."""

    def __init__(self, value: Tensor) -> None:
        self.dtype, self.is_one = value.dtype, value.numel() == 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Operand) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.dtype, self.is_one))

    def made(self, generator: torch.Generator) -> Tensor:
        """Returns made-up numbers of many sizes, most of them about 1."""
        count = 1 if self.is_one else _TRIED
        if not self.dtype.is_floating_point:
            return torch.randint(2, (count,), generator=generator).to(self.dtype)
        sizes = torch.empty(count).uniform_(-4, 4, generator=generator).exp()
        return (sizes * torch.randn(count, generator=generator)).to(self.dtype)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes the operations that run, with what they are given but for the numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.seen: set[tuple[Any, tuple[Any, ...], TreeSpec]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would load torch's compiler, for most of a second

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation."""
        out = function(*args, **(kwargs or {}))
        values, shape = tree_flatten((args, kwargs or {}))
        if function.overloadpacket.__name__.rstrip("_") in _EXACT:
            return out
        largest = max((v.numel() for v in values if isinstance(v, Tensor)), default=0)
        if largest > 1 and any(found.numel() == largest for found in _tensors(out)):
            given = (_Operand(v) if isinstance(v, Tensor) else v for v in values)
            self.seen.add((function, tuple(given), shape))
        return out


def is_even(run: Callable[[], object]) -> bool:
    """Returns whether all that runs rounds a number alike wherever it lies; on a CPU.

    Each operation that takes numbers one by one is tried on made-up ones, once in a process.

    Args:
        run: a pass of any size, backward too where there will be one.
    """
    with _Recorder() as recorder:
        run()
    return all(_rounds_alike(*operation) for operation in recorder.seen)


@contextmanager
def one_thread(needed: bool = True) -> Iterator[None]:
    """Computes with one thread, where that is needed: several cut tensors anywhere."""
    before = torch.get_num_threads()
    if needed and before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@lru_cache(maxsize=1024)
def _rounds_alike(function: Any, given: tuple[Any, ...], shape: TreeSpec) -> bool:
    generator = torch.Generator().manual_seed(1)  # no secret
    made = [v.made(generator) if isinstance(v, _Operand) else v for v in given]

    def answers(end: int, start: int = 0) -> list[Tensor]:
        values = [v[start:end] if isinstance(v, Tensor) and len(v) > 1 else v for v in made]
        if function._schema.is_mutable:
            values = [v.clone() if isinstance(v, Tensor) else v for v in values]
        args, kwargs = tree_unflatten(values, shape)
        return [out for out in _tensors(function(*args, **kwargs)) if out.dim() == 1]

    try:
        with torch.no_grad(), one_thread():
            together = answers(_TRIED)
            ends = [answers(at + _END, at) for at in range(0, _TRIED, _END)]
        pairs = [(torch.cat(parts), one) for one, *parts in zip(together, *ends, strict=True)]
        return not any(_is_rounding(*pair) for pair in pairs)
    except Exception:
        return True  # what takes no plain list of numbers goes over rows, each by itself


def _is_rounding(one: Tensor, other: Tensor) -> bool:
    """Returns whether numbers differ, and so little that each was made of its own place alone."""
    if not other.is_floating_point() or one.shape != other.shape:
        return False
    different = (one != other) & ~(one.isnan() & other.isnan())
    gap = (one - other).abs() / other.abs().clamp(min=torch.finfo(other.dtype).tiny)
    return bool(different.any()) and float(gap[different].median()) < _ROUNDING[other.dtype]


def _tensors(out: object) -> list[Tensor]:
    return [v for v in tree_flatten(out)[0] if isinstance(v, Tensor) and v.is_floating_point()]
