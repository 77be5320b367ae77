"""Frozen parts: what names them, and features that are computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bract.shared import models
from bract.shared.data import Examples
from bract.shared.errors import UsageError, VerificationFailed
from bract.shared.models import frozen
from bract.shared.models.frozen import TOGETHER, Features, FrozenFront
from bract.shared.terms import DataTerms, ModelTerms

DATA = DataTerms(name="made-up", shape=(6,), classes=3, scale=2.0)
TEXT = DataTerms(name="made-up", shape=(40,), classes=3, vocabulary=50)


class Counting(nn.Module):
    """A frozen front that counts what it was asked."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer, self.shapes = nn.Linear(6, width).requires_grad_(False), []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return torch.tanh(self.layer(x))


class Bag(nn.Module):
    """A sum of embeddings of tokens that are not 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer, self.lengths = nn.Embedding(50, 8).requires_grad_(False), []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return (self.layer(tokens) * (tokens != 0)[..., None]).sum(1)


def fronted(front: nn.Module, width: int = 5, ended: int | None = None) -> FrozenFront:
    return FrozenFront(front, nn.Linear(width, 3), ended=ended)


def made_up(count: int, seed: int = 1) -> Examples:
    inputs = np.random.default_rng(seed).normal(size=(count, 6))
    return Examples(inputs=inputs, targets=np.zeros(count, np.int64))


def texts(count: int) -> Examples:
    generator = np.random.default_rng(2)
    inputs = generator.integers(1, 50, (count, 40))
    for row, length in enumerate(generator.integers(0, 41, count)):
        inputs[row, length:] = 0
    return Examples(inputs=inputs, targets=np.zeros(count, np.int64))


def test_whole_model_and_what_is_behind_the_front_agree_by_name_and_by_value() -> None:
    model, shown = fronted(Counting()), made_up(100)
    found = model.behind()(Features(model, DATA).rows(shown, np.arange(10)))
    torch.testing.assert_close(found, model(torch.from_numpy(shown.inputs[:10] / 2).float()))
    assert models.released_shapes(model) == models.released_shapes(model.behind())
    assert set(models.released_shapes(model)) == {"back.weight", "back.bias"}


def test_front_with_something_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze them"):
        FrozenFront(nn.Linear(2, 2), nn.Linear(2, 2))


def test_features_are_computed_once_for_the_same_inputs_in_batches_of_one_shape() -> None:
    front = Counting()
    features, shown = Features(fronted(front), DATA), made_up(100)
    for rows in (np.arange(10), slice(50, 100), np.array([3])):
        features.rows(shown, rows)
    # the first pass is of zeros: does the front round by the place?
    assert front.shapes == [(TOGETHER, 6)] * 3
    features.rows(made_up(100), slice(0, 5))  # opened again: another object, the same content
    assert len(front.shapes) == 3
    changed = made_up(100)
    changed.inputs[7, 0] += 1
    assert not torch.equal(features.rows(changed, slice(None)), features.rows(shown, slice(None)))


@pytest.mark.parametrize("ended", [None, 0])
def test_features_of_an_example_are_the_same_to_the_last_bit_whoever_is_beside_it(
    ended: int | None,
) -> None:
    model, shown = fronted(Bag(), 8, ended), texts(150)
    whole = Features(model, TEXT).rows(shown, slice(None))
    for row in (0, 63, 64, 149):
        alone = Features(model, TEXT).rows(shown.take(np.array([row])), slice(None))
        assert torch.equal(alone[0], whole[row])


def test_rows_are_cut_to_about_their_own_length_without_effect() -> None:
    cut, full, shown = Bag(), Bag(), texts(150)
    found = Features(fronted(cut, 8, ended=0), TEXT).rows(shown, slice(None))
    expected = Features(fronted(full, 8), TEXT).rows(shown, slice(None))
    torch.testing.assert_close(found, expected)
    assert set(cut.lengths) == {16, 32, 40}
    assert set(full.lengths) == {40}


def test_oldest_features_go_where_there_is_room_for_one_set_alone() -> None:
    front = Counting()
    features = Features(fronted(front), DATA, greatest_bytes=100 * 5 * 4)
    one, other = made_up(100, 1), made_up(100, 2)
    for shown in (one, other, one):
        features.rows(shown, slice(None))
    assert len(front.shapes) == 7
    assert sum(kept.nbytes for kept in features._kept.values()) <= 100 * 5 * 4


def test_features_without_room_are_computed_when_asked_for() -> None:
    front = Counting()
    features, shown = Features(fronted(front), DATA, greatest_bytes=100), made_up(100)
    found = features.rows(shown, np.array([2, 99]))
    assert torch.equal(found, Features(fronted(Counting()), DATA).rows(shown, np.array([2, 99])))
    assert features._kept == {}


def test_no_examples_have_no_features() -> None:
    assert Features(fronted(Counting()), DATA).rows(made_up(0), slice(None)).shape == (0, 5)
    assert Features(fronted(Bag(), 8, 0), TEXT).rows(texts(0), slice(None)).shape == (0, 8)


def test_digest_names_every_frozen_value_its_name_and_its_shape() -> None:
    def layer(*shape: int, value: float = 1.0) -> nn.Module:
        model = nn.Linear(*shape, bias=False).requires_grad_(False)
        nn.init.constant_(model.weight, value)
        return model

    first = frozen.digest(nn.Sequential(layer(2, 3), nn.Linear(3, 1)))
    assert first is not None
    assert len(first) == 64
    same = frozen.digest(nn.Sequential(layer(2, 3), nn.Linear(3, 1)))
    assert same == first  # what is trained is not in it
    others = [
        nn.Sequential(layer(2, 3, value=1.0000001)),
        nn.Sequential(layer(3, 2)),
        nn.Sequential(nn.Identity(), layer(2, 3)),
        nn.Sequential(layer(2, 3), layer(3, 1)),
    ]
    assert len({first, *map(frozen.digest, others)}) == 5
    assert frozen.digest(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["linear", "cnn", "resnet"])
def test_contract_of_a_model_without_frozen_weights_keeps_its_bytes(name: str) -> None:
    terms = models.pinned(ModelTerms(name=name), DATA.model_copy(update={"shape": (1, 8, 8)}))
    assert terms.frozen is None
    assert terms.model_dump(mode="json") == {"name": name, "options": {}}


def test_model_whose_frozen_weights_are_not_those_of_the_terms_is_refused() -> None:
    terms = ModelTerms(name="linear", frozen="0" * 64)
    with pytest.raises(VerificationFailed, match="model 'linear': the frozen weights here"):
        models.of(terms, DATA)
    with pytest.raises(VerificationFailed):
        models.pinned(terms, DATA)


def test_frozen_weights_that_chance_makes_are_not_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = "from torch import nn\ndef made(shape, classes):\n    return nn.Sequential("
    factory += "nn.Linear(6, 4).requires_grad_(False), nn.Linear(4, classes))\n"
    (tmp_path / "chance_models.py").write_text(factory)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="others each time it is built"):
        models.pinned(ModelTerms(name="chance_models:made"), DATA)
