"""The book-keeping step against Opacus' hooks and microbatches, and against cancellation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn import functional

from bract.client.training import bookkeeping, clipping, embeddings, layers, products, shares
from bract.client.training.bookkeeping import BookKeepingSum, GhostSum
from bract.client.training.clipping import NARROW, SLACK
from bract.client.training.gradients import clipped_sum
from bract.client.training.shares import Formed
from bract.shared import models
from bract.shared.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
CLASSES, COUNT = 5, 4
Sums = dict[str, Tensor]


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(1), targets, reduction="none")


def add(mode: str, model: nn.Module, inputs: Tensor, clip: float) -> Sums:
    model = copy.deepcopy(model)
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float64)
        for name, p in models.released_parameters(model).items()
    }
    clipped_sum(mode, model, losses, clip).add_(sums, inputs, torch.arange(len(inputs)) % CLASSES)
    return sums


def norm(sums: Sums) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in sums.values()))


def distance(one: Sums, other: Sums) -> float:
    assert set(one) == set(other)
    return norm({name: one[name] - other[name] for name in one})


def gradients(model: nn.Module, inputs: Tensor) -> list[Sums]:
    parameters = models.released_parameters(model)
    rows = []
    for row in range(len(inputs)):
        loss = losses(model(inputs[row : row + 1]), torch.tensor([row % CLASSES])).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rows.append({n: g.double() for n, g in zip(parameters, found, strict=True)})
    return rows


def microbatches(model: nn.Module, inputs: Tensor, clip: float) -> Sums:
    rows = gradients(model, inputs)
    factors = [min(1.0, clip * (1 - SLACK) / norm(row)) for row in rows]
    return {
        name: sum(f * row[name] for f, row in zip(factors, rows, strict=True)) for name in rows[0]
    }


def middle(model: nn.Module, inputs: Tensor) -> float:
    """A clip norm that clips some examples and not others."""
    return float(np.median([norm(row) for row in gradients(model, inputs)]))


class Attention(nn.Module):
    """A transformer's block of linear layers, norms and torch's attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.split = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.root, self.mixed = nn.RMSNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(self.norm(x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return x + self.mixed(self.root(attended.transpose(1, 2).reshape(x.shape)))


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(CLASSES, 8, padding_idx=1), nn.Linear(8, 8)
        self.out = nn.Linear(8, CLASSES, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.tokens(x.long() % CLASSES)))).mean(1)


class Padding(nn.Module):
    """An embedding of which one row is padding, which autograd leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(7, 6, padding_idx=2), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(x.long())).mean(1))


class Twice(nn.Module):
    """A convolution and a dense layer, each used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.hidden = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2)
        self.out = nn.Linear(2 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.patch(torch.tanh(self.patch(x)))).movedim(1, -1)
        return self.out(self.hidden(torch.tanh(self.hidden(x))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(7, 6), DPLSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.tokens(x.long() % 7))[0][:, -1]


class Adapted(nn.Module):
    """A frozen dense layer with a small trainable one beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Viewing(nn.Module):
    """Views a convolution's output as if its channels came first, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(2, 3, 3), nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.patch(x)).view(-1, 48))


def convolved(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


IMAGE, TOKENS = (4, 7, 6), (6,)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: models.build("linear", (1, 8, 8), CLASSES, {}), (1, 8, 8)),
    "mlp": (lambda: models.build("mlp", (1, 8, 8), CLASSES, {"hidden": 16}), (1, 8, 8)),
    "cnn": (lambda: models.build("cnn", (3, 8, 8), CLASSES, {}), (3, 8, 8)),
    "strided": (lambda: convolved(nn.Conv2d(4, 3, (3, 2), stride=(2, 1))), IMAGE),
    "padded": (lambda: convolved(nn.Conv2d(4, 3, 3, padding=(2, 1))), IMAGE),
    "same": (lambda: convolved(nn.Conv2d(4, 3, (3, 5), padding="same")), IMAGE),
    "dilated": (lambda: convolved(nn.Conv2d(4, 16, 2, dilation=(3, 2))), IMAGE),
    "grouped": (lambda: convolved(nn.Conv2d(4, 6, 3, groups=2, padding=1)), IMAGE),
    "depthwise": (lambda: convolved(nn.Conv2d(4, 4, 3, groups=4)), IMAGE),
    "unbiased": (lambda: convolved(nn.Conv2d(4, 9, 3, bias=False)), IMAGE),
    "one-axis": (
        lambda: convolved(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)),
        (4, 9),
    ),
    "three-axes": (lambda: convolved(nn.Conv3d(2, 3, 2)), (2, 3, 4, 3)),
    "few-places": (lambda: convolved(nn.Conv2d(4, 8, (6, 6))), IMAGE),
    "in-place": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Hardtanh(-3, 3, True),
                              nn.Linear(8, CLASSES)),
        (6,),
    ),
    "group-norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(),
                              nn.LazyLinear(CLASSES)),
        IMAGE,
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(3, 8), Attention(), Attention(), nn.Flatten(),
                              nn.Linear(48, CLASSES)),
        (6, 3),
    ),
    "four-axes": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES)),
        (2, 3, 3),
    ),
    "tied": (Tied, TOKENS),
    "twice": (Twice, (2, 6, 6)),
    "padding": (Padding, TOKENS),
    "recurrent": (Recurrent, TOKENS),
    "adapted": (
        lambda: nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Tanh(), Adapted(nn.Linear(8, CLASSES))),
        (6,),
    ),
    "viewing": (Viewing, (2, 6, 6)),
}  # fmt: skip


def made(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[case]
    torch.manual_seed(3)
    model, inputs = build().to(dtype), (6.9 * torch.rand(COUNT, *shape)).to(dtype)
    model(inputs[:1])  # gives lazy layers their size
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        inputs[0] *= 0.1 if shape is not TOKENS else 1.0
    return model, inputs


@pytest.mark.parametrize("case", CASES)
def test_sum_equals_that_of_hooks_and_microbatches_in_float64(case: str) -> None:
    model, inputs = made(case)
    clip = middle(model, inputs)
    expected = microbatches(model, inputs, clip)
    found = add("book-keeping", model, inputs, clip)
    assert distance(found, expected) < 1e-10 * norm(expected)
    if case != "in-place":  # changes in place are beyond Opacus
        assert distance(found, add("opacus-hooks", model, inputs, clip)) < 1e-10 * norm(expected)
    # the bound above can fail
    assert distance(microbatches(model, inputs, 1.001 * clip), expected) > 1e-6 * norm(expected)


@pytest.mark.parametrize("case", CASES)
def test_sum_equals_that_of_microbatches_in_float32(case: str) -> None:
    model, inputs = made(case, torch.float32)
    clip = middle(model, inputs)
    expected = microbatches(model, inputs, clip)
    assert distance(add("book-keeping", model, inputs, clip), expected) < 1e-5 * norm(expected)


@pytest.fixture(params=[1 << 26, 50])
def as_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors take the way of a GPU's, in one block or in many."""
    monkeypatch.setattr(clipping, "_HOST", "another")
    monkeypatch.setattr(clipping, "_GPU_BLOCK", request.param)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("case", CASES)
def test_way_of_a_gpu_gives_the_sum_of_microbatches(case: str) -> None:
    model, inputs = made(case)
    clip = middle(model, inputs)
    expected = microbatches(model, inputs, clip)
    assert distance(add("book-keeping", model, inputs, clip), expected) < 1e-10 * norm(expected)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("case", CASES)
def test_way_of_a_gpu_sums_each_part_apart(case: str) -> None:
    model, inputs = made(case)
    clip, parts = middle(model, inputs), (slice(0, 3), slice(3, 3), slice(3, COUNT))
    parameters = models.released_parameters(model)
    totals = {n: p.new_zeros((3, *p.shape)).double() for n, p in parameters.items()}
    summer = BookKeepingSum(model, losses, clip)
    summer.add_parts_(totals, parts, inputs, torch.arange(COUNT) % CLASSES)
    rows = [microbatches(model, inputs[:3], clip), None, microbatches(model, inputs, clip)]
    assert distance({n: t[0] for n, t in totals.items()}, rows[0]) < 1e-10 * norm(rows[0])
    assert norm({n: t[1] for n, t in totals.items()}) == 0
    both = {n: t[0] + t[2] for n, t in totals.items()}
    assert distance(both, rows[2]) < 1e-10 * norm(rows[2])


@pytest.mark.parametrize("mode", ["host", "gpu"])
@pytest.mark.parametrize("value", [1.0, math.nan])
@pytest.mark.parametrize("case", CASES)
def test_examples_that_are_not_counted_add_nothing(
    case: str, value: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "gpu":
        monkeypatch.setattr(clipping, "_HOST", "another")
    model, inputs = made(case)
    clip = middle(model, inputs)
    expected = microbatches(model, inputs[:3], clip)
    if CASES[case][1] is not TOKENS:
        inputs[3] *= value
    found = {n: torch.zeros_like(p).double() for n, p in models.released_parameters(model).items()}
    counted = torch.tensor([True, True, True, False])
    summer = BookKeepingSum(model, losses, clip)
    summer.add_(found, inputs, torch.arange(COUNT) % CLASSES, counted)
    assert distance(found, expected) < 1e-10 * norm(expected)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("case", ["grouped", "dilated", "attention", "twice", "one-axis", "cnn"])
def test_keeping_factors_and_forming_gradients_are_one_sum(
    case: str, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = made(case)
    clip = middle(model, inputs)
    expected = microbatches(model, inputs, clip)
    monkeypatch.setattr(products, "keeps_factors", lambda **_: always)
    found = add("book-keeping", model, inputs, clip)
    assert distance(found, expected) < 1e-10 * norm(expected)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A stack of supported layers over images or sequences, and the shape of an input."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    small, parts = st.integers(1, 3), []
    if draw(st.booleans()):
        groups = draw(st.integers(1, 2))
        channels = groups * draw(small)
        shape = (channels, draw(st.integers(6, 8)), draw(st.integers(6, 8)))
        for _ in range(draw(st.integers(1, 2))):
            width = groups * draw(small)
            kernel = (draw(small), draw(small))
            options = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2))}
            convolution = nn.Conv2d(
                channels, width, kernel, groups=groups, bias=draw(st.booleans()), **options
            )
            parts += [convolution, draw(st.sampled_from([nn.Tanh(), nn.GroupNorm(1, width)]))]
            channels = width
    else:
        width, places = draw(small), draw(st.integers(1, 5))
        shape = (places, width)
        for _ in range(draw(st.integers(1, 3))):
            out = 2 * draw(st.integers(1, 4))
            norms = [nn.LayerNorm(out), nn.RMSNorm(out), nn.Tanh(), Attention(out)]
            parts += [nn.Linear(width, out, bias=draw(st.booleans())), draw(st.sampled_from(norms))]
            width = out
    body = nn.Sequential(*parts, nn.Flatten()).double()
    features = body(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    model = nn.Sequential(body, nn.Linear(features, CLASSES, dtype=torch.float64))
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    return model, shape


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(made=stacks())
def test_any_stack_of_layers_gives_the_sum_of_hooks_and_microbatches(
    made: tuple[nn.Module, tuple[int, ...]],
) -> None:
    model, shape = made
    inputs = torch.randn(COUNT, *shape, dtype=torch.float64)
    clip = max(1e-3, middle(model, inputs))
    expected = microbatches(model, inputs, clip)
    scale = norm(expected) + 1e-3 * clip
    for mode in ("opacus-hooks", "opacus-ghost"):
        assert distance(add(mode, model, inputs, clip), expected) < 1e-9 * scale
    assert distance(add("book-keeping", model, inputs, clip), expected) < 1e-10 * scale
    narrow = copy.deepcopy(model).float()
    found, hooks = (add(m, narrow, inputs.float(), clip) for m in ("book-keeping", "opacus-hooks"))
    assert distance(found, hooks) < 1e-4 * scale


def cancelling(size: float, places: int) -> tuple[Tensor, Tensor]:
    """Factors whose products, of about `size`, cancel over the places down to about one."""
    signs = torch.tensor([(-1.0) ** t for t in range(places)])
    signs[-1] = -signs[:-1].sum()
    a = torch.stack([size * signs, torch.ones(places)], 1)
    b = torch.tensor([1.0, 1 + 2.0**-20]).repeat(places, 1)
    return a[None, None], b[None, None]


def _most(a: Tensor, b: Tensor) -> Tensor:
    return (a.double().norm(dim=3) * b.double().norm(dim=3)).sum()


def exact_norm(a: Tensor, b: Tensor, factor: float) -> float:
    """‖f·Σ_t b_t·a_tᵀ‖ in exact arithmetic of the factors given."""
    rows = [[[Fraction(x) for x in row] for row in side[0, 0].tolist()] for side in (a, b)]
    squares = sum(
        sum(y[i] * x[j] for x, y in zip(*rows, strict=True)) ** 2
        for i in range(b.shape[3])
        for j in range(a.shape[3])
    )
    return factor * math.sqrt(squares)


@pytest.mark.parametrize("places", [2, 4, 6, 8])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6, 1e8, 1e12, 1e18])
def test_norm_from_cancelling_factors_is_never_below_the_true_norm(
    size: float, places: int
) -> None:
    a, b = cancelling(size, places)
    share = products.products(torch.zeros(2, 2), a, b, products._gram)
    assert float(share.norms) >= exact_norm(a, b, 1.0) * (1 - 1e-12)
    total = torch.zeros(2, 2, dtype=torch.float64)
    factor = ((1 - SLACK) / share.norms).clamp(max=1)
    share.add_(total[None], factor)
    assert float(total.norm()) <= 1
    assert exact_norm(a, b, float(factor)) <= 1


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e18])
def test_gram_sum_that_rounding_loses_altogether_is_made_up_for(size: float) -> None:
    a, b = cancelling(size, 6)
    share = products.products(torch.zeros(2, 2), a, b, lambda *_: torch.tensor([-1.0]).double())
    assert float(share.norms) >= float(_most(a, b)) / products.GREATEST_CANCELLATION
    assert float(share.norms) >= exact_norm(a, b, 1.0) or size == 1e4


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3])
def test_gram_sum_that_is_off_by_all_its_rounding_is_made_up_for(size: float) -> None:
    a, b = cancelling(size, 6)
    one, other = (side[:, 0].double() for side in (a, b))
    true = exact_norm(a, b, 1.0)
    error = 0.9 * products._gram_error(one, other) * float(_most(a, b)) ** 2
    unlucky = torch.tensor([true**2 - error], dtype=torch.float64)
    share = products.products(torch.zeros(2, 2), a, b, lambda *_: unlucky)
    assert float(unlucky.sqrt()) < true <= float(share.norms)
    assert float(share.norms) == pytest.approx(true, rel=1e-4)


def test_gram_sum_in_float32_would_break_the_bound() -> None:
    """The negative control of the tests above."""
    a, b = cancelling(1e4, 6)
    true = exact_norm(a, b, 1.0)
    narrow = float(products._gram(a[:, 0], b[:, 0]).clamp(min=0).sqrt())
    wide = float(products._gram(a[:, 0].double(), b[:, 0].double()).sqrt())
    assert wide == pytest.approx(true, rel=1e-6)
    assert narrow < 0.9 * true or narrow > 1.1 * true


def test_each_share_adds_no_more_than_it_measured() -> None:
    """Whatever rule: one example's weighted sum has at most the norm that was told."""
    generator = torch.Generator().manual_seed(0)
    for layer, shape in (
        (nn.Linear(40, 3), (1, 6, 40)),
        (nn.Linear(3, 40), (1, 60, 3)),
        (nn.Linear(3, 4), (1, 3)),
        (nn.Conv2d(2, 30, 3), (1, 2, 9, 9)),
        (nn.Conv2d(20, 30, 3), (1, 20, 3, 4)),
        (nn.Conv1d(4, 4, 3, groups=2), (1, 4, 30)),
    ):
        inputs = torch.randn(shape, generator=generator)
        backprops = torch.randn(layer(inputs).shape, generator=generator)
        for share in layers.RULES[type(layer)](layer, [([inputs], backprops)]):
            total = torch.zeros(share.parameter.shape, dtype=torch.float64)
            share.add_(total[None], torch.ones(1, dtype=torch.float64))
            assert float(total.norm()) <= float(share.norms) * (1 + 1e-12)
            assert float(total.norm()) == pytest.approx(float(share.norms), rel=1e-6)


def test_embedding_adds_rows_of_its_tokens_and_no_more() -> None:
    layer = nn.Embedding(50_000, 3, padding_idx=2)
    tokens = torch.tensor([[4, 9, 4, 2], [9, 9, 9, 9]])
    backprops = torch.randn(2, 4, 3)
    (share,) = layers.embedding(layer, [([tokens], backprops)])
    expected = torch.stack([backprops[0, 0] + backprops[0, 2], backprops[0, 1]]).double()
    whole = backprops[1].double().sum(0)
    assert share.norms.tolist() == pytest.approx([float(expected.norm()), float(whole.norm())])
    total = torch.zeros(50_000, 3, dtype=torch.float64)
    share.add_(total[None], torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert total.abs().sum(1).nonzero().flatten().tolist() == [4, 9]
    torch.testing.assert_close(total[[4, 9]], 0.5 * expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", ["twice", "attention", "grouped", "group-norm", "few-places"])
def test_example_that_is_not_finite_adds_nothing_by_any_rule(case: str, value: float) -> None:
    model, inputs = made(case)
    spoilt = inputs.clone()
    spoilt[2].view(-1)[3] = value
    expected = gradients(model, inputs)
    found = add("book-keeping", model, spoilt, 1e9)
    rest = {n: sum(expected[i][n] for i in (0, 1, 3)) for n in found}
    assert distance(found, rest) < 1e-10 * norm(rest)


def test_tokens_of_an_example_that_is_not_finite_add_nothing() -> None:
    layer = nn.Embedding(5, 2)
    backprops = torch.ones(2, 3, 2)
    backprops[1, 2, 0] = math.nan
    (share,) = layers.embedding(layer, [([torch.tensor([[0, 1, 1], [1, 2, 3]])], backprops)])
    assert math.isnan(share.norms[1])
    total = torch.zeros(5, 2, dtype=torch.float64)
    share.add_(total[None], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert total.tolist() == [[1, 1], [2, 2], [0, 0], [0, 0], [0, 0]]


class Counting(nn.Module):
    """Counts passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backwards = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x.register_hook(self._back)
        return x

    def _back(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("kind", [BookKeepingSum, GhostSum])
def test_one_forward_and_one_backward_pass_form_no_gradient_of_a_parameter(kind: type) -> None:
    counting = Counting()
    model = nn.Sequential(nn.Linear(6, 6), counting, nn.Linear(6, CLASSES))
    reached = []
    for parameter in model.parameters():
        parameter.register_hook(reached.append)
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    kind(model, losses, 1.0).add_(sums, torch.rand(3, 6), torch.arange(3))
    assert (counting.forwards, counting.backwards) == (1, 1)
    assert not reached
    assert norm(sums) > 0
    losses(model(torch.rand(3, 6)), torch.arange(3)).sum().backward()
    assert len(reached) == 4  # the hooks do fire


@pytest.mark.parametrize("kind", [BookKeepingSum, GhostSum])
def test_dense_layer_without_a_sequence_forms_gradients_for_its_bias_alone(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed = []
    for module in (shares, bookkeeping):
        monkeypatch.setattr(
            module, "row_norms", lambda rows: formed.append(rows.shape) or rows.norm(2, 1)
        )
    model = nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 70))
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    kind(model, losses, 1.0).add_(sums, torch.rand(3, 60), torch.arange(3))
    assert formed == [(3, 70 + 80)]


def test_rows_of_small_parameters_are_measured_and_added_together() -> None:
    """One product for all, of the very numbers that each rule gives, zeros where one is lost."""
    torch.manual_seed(3)
    small = [Formed(torch.zeros(2, 3), torch.randn(4, 2, 3)), *_bias_of(5), *_bias_of(1)]
    wide = Formed(torch.zeros(NARROW + 1), torch.randn(4, NARROW + 1))
    small[1].rows[2, 0] = torch.nan
    shares = [small[0], wide, *small[1:]]
    parts = (slice(0, 1), slice(1, 4))
    totals = {s.parameter: torch.ones(2, *s.parameter.shape).double() for s in shares}
    bookkeeping._add_clipped_(totals, shares, 40.0, parts)
    norms = torch.stack([share.norms for share in shares]).norm(dim=0)
    for share in shares:
        expected = torch.ones(2, *share.parameter.shape).double()
        for place, part in ((0, 0), (1, 1), (3, 1)):
            factor = min(1.0, 40 * (1 - SLACK) / float(norms[place]))
            expected[part] += factor * share.rows[place].double()
        torch.testing.assert_close(totals[share.parameter], expected, rtol=1e-12, atol=1e-12)


def _bias_of(size: int) -> list[Formed]:
    return [Formed(torch.zeros(size), torch.randn(4, size))]


def test_long_sequences_form_gradients_and_short_ones_keep_factors() -> None:
    assert products.keeps_factors(places=1, inputs=2, outputs=2)
    assert products.keeps_factors(places=8, inputs=128, outputs=128)
    assert not products.keeps_factors(places=128, inputs=128, outputs=128)
    assert not products.keeps_factors(places=121, inputs=288, outputs=64)


def test_no_product_of_factors_is_over_more_places_than_its_rounding_was_bounded_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decision 3: 2¹⁴ places · 2⁻⁵³ · 2¹⁵ · 10,000 examples are 6e-4 of the clip norm."""
    assert products.GREATEST_PLACES * products.UNIT_ROUNDOFF * 2.0**15 * 10_000 < 6.1e-4
    torch.manual_seed(3)
    a, b = torch.randn(9, 1, 4, 3), torch.randn(9, 1, 4, 2)
    factors, parts = torch.rand(9).double(), (slice(0, 4), slice(4, 4), slice(4, 9))
    found, places = [], list[int]()
    monkeypatch.setattr(Tensor, "t", lambda x: (places.append(len(x)), x.T)[1])
    for greatest in (2**14, 10, 1):
        monkeypatch.setattr(products, "GREATEST_PLACES", greatest)
        totals = torch.zeros(3, 2, 3).double()
        products._add_products_(a, b, totals, factors, parts)
        assert max(places) <= max(greatest, 4)  # an example's own are never parted
        places.clear()
        found.append(totals)
    for totals in found:
        torch.testing.assert_close(totals, found[0], rtol=1e-12, atol=1e-12)
    assert float(found[0].norm()) > 0


def test_frozen_layers_are_not_watched() -> None:
    model, _ = made("adapted")
    BookKeepingSum(model, losses, 1.0)
    watched = [name for name, layer in model.named_modules() if layer._forward_hooks]
    assert watched == ["0.down", "0.up", "2.down", "2.up"]


@pytest.mark.parametrize("halves", [False, True])
def test_model_that_views_its_images_is_taken_with_channels_first(halves: bool) -> None:
    model, inputs = made("viewing")
    summer = BookKeepingSum(model, losses, 1.0, halves=halves)
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    assert summer._layout._channels_last
    summer.add_(sums, inputs, torch.arange(COUNT))
    assert not summer._layout._channels_last
    assert model.patch.weight.is_contiguous()


def test_other_errors_of_a_model_are_not_taken_for_its_views() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(9, CLASSES))
    summer = BookKeepingSum(model, losses, 1.0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        summer.add_({}, torch.rand(2, 2, 6, 6), torch.arange(2))
    assert summer._layout._channels_last


class Changing(nn.Module):
    """Changes the input of its layer after the layer read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out = self.layer(hidden)
        hidden.mul_(2.0)
        return out + hidden.sum(1, keepdim=True)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x


class Taking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[0]


class Places(nn.Module):
    """Asks for positions without an axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Embedding(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.places(torch.arange(6)).mean(0))


@pytest.mark.parametrize(
    ("build", "width", "reason"),
    [
        (Changing, 6, r"layer 'layer' \(Linear\) has an input that is changed in place"),
        (Taking, CLASSES, r"layer 'pair' \(Pair\) returns no single tensor"),
        (Places, 6, "6 gradients for 3 examples"),
    ],
)
def test_use_of_a_layer_that_would_be_measured_wrongly_is_refused(
    build: Callable[[], nn.Module], width: int, reason: str
) -> None:
    model = build()
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=reason):
        BookKeepingSum(model, losses, 1.0).add_(sums, torch.rand(3, width), torch.arange(3))


def test_parameter_that_nothing_reaches_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, CLASSES), nn.Identity())
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    with pytest.raises(RuntimeError, match=r"reached spare\.bias, spare\.weight"):
        BookKeepingSum(model, losses, 1.0).add_({}, torch.rand(3, 6), torch.arange(3))


def test_memory_for_rows_is_kept_for_smaller_batches_and_given_back_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 60, CLASSES))
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    summer, inputs = BookKeepingSum(model, losses, 1.0), torch.rand(9, 60, 3)
    found = []
    for count in (4, 9, 2, 9):
        summer.add_(sums, inputs[:count], torch.arange(count) % CLASSES)
        room = products._room(model[0].weight, inputs, (1,)).untyped_storage()
        found.append((room.data_ptr(), room.nbytes()))  # a larger one may have the smaller's place
    assert found[0] != found[1] == found[2] == found[3]
    with pytest.raises(IndexError):
        summer.add_(sums, inputs, torch.full((9,), CLASSES))
    assert not [parameter for parameter in model.parameters() if products._ROOM in vars(parameter)]


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e15])
def test_halves_keep_the_bound_and_stay_near(name: str, size: float) -> None:
    torch.manual_seed(4)
    model, inputs = models.build(name, (1, 12, 12), CLASSES, {}), torch.rand(COUNT, 1, 12, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    clip = middle(model, inputs)
    full = add("book-keeping", model, inputs, clip)

    def halves(weights: float, shown: Tensor) -> Sums:
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in scaled.parameters():
                parameter *= weights
        sums = {n: torch.zeros_like(value) for n, value in full.items()}
        summer = clipped_sum("book-keeping", scaled, losses, clip, "bfloat16")
        summer.add_(sums, shown, torch.arange(len(shown)) % CLASSES)
        return sums

    assert 0 < distance(halves(1.0, inputs), full) < 0.05 * norm(full)
    for row in range(COUNT):
        assert norm(halves(size, inputs[row : row + 1])) <= clip


@pytest.mark.parametrize("mode", ["opacus-hooks", "opacus-ghost"])
def test_halves_are_refused_by_a_mode_that_would_not_know_them(mode: str) -> None:
    with pytest.raises(UsageError, match="bfloat16 needs the mode book-keeping, not opacus"):
        clipped_sum(mode, nn.Linear(3, 2), losses, 1.0, "bfloat16")  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40))
def test_sorting_tells_keys_apart_as_looking_for_the_distinct_ones_does(keys: list[int]) -> None:
    asked = torch.tensor(keys)
    found, places = embeddings._distinct_by_sorting(asked)
    assert torch.equal(found[places], asked)
    distinct = len(set(keys))
    assert sorted(set(keys)) == found[:distinct].tolist()
    assert not found[distinct:].any()
    assert int(places.max()) == distinct - 1
