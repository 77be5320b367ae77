"""Opacus' DP optimizer with our noise: one draw for each logical step, from a CSPRNG."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn
from torch.optim import Optimizer

from bract.client.training.clipping import on_gpu
from bract.client.training.noise import Drawn, drawn, noised
from bract.client.training.randomness import RandomStream

_TOGETHER, _GPU_TOGETHER = 1 << 17, 1 << 22
_GREATEST_AHEAD = 1 << 22  # normals of a step that wait for it: 32 MiB


class Sgd:
    """The steps of torch.optim.SGD, which loads torch's compiler, seconds long, to be made.

    Args:
        parameters: what is moved.
        lr: the learning rate.
        momentum: of the heavy ball, as torch has it: v ← m·v + g, the first v being g.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float) -> None:
        self._lr, self._momentum = lr, momentum
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        self.defaults: dict[str, Any] = {"lr": lr, "momentum": momentum}
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Moves the parameters along their gradients."""
        parameters = self.param_groups[0]["params"]
        moves = [self._move(p) if self._momentum else p.grad for p in parameters]
        torch._foreach_add_(parameters, moves, alpha=-self._lr)

    def _move(self, parameter: Any) -> Tensor:
        known = self.state[parameter]
        if "velocity" in known:
            known["velocity"].mul_(self._momentum).add_(parameter.grad)
        else:
            known["velocity"] = parameter.grad.clone()
        velocity: Tensor = known["velocity"]
        return velocity

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class PlainOptimizer(Sgd):
    """Steps on sums as they are: for the mechanisms that add no noise to a step.

    Args:
        parameters: what is moved.
        lr: the learning rate.
        momentum: of the heavy ball.
        normaliser: the public constant q · nominal size, by which the step is divided.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, normaliser: float
    ) -> None:
        super().__init__(parameters, lr=lr / normaliser, momentum=momentum)

    def put(self, sums: list[Tensor]) -> None:
        """Sets the sum of a logical batch, one tensor a parameter."""
        for parameter, value in zip(self.param_groups[0]["params"], sums, strict=True):
            parameter.grad = value.to(parameter.dtype)


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Adds N(0, (σC)²) to sums of clipped gradients, divides by a public constant, and steps.

    The sums are put into each parameter's `summed_grad` by `put`; Opacus' own clipping is not
    used, and its guard against using one sum twice is.

    Args:
        optimizer: the optimizer that steps on the noised mean.
        noise_multiplier: σ, relative to the clip norm.
        clip_norm: C, the greatest norm that one example adds to the sum.
        normaliser: the public constant q · nominal size; never the realised batch.
        stream: where the noise comes from.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sgd,
        *,
        noise_multiplier: float,
        clip_norm: float,
        normaliser: float,
        stream: RandomStream,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._normaliser = normaliser
        self._stream = stream
        self._stddev = noise_multiplier * clip_norm
        self._groups = list(_groups(self.params))
        self._drawn: deque[Future[Drawn]] = deque()

    def put(self, sums: list[Tensor]) -> None:
        """Sets the sum of a logical batch, one tensor a parameter; zeros for an empty batch."""
        for parameter, value in zip(self.params, sums, strict=True):
            parameter.summed_grad = value

    def draw_ahead(self, executor: Executor) -> None:
        """Lets another thread draw the next step's noise; the stream is its own until that step.

        The numbers are those that the step would draw by itself.
        """
        counts = [sum(_even(together)) for together in self._groups]
        if self._stddev > 0 and sum(counts) <= _GREATEST_AHEAD:
            self._drawn.extend(
                executor.submit(drawn, self._stream, count, together[0].device)
                for count, together in zip(counts, self._groups, strict=True)
            )

    def _normals(self, count: int, device: torch.device) -> Tensor:
        ahead = self._drawn.popleft().result() if self._drawn else None
        return (ahead or drawn(self._stream, count, device)).taken()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noises and scales the sums; no logical step is ever skipped."""
        self.add_noise()
        self.scale_grad()
        return True

    def add_noise(self) -> None:
        """Adds the host's noise in float64, and rounds the result to a public grid.

        The grid of σC·2⁻²⁰ hides the low bits, whose pattern could tell the sum from the noise
        (Mironov 2012); rounding is post-processing.
        """
        if self._stddev == 0:
            for parameter in self.params:
                _check_processed_flag(parameter.summed_grad)
                parameter.grad = parameter.summed_grad.to(parameter.dtype)
                _mark_as_processed(parameter.summed_grad)
            return
        for together in self._groups:
            even = _even(together)
            sums = [self._taken(parameter) for parameter in together]
            normals = self._normals(sum(even), sums[0].device)
            released = noised(sums, even, stddev=self._stddev, normals=normals)
            for parameter, piece in zip(together, torch.split(released, even), strict=True):
                gradient = piece[: parameter.numel()].view(parameter.shape)
                parameter.grad = gradient.to(parameter.dtype)

    def _taken(self, parameter: Any) -> Tensor:
        """Returns a sum that was not used before, flat and in float64."""
        _check_processed_flag(parameter.summed_grad)
        _mark_as_processed(parameter.summed_grad)
        flat: Tensor = parameter.summed_grad.detach().to(torch.float64).reshape(-1)
        return flat

    def scale_grad(self) -> None:
        """Divides by the public normaliser.

        Not in place: a gradient may be one number that is seen many times.
        """
        means = torch._foreach_div([p.grad for p in self.params], self._normaliser)
        for parameter, mean in zip(self.params, means, strict=True):
            parameter.grad = mean


def _even(parameters: list[Any]) -> list[int]:
    """Returns how many normals each takes: an odd count's last one is thrown away, as if alone."""
    return [p.numel() + p.numel() % 2 for p in parameters]


def _groups(parameters: list[Any]) -> Iterator[list[Any]]:
    """Yields parameters on one device that are noised in one draw: the small ones together."""
    group: list[Any] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        greatest = _GPU_TOGETHER if on_gpu(parameter) else _TOGETHER
        if group and (size > greatest or parameter.device != group[0].device):
            yield group
            group, size = [], parameter.numel()
        group.append(parameter)
    yield group
