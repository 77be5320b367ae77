"""Norms of rows: never below what they are of, and each by itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.client.training import clipping
from bract.client.training.clipping import NARROW, SLACK, clip_factors, row_norms

WIDTHS = [1, NARROW, NARROW + 1, 4096, 5000]


def true_norms(rows: torch.Tensor) -> list[float]:
    return [math.hypot(*row) for row in rows.double().tolist()]


@settings(deadline=None, max_examples=40)
@given(
    width=st.sampled_from(WIDTHS),
    sizes=st.lists(st.floats(-44, 37), min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    seed=st.integers(0, 1 << 20),
)
def test_norm_is_not_below_the_true_one_by_a_hundredth_of_the_slack(
    width: int, sizes: list[float], spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor(sizes)[:, None] - spread * torch.rand(
        (len(sizes), width), generator=generator
    )
    rows = (10.0 ** powers.double()).float() * torch.randn(
        (len(sizes), width), generator=generator
    ).clamp(-5, 5)
    norms = row_norms(rows)
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx(true_norms(rows), rel=SLACK / 100, abs=0)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-22, 1e22, 1e38])
def test_squares_that_float32_loses_are_made_up_for(size: float) -> None:
    rows = torch.full((3, 4096), size)
    by_runs = clipping._norms_by_runs(rows).tolist()
    assert by_runs != pytest.approx(
        true_norms(rows), rel=SLACK, abs=0
    )  # past what the slack covers
    assert row_norms(rows).tolist() == pytest.approx(true_norms(rows), rel=1e-6, abs=0)


def test_row_is_measured_the_same_whatever_lies_beside_it() -> None:
    torch.manual_seed(0)
    rows = torch.randn(40, 5000)
    others = torch.tensor([torch.nan, torch.inf, 1e30, 1e-30, 0.0])
    alone = torch.cat([row_norms(row[None]) for row in rows])
    for count in (1, 2, 3, 7, 16, 40):
        assert torch.equal(row_norms(rows[:count]), alone[:count])
        beside = torch.cat([others[:, None].expand(5, 5000), rows[:count]])
        assert torch.equal(row_norms(beside)[5:], alone[:count])


def test_row_that_is_not_finite_has_the_factor_zero_and_the_others_keep_theirs() -> None:
    rows = torch.ones(4, 4096)
    rows[0, 5], rows[1, 7], rows[2, 4095] = torch.nan, torch.inf, -torch.inf
    assert clip_factors(row_norms(rows), 64.0).tolist() == pytest.approx([0, 0, 0, 1 - SLACK])


PARTS = [clipping.WHOLE, [slice(0, 7)], [slice(0, 2), slice(2, 2), slice(2, 5), slice(5, 7)]]


@pytest.mark.parametrize("width", [1, NARROW, 5000, 1 << 14, 70_000])
@pytest.mark.parametrize("dropped", [[], [1], [0, 5, 6], range(7)], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=["whole", "one", "many"])
def test_sums_are_of_what_is_kept_in_float64(
    width: int, dropped: list[int], parts: list[slice]
) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn((7, width), generator=generator)
    rows[0] *= 1e8  # beside it float32 would lose the others
    factors = torch.rand(7, generator=generator, dtype=torch.float64)
    kept = [place for place in range(7) if place not in dropped]
    expected = []
    for part in parts:
        some = [place for place in range(7)[part] if place in kept]
        expected.append((factors[some, None] * rows[some].double()).sum(0))
    factors[list(dropped)] = 0.0
    rows[list(dropped)] = torch.nan  # why it was dropped
    found = clipping.weighted_sums(factors, rows, parts)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("at_once", [1 << 10, 1 << 30])
def test_sums_do_not_follow_how_much_is_near(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, factors = torch.randn(5, 20_000), torch.rand(5, dtype=torch.float64)
    expected = clipping.weighted_sum(factors, rows)
    monkeypatch.setattr(clipping, "_NEAR", at_once)
    assert torch.equal(clipping.weighted_sum(factors, rows), expected)
