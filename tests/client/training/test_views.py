"""Views of one example: clipped once, whatever the mode, and drawn from the attempt's stream."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from bract.client.training.execution import Execution
from bract.client.training.gradients import Mode, clipped_sum
from bract.client.training.randomness import RandomStream
from bract.client.training.trainer import Trainer
from bract.client.training.views import Moves, Viewed, draw, mean_loss, moved
from bract.shared import models, tasks
from bract.shared.errors import ModelRejected
from bract.shared.terms import DataTerms, ModelTerms, TrainingTerms

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
LOSS = mean_loss(partial(tasks.losses, task="classes"))
TWO_MODES: list[Mode] = ["book-keeping", "opacus-hooks"]


def terms(**changes: Any) -> TrainingTerms:
    return TrainingTerms(
        **{"local_steps": 2, "learning_rate": 0.5, "views": 4, "augmentation": "shift", **changes}
    )


def network(seed: int, gain: float = 1.5) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("cnn", (1, 8, 8), 10, {"width": 3, "hidden": 5, "init_gain": gain})


def summed(mode: Mode, model: nn.Module, inputs: Tensor, clip: float) -> list[Tensor]:
    whole = Viewed(model)
    parameters = models.released_parameters(whole)
    sums = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in parameters.items()}
    targets = torch.arange(len(inputs)) % 10
    clipped_sum(mode, whole, LOSS, clip).add_(sums, inputs, targets)
    return list(sums.values())


def norm(values: list[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def reference(model: nn.Module, inputs: Tensor) -> list[list[Tensor]]:
    """Each example's gradient, by plain autograd in float64."""
    model = model.double()
    return [
        list(
            torch.autograd.grad(
                LOSS(Viewed(model)(inputs[row : row + 1].double()), torch.tensor([row % 10])).sum(),
                list(model.parameters()),
            )
        )
        for row in range(len(inputs))
    ]


@pytest.mark.parametrize("mode", TWO_MODES)
@given(
    seed=st.integers(0, 1000),
    count=st.sampled_from([1, 2, 5]),
    clip=st.floats(1e-3, 10),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
@settings(max_examples=25, deadline=None)
def test_an_example_with_all_its_views_never_adds_more_than_the_clip_norm(
    mode: Mode, seed: int, count: int, clip: float, scale: float
) -> None:
    inputs = scale * torch.randn(1, count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert norm(summed(mode, network(seed, gain=3.0), inputs, clip)) <= clip


@pytest.mark.parametrize("mode", TWO_MODES)
def test_equal_views_that_are_not_averaged_would_pass_the_bound(mode: Mode) -> None:
    """A negative control: on the axis of the examples, views would be clipped one by one."""
    drawn = torch.randn(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    inputs = 5 * drawn.expand(1, 6, 1, 8, 8).contiguous()
    one = norm(summed(mode, network(1), inputs, 0.01))
    apart = norm(summed(mode, network(1), inputs.transpose(0, 1), 0.01))
    assert one <= 0.01 < apart


@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_the_sum_is_that_of_clipped_gradients_of_the_mean_over_views(
    mode: Mode, clip: float
) -> None:
    inputs = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = summed(mode, network(0), inputs, clip)
    rows = reference(network(0), inputs)
    factors = [min(1.0, clip * (1 - 1e-3) / norm(row)) for row in rows]
    expected = [
        sum(f * row[place] for f, row in zip(factors, rows, strict=True))
        for place in range(len(found))
    ]
    far = norm([one - other for one, other in zip(found, expected, strict=True)])
    assert far <= 1e-5 * norm(expected)  # type: ignore[arg-type]


def test_book_keeping_and_hooks_give_one_update(world: Any) -> None:
    updates = []
    for mode in TWO_MODES:
        agreed = world.contract(model=ModelTerms(name="cnn"), training=terms())
        trainer = Trainer(agreed, Execution(mode=mode, physical_batch=16))
        made_up = np.random.default_rng(4)
        weights = {
            name: 0.3 * made_up.standard_normal(shape).astype(np.float32)
            for name, shape in trainer.shapes.items()
        }
        update = trainer.train(
            terms=agreed.cohort[0],
            examples=world.examples(),
            weights=weights,
            stream=RandomStream(bytes(32)),
        )
        updates.append(update.arrays)
    for name, one in updates[0].items():
        np.testing.assert_allclose(one, updates[1][name], atol=1e-5)


class Viewing(nn.Module):
    """Views a convolution's output as if its channels came first, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(1, 3, 3), nn.Linear(108, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.patch(x)).view(-1, 108))


def test_views_of_a_model_that_views_its_images_are_taken() -> None:
    torch.manual_seed(3)
    model, inputs = Viewing(), torch.randn(2, 3, 1, 8, 8)
    found = [summed(mode, copy.deepcopy(model), inputs, 0.5) for mode in TWO_MODES]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_ghost_norms_refuse_views_before_anything_is_charged(world: Any) -> None:
    agreed = world.contract(model=ModelTerms(name="cnn"), training=terms())
    with pytest.raises(ModelRejected, match="used twice: use the mode opacus-hooks"):
        Trainer(agreed, Execution(mode="opacus-ghost"))


def test_without_augmentation_nothing_is_drawn() -> None:
    stream = RandomStream(bytes(32))
    plain = TrainingTerms(local_steps=1, learning_rate=1.0)
    assert draw(plain, (1, 8, 8), 5, stream) is None
    np.testing.assert_array_equal(stream.words(4), RandomStream(bytes(32)).words(4))


def test_terms_without_views_keep_their_bytes() -> None:
    plain = TrainingTerms(local_steps=1, learning_rate=1.0)
    assert "views" not in plain.model_dump(mode="json")
    assert "augmentation" not in plain.model_dump(mode="json")
    assert terms().model_dump(mode="json")["views"] == 4
    assert TrainingTerms(**terms().model_dump(mode="json")) == terms()


def test_moves_reach_an_eighth_of_each_side_and_all_of_it() -> None:
    moves = draw(terms(augmentation="shift-flip"), (3, 32, 16), 500, RandomStream(bytes(32)))
    assert moves is not None
    assert set(moves.down.flatten()) == set(range(-4, 5))
    assert set(moves.right.flatten()) == {-2, -1, 0, 1, 2}
    assert moves.down.shape == (500, 4)
    assert 0.45 < moves.mirrored.mean() < 0.55
    shifted = draw(terms(), (3, 32, 16), 500, RandomStream(bytes(32)))
    assert shifted is not None
    assert not shifted.mirrored.any()


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -1), (-3, 3)])
def test_a_moved_image_has_zeros_where_nothing_came_in(
    down: int, right: int, mirrored: bool
) -> None:
    image = np.arange(1, 2 * 6 * 5 + 1, dtype=np.uint8).reshape(1, 2, 6, 5)
    moves = Moves(np.array([[down]]), np.array([[right]]), np.array([[mirrored]]))
    expected = np.zeros_like(image[0])
    for row in range(6):
        for column in range(5):
            if 0 <= row + down < 6 and 0 <= column + right < 5:
                expected[:, row + down, column + right] = image[0, :, row, column]
    if mirrored:
        expected = expected[..., ::-1]
    found = moved(image, moves)
    assert (found.shape, found.dtype) == ((1, 1, 2, 6, 5), np.uint8)
    np.testing.assert_array_equal(found[0, 0], expected)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_smaller_pieces_see_the_same_views(world: Any, size: int) -> None:
    agreed = world.contract(training=terms(augmentation="shift-flip"))
    found = []
    for pieces in (size, 256):
        trainer = Trainer(agreed, Execution(physical_batch=pieces * 4))
        weights = {n: np.full(s, 0.01, np.float32) for n, s in trainer.shapes.items()}
        update = trainer.train(
            terms=agreed.cohort[0],
            examples=world.examples(),
            weights=weights,
            stream=RandomStream(bytes(32)),
        )
        found.append(update.arrays)
    for name, one in found[0].items():
        np.testing.assert_allclose(one, found[1][name], atol=1e-6)


def test_views_of_what_is_no_image_are_refused(world: Any) -> None:
    data = DataTerms(name="arrays", shape=(13,), classes=2)
    with pytest.raises(ValidationError, match="augmentation 'shift' is for images"):
        world.contract(data=data, training=terms())
    with pytest.raises(ValidationError, match="views 4 would be equal: set augmentation"):
        terms(augmentation="none")
