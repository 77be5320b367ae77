"""The time of a private step over that of a plain one: ours, and Opacus' engine in three modes.

Where there is a GPU its figures come too, under "cuda", with batches eight times as large.

Run: python -m bract.simulations.benchmarks.private_step --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bract.client.training.gradients import Precision, clipped_sum, expected_warnings, zeros
from bract.client.training.graphs import replayed
from bract.client.training.optimizer import PrivateOptimizer
from bract.client.training.randomness import RandomStream, SecureRandomness
from bract.shared import malloc
from bract.simulations.benchmarks.rivals.networks import CLASSES, cnn, small_cnn

REPEATS = 9
SECONDS = 0.25
CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.1
Step = Callable[[], None]
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (examples, places, width)."""
        projected = self.query_key_value(self.before_attention(x))
        split = projected.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*split)
        x = x + self.mixed(attended.transpose(1, 2).reshape(x.shape))
        hidden: Tensor = self.out(functional.gelu(self.hidden(self.before_hidden(x))))
        return x + hidden


class Transformer(nn.Module):
    """A small classifier of token sequences."""

    def __init__(self, *, tokens: int = 256, length: int = 128, width: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(4)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns a row of logits for each row of tokens."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        hidden = self.blocks(self.tokens(tokens) + self.places(places))
        logits: Tensor = self.out(self.norm(hidden).mean(1))
        return logits


def _images(times: int = 1) -> Batch:
    return torch.rand(64 * times, 1, 28, 28), torch.randint(0, CLASSES, (64 * times,))


def _sequences(times: int = 1) -> Batch:
    return torch.randint(0, 256, (32 * times, 128)), torch.randint(0, CLASSES, (32 * times,))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "cnn": (cnn, _images),
    "small_cnn": (small_cnn, _images),
    "transformer": (Transformer, _sequences),
}


class _Silent(RandomStream):
    """No noise, to see what it costs."""

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        return np.zeros(count)

    def normals_on(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=device)


def main() -> None:
    """Prints, for each model, the ratios of the medians to a plain step's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="one alone; else what there is")
    options = parser.parse_args()
    found = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    devices = (options.device,) if options.device else found
    ratios = measure(repeats=options.repeats, devices=devices)
    if options.json:
        print(json.dumps(ratios))
        return
    rows = dict(ratios)
    for model, row in rows.pop("cuda", {}).items():
        rows[f"{model}, GPU"] = row
    for model, row in rows.items():
        print(f"{model:16}", "  ".join(f"{name} {ratio:.2f}" for name, ratio in row.items()))


def measure(
    *, repeats: int, seconds: float = SECONDS, devices: Sequence[str] = ("cpu",)
) -> dict[str, Any]:
    """Returns ratios by model and way: medians over turns that are taken one after another.

    Args:
        repeats: the number of turns of each way.
        seconds: about what one turn of plain steps takes.
        devices: "cpu", whose ratios stand by themselves, and "cuda", which has a table of its own.
    """
    torch.set_num_threads(1)
    malloc.keep_freed()  # as workers do, for all ways alike
    with warnings.catch_warnings(), expected_warnings():
        warnings.filterwarnings("ignore", module="opacus")
        tables = {
            device: {
                name: _measure(*case, repeats, seconds, device) for name, case in CASES.items()
            }
            for device in devices
        }
    return {**tables.pop("cpu", {}), **tables}


def _measure(
    build: Callable[[], nn.Module],
    make: Callable[[int], Batch],
    repeats: int,
    seconds: float,
    device: str,
) -> dict[str, float]:
    torch.manual_seed(1)  # made-up data and weights; nothing here is released
    inputs, targets = make(8 if device == "cuda" else 1)
    batch = inputs.to(device), targets.to(device)

    def built() -> nn.Module:
        return build().to(device)

    secret = SecureRandomness()
    steps = {
        "plain": _plain(built(), batch),
        "bract": _ours(built(), batch, secret.stream(1)),
        "bract_without_noise": _ours(built(), batch, _Silent(bytes(32))),
        **{f"opacus_{mode}": _opacus(built(), batch, mode) for mode in _MODES},
    }
    if device == "cuda":
        steps["bract_bfloat16"] = _ours(built(), batch, secret.stream(2), "bfloat16")
    for step in steps.values():
        _seconds(step, 2)
    count = max(1, round(seconds / _seconds(steps["plain"], 3)))
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            turns[name].append(_seconds(step, count))
    plain = statistics.median(turns.pop("plain"))
    return {name: round(statistics.median(times) / plain, 3) for name, times in turns.items()}


def _seconds(step: Step, count: int) -> float:
    _arrive()
    started = time.perf_counter()
    for _ in range(count):
        step()
    _arrive()
    return (time.perf_counter() - started) / count


def _arrive() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _plain(model: nn.Module, batch: Batch) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _ours(
    model: nn.Module, batch: Batch, stream: RandomStream, precision: Precision = "float32"
) -> Step:
    """Returns the step of the trainer in its default mode."""
    named = dict(model.named_parameters())
    summer = clipped_sum("book-keeping", model, _losses, CLIP_NORM, precision)
    # These models draw and decide nothing in a pass, like those that go by this name.
    summer = replayed(summer, named, "cnn")
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        clip_norm=CLIP_NORM,
        normaliser=float(len(batch[0])),
        stream=stream,
    )

    device, drawing = next(iter(named.values())).device, ThreadPoolExecutor(1)

    def step() -> None:
        if device.type != "cpu":  # as the trainer does where a core is idle
            optimizer.draw_ahead(drawing)
        sums = zeros(named)
        summer.add_(sums, *batch)
        optimizer.put(list(sums.values()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")


_MODES = ("hooks", "ghost", "functorch")


def _opacus(model: nn.Module, batch: Batch, mode: str) -> Step:
    """Returns a step as Opacus' tutorials have it, with torch's own generator for the noise."""
    settings: dict[str, Any] = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        "data_loader": DataLoader(TensorDataset(*batch), batch_size=len(batch[0])),
        "noise_multiplier": NOISE_MULTIPLIER,
        "max_grad_norm": CLIP_NORM,
        "poisson_sampling": False,
        "grad_sample_mode": mode,
    }
    criterion: Any = nn.CrossEntropyLoss()
    if mode == "ghost":
        made = PrivacyEngine().make_private(**settings, criterion=criterion)
        private, optimizer, criterion, _ = made
    else:
        private, optimizer, _ = PrivacyEngine().make_private(**settings)

    def step() -> None:
        optimizer.zero_grad()
        criterion(private(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
