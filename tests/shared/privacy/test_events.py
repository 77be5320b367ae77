from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import canonical
from bract.shared.errors import VerificationFailed
from bract.shared.privacy.events import Event, PoissonGaussian, Unbounded, decode, encode, merge

RATES = st.floats(0, 1, exclude_min=True)
NOISES = st.floats(0, exclude_min=True, allow_infinity=False)
STEPS = st.builds(
    PoissonGaussian, sampling_rate=RATES, noise_multiplier=NOISES, steps=st.integers(1, 10**7)
)
EVENTS: st.SearchStrategy[Event] = STEPS | st.just(Unbounded())
VALUE = encode(PoissonGaussian(sampling_rate=0.1, noise_multiplier=1.5, steps=3))


@given(EVENTS)
def test_events_survive_the_codec_to_the_last_bit(event: Event) -> None:
    assert decode(canonical.decode(canonical.encode(encode(event)))) == event


@given(STEPS, st.sampled_from(sorted(VALUE)))
def test_an_event_without_one_of_its_keys_is_refused(event: Event, name: str) -> None:
    value = encode(event)
    del value[name]
    with pytest.raises(VerificationFailed):
        decode(value)


@given(EVENTS, st.text().filter(lambda name: name not in VALUE), st.none() | st.integers())
def test_an_event_with_a_further_key_is_refused(event: Event, name: str, more: Any) -> None:
    with pytest.raises(VerificationFailed):
        decode({**encode(event), name: more})


@given(st.floats(0, 1, exclude_min=True))
def test_another_spelling_of_the_same_number_is_refused(rate: float) -> None:
    value = encode(PoissonGaussian(sampling_rate=rate, noise_multiplier=1.5, steps=3))
    text = value["sampling_rate"]
    mantissa, _, exponent = text.partition("p")
    for spelling in (text.upper(), f" {text}", f"+{text}", f"{mantissa}0p{exponent}", repr(rate)):
        assert spelling != text
        with pytest.raises(VerificationFailed):
            decode({**value, "sampling_rate": spelling})


@pytest.mark.parametrize(
    "change",
    [
        {"type": "gaussian"},
        {"type": "dp_accounting.GaussianDpEvent"},
        {"type": "unbounded"},
        {"type": None},
        {"steps": True},
        {"steps": 0},
        {"steps": -1},
        {"steps": 3.0},
        {"steps": "3"},
        {"steps": None},
        {"sampling_rate": 0.1},
        {"sampling_rate": "nan"},
        {"sampling_rate": "inf"},
        {"sampling_rate": "0x0.0p+0"},
        {"sampling_rate": "-0x1.0000000000000p-1"},
        {"sampling_rate": (1.5).hex()},
        {"sampling_rate": "0x1p+99999"},
        {"noise_multiplier": "nan"},
        {"noise_multiplier": "inf"},
        {"noise_multiplier": "-inf"},
        {"noise_multiplier": "0x0.0p+0"},
        {"noise_multiplier": "-0x1.8000000000000p+0"},
        {"noise_multiplier": ""},
        {"noise_multiplier": None},
    ],
)
def test_a_value_that_is_no_event_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(VerificationFailed):
        decode({**VALUE, **change})


@pytest.mark.parametrize("value", [None, [], "unbounded", 1, {}, [VALUE]])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(VerificationFailed):
        decode(value)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [
        (0.0, 1.0, 1),
        (1.0000001, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.1, 0.0, 1),
        (0.1, -1.0, 1),
        (0.1, math.inf, 1),
        (0.1, math.nan, 1),
        (0.1, 1.0, 0),
        (0.1, 1.0, True),
    ],
)
def test_an_event_out_of_range_cannot_be_made(rate: float, noise: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        PoissonGaussian(rate, noise, steps)


@given(st.lists(EVENTS), st.randoms(use_true_random=False))
def test_merging_keeps_every_step_in_any_order(events: list[Event], random: Any) -> None:
    merged = merge(events)
    shuffled = list(events)
    random.shuffle(shuffled)
    assert merge(shuffled) == merged == merge(merged)
    steps = [event.steps for event in events if isinstance(event, PoissonGaussian)]
    assert sum(e.steps for e in merged if isinstance(e, PoissonGaussian)) == sum(steps)
    assert (Unbounded() in merged) == (Unbounded() in events)
    kinds = [(e.sampling_rate, e.noise_multiplier) for e in merged if e != Unbounded()]
    assert len(kinds) == len(set(kinds))
