"""The register gives each canary a coordinate of its own, beside any of our models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bract.client.training import admission
from bract.client.training.gradients import clipped_sum
from bract.shared import models, tasks
from bract.shared.data import describe, load, load_part
from bract.shared.errors import UsageError
from bract.shared.models.frozen import FrozenFront
from bract.shared.terms import DataTerms, ModelTerms
from bract.simulations.audits import beside, gradients, register

VALUES = DataTerms(name="made-up", shape=(3,), classes=1, task="value")
TOKENS = DataTerms(name="made-up", shape=(6,), classes=2, vocabulary=11)
NEXT = DataTerms(name="made-up", shape=(6,), classes=11, vocabulary=11, task="next-token")
IMAGES = DataTerms(name="made-up", shape=(1, 8, 8), classes=10, offset=2.0, scale=3.0)
MODELS = [
    (IMAGES, ModelTerms(name="cnn", options={"width": 4, "hidden": 8})),
    (IMAGES, ModelTerms(name="linear")),
    (IMAGES, ModelTerms(name="fronted")),
    (VALUES, ModelTerms(name="mlp", options={"hidden": 4})),
    (TOKENS, ModelTerms(name="transformer", options={"width": 8, "layers": 1})),
    (NEXT, ModelTerms(name="lstm", options={"hidden": 8})),
]


def fronted(shape: tuple[int, ...], classes: int) -> nn.Module:
    front = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh()).requires_grad_(False)
    first = front[1]
    assert isinstance(first, nn.Linear)
    first.weight.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) / 8)
    first.bias.zero_()
    return FrozenFront(front, nn.Linear(16, classes))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "fronted", fronted)


def audited_part(model: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(model, FrozenFront):
        front, back = model.front, model.back
        assert isinstance(front, beside.NumberedFront)
        assert isinstance(back, beside.RegisteredBack)
        return lambda inputs: back.model(front.front(inputs))
    assert isinstance(model, beside.Registered)
    return model.model


def data(base: DataTerms, **options: int) -> DataTerms:
    given = {"canaries": 12, "void": 5, "sites": 1, "seed": 3, **options}
    return register.data_terms(base, made_up=True, **given)


@pytest.mark.parametrize(("base", "audited"), MODELS, ids=lambda x: x.name)
def test_a_canarys_clipped_gradient_lies_in_its_own_coordinate(
    base: DataTerms, audited: ModelTerms
) -> None:
    terms = data(base)
    model = models.of(register.model_terms(audited, base, rows=17, strength=1e4), terms)
    admission.admit(model, data=terms, name="beside")
    held = load_part(terms, None, "0")
    inside = register.included(3, 0, 12)
    parameters = models.released_parameters(model)
    summer = clipped_sum(
        "book-keeping", model, lambda out, y: tasks.losses(out, y, base.task), clip_norm=0.5
    )
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    summer.add_(sums, tasks.inputs_of(held.inputs, terms), tasks.targets_of(held.targets, terms))
    found = -sums[register.bank_of(sums)][:, 0].numpy()
    np.testing.assert_allclose(found[:12], 0.5 * (1 - 1e-3) * inside, atol=1e-4)
    assert not found[12:].any()


@pytest.mark.parametrize(("base", "audited"), MODELS, ids=lambda x: x.name)
def test_plain_autograd_gives_the_sums_of_the_private_step(
    base: DataTerms, audited: ModelTerms
) -> None:
    terms = data(base)
    register_terms = register.model_terms(audited, base, rows=17, strength=0.7)
    held, weights = load_part(terms, None, "0"), gradients.start(register_terms, terms)
    model = models.of(register_terms, terms)
    parameters = models.released_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    summer = clipped_sum(
        "book-keeping", model, lambda out, y: tasks.losses(out, y, base.task), clip_norm=0.5
    )
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    summer.add_(sums, tasks.inputs_of(held.inputs, terms), tasks.targets_of(held.targets, terms))
    expected = gradients.clipped_sums(register_terms, terms, weights, held, 0.5)
    for name, value in sums.items():
        np.testing.assert_allclose(value.numpy() / 0.5, expected[name], atol=2e-5)


@pytest.mark.parametrize(("base", "audited"), MODELS, ids=lambda x: x.name)
def test_the_audited_model_answers_as_it_does_alone(base: DataTerms, audited: ModelTerms) -> None:
    terms = data(base)
    model = models.of(register.model_terms(audited, base, rows=17, strength=1e4), terms).eval()
    raw = register.data(base=base.model_dump_json(), canaries=12, made_up=True).examples(None, 0)
    held = load_part(terms, None, "0")
    alone = audited_part(model)(tasks.inputs_of(raw.inputs, base))
    together = model(tasks.inputs_of(held.inputs, terms))
    torch.testing.assert_close(together[:, -alone.shape[1] :], alone, atol=1e-5, rtol=1e-4)


def test_an_example_without_a_canary_has_no_gradient_at_all() -> None:
    terms = data(IMAGES)
    model = register.model_terms(ModelTerms(name="linear"), IMAGES, rows=17, strength=1e4)
    blank = load_part(terms, None, "1")
    sums = gradients.clipped_sums(model, terms, gradients.start(model, terms), blank, 1.0)
    assert not any(value.any() for value in sums.values())


def test_every_site_has_as_many_examples_whatever_the_coins_said() -> None:
    base = describe("digits")
    terms = register.data_terms(base, canaries=40, void=9, sites=2, seed=5, made_up=False)
    assert [len(load_part(terms, None, str(site))) for site in range(3)] == [40, 40, 40]
    assert len(load(terms, None).train) == 120
    one, other = register.included(5, 0, 40), register.included(5, 1, 40)
    assert 5 < one.sum() < 35
    assert (one != other).any()


def test_numbers_that_name_no_canary_fall_on_the_row_that_is_never_trained() -> None:
    odd = torch.tensor([[-1.0], [17.0], [np.nan], [np.inf], [1e9], [4.2]])
    found = beside.numbers_in(odd, IMAGES, 17)
    assert found[:, 0].tolist() == [17, 17, 17, 17, 17, 4]


def test_an_unknown_model_is_named() -> None:
    terms = register.model_terms(ModelTerms(name="cn"), IMAGES, rows=3, strength=1.0)
    with pytest.raises(UsageError, match="unknown model 'cn'"):
        models.of(terms, data(IMAGES))
