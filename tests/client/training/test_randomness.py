"""The stream of words, samples and normals, and that nothing at a site can seed it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from bract.client.training import randomness
from bract.client.training.randomness import RandomStream, SecureRandomness
from bract.shared.errors import UsageError

ROOT = Path(__file__).parents[3]
KEYS = [bytes([value]) * 32 for value in (0, 7, 255)]


class Words(RandomStream):
    """A stream whose words are given."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(32))
        self._given, self._place = np.array(words, dtype=np.uint64), 0

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        part = self._given[self._place : self._place + count]
        assert len(part) == count
        self._place += count
        return part

    _passing = words


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        RandomStream(bytes(length))


def test_words_are_the_key_stream_of_aes_256_in_counter_mode() -> None:
    cipher = Cipher(algorithms.AES256(KEYS[1]), modes.ECB()).encryptor()  # noqa: S305  a block at a time, to compare
    blocks = b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(3))
    stream = RandomStream(KEYS[1])
    words = np.concatenate([stream.words(1), stream.words(5)])
    assert words.tobytes() == blocks


def moments_hold(values: npt.NDArray[np.float64]) -> bool:
    """Whether values pass for standard normals: KS, and four moments within five deviations."""
    n = len(values)
    z = [
        values.mean() * n**0.5,
        (np.square(values).mean() - 1) * (n / 2) ** 0.5,
        (values**3).mean() * (n / 15) ** 0.5,
        ((values**4).mean() - 3) * (n / 96) ** 0.5,
    ]
    return bool(np.abs(z).max() < 5 and stats.kstest(values, "norm").pvalue > 1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_normals_are_standard_normals(key: bytes) -> None:
    values = RandomStream(key).normals(200_000)
    assert moments_hold(values)
    for wrong in (0.98 * values, values + 0.02, np.clip(values, -2.5, 2.5), np.abs(values)):
        assert not moments_hold(wrong)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / len(values) ** 0.5


SMALLEST, GREATEST, QUARTER, HALF = 0, 2**63 - 1, 2**61, 2**62


def test_tails_reach_past_those_of_24_bit_uniforms() -> None:
    far, _, near, _ = Words(SMALLEST, 0, 2**39, 0).normals(4)
    assert far == pytest.approx(9.419, abs=1e-3)  # √(−2·ln 2⁻⁶⁴): the least uniform is not 0
    assert near == pytest.approx((-2 * np.log(2.0**-24)) ** 0.5)
    assert far > 8 > 5.9 > near
    flat = Words(GREATEST, 12345, 2**63, 12345).normals(4)
    assert np.abs(flat).max() < 1e-7  # a uniform of 1: in the middle, and no NaN


def test_second_word_of_a_pair_is_the_angle() -> None:
    radius = (-2 * np.log(0.25)) ** 0.5
    for word, cosine, sine in (
        (0, 1, 0),
        (QUARTER, 0.5**0.5, 0.5**0.5),
        (HALF, 0, 1),
        (2**64 - HALF, 0, -1),
        (2**63, -1, 0),
    ):
        pair = Words(QUARTER, word).normals(2)
        np.testing.assert_allclose(pair, [radius * cosine, radius * sine], atol=1e-15)
        np.testing.assert_array_equal(pair, Words(2**64 - QUARTER, word).normals(2))


def test_each_bit_of_a_radius_of_53_and_an_angle_of_53_counts() -> None:
    base = Words(QUARTER + 2**20, 2**60).normals(2)
    for words in ((QUARTER + 2**20 + 2**9, 2**60), (QUARTER + 2**20, 2**60 + 2**9)):
        assert (Words(*words).normals(2) != base).any()


def test_tails_have_the_mass_of_a_normal() -> None:
    """Exactly, from words whose uniforms lie evenly in the last 2⁻³² of the radius."""
    count = 20_000
    words = np.empty(2 * count, dtype=np.uint64)
    words[0::2] = (np.arange(count) + 0.5) * 2.0**31 / count
    words[1::2] = np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64)
    values = Words(*words.tolist()).normals(2 * count).reshape(-1, 2)
    # given u < 2⁻³², the radius squared is exponential past 2·32·ln 2
    excess = np.square(values).sum(1) / 2 - 32 * np.log(2)
    assert stats.kstest(excess, "expon").statistic < 1e-4
    assert stats.kstest(0.999 * excess, "expon").statistic > 3e-4


@pytest.mark.parametrize("count", [0, 1, 2, 7, 32_768, 32_770, 100_001])
def test_normals_turned_elsewhere_are_of_the_same_words(count: int) -> None:
    """As a GPU does it, whose own module of tests asks it."""
    here, there = RandomStream(KEYS[1]), RandomStream(KEYS[1])
    for _ in range(2):
        found = there.normals_on(count, torch.device("cpu")).numpy()
        np.testing.assert_allclose(found, here.normals(count), rtol=1e-13, atol=1e-14)
    assert (here.words(4) == there.words(4)).all()


def test_device_that_turns_words_otherwise_gives_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = randomness._box_muller_on
    randomness.check_turning.cache_clear()
    monkeypatch.setattr(randomness, "_box_muller_on", lambda words: 0.9 * honest(words))
    with pytest.raises(UsageError, match="other normals of the same words"):
        RandomStream(KEYS[1]).normals_on(4, torch.device("cpu"))
    monkeypatch.undo()
    assert len(RandomStream(KEYS[1]).normals_on(4, torch.device("cpu"))) == 4


def test_host_turns_words_where_a_gpu_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(words: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    here, there = RandomStream(KEYS[1]), RandomStream(KEYS[1])
    there.normals_on(2, torch.device("cpu"))
    here.normals(2)
    monkeypatch.setattr(randomness, "_box_muller_on", short)
    found = there.normals_on(70_001, torch.device("cpu")).numpy()
    np.testing.assert_allclose(found, here.normals(70_001), rtol=1e-13, atol=1e-14)
    assert (here.words(4) == there.words(4)).all()


@pytest.mark.parametrize("extreme", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_extreme_words_turn_into_the_same_normals_elsewhere(extreme: int) -> None:
    words = np.array([extreme, 2**60, 12345, extreme], dtype=np.uint64)
    expected = np.empty(4)
    randomness._box_muller(words.view("<i8"), expected)
    found = randomness._box_muller_on(torch.from_numpy(words.view("<i8"))).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("count", [1, 2, 7, 32_768, 32_769, 70_001])
def test_normals_do_not_depend_on_how_many_are_drawn_at_once(count: int) -> None:
    whole = RandomStream(KEYS[1]).normals(80_000)
    np.testing.assert_array_equal(RandomStream(KEYS[1]).normals(count), whole[:count])
    stream = RandomStream(KEYS[1])
    parts = [stream.normals(part) for part in (2, 32_768, 10)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:32_780])


def test_normals_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    one = RandomStream(KEYS[1]).normals(100_000)
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(RandomStream(KEYS[1]).normals(100_000), one)
    finally:
        torch.set_num_threads(threads)


def test_sample_takes_a_word_below_the_rate_and_no_other() -> None:
    quarter = 1 << 62
    stream = Words(*3 * (0, quarter - (1 << 11), quarter, 2**64 - 1))
    assert stream.poisson_sample(4, 0.25).tolist() == [0, 1]
    assert stream.poisson_sample(4, 1.0).tolist() == [0, 1, 2, 3]
    assert stream.poisson_sample(4, 2.0**-53).tolist() == [0]


def inclusions(rate: float, *, population: int = 40, draws: int = 4000) -> np.ndarray:
    stream = RandomStream(KEYS[1])
    taken = np.zeros((draws, population))
    for row in taken:
        row[stream.poisson_sample(population, rate)] = 1
    return taken


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_each_example_is_in_with_the_rate_and_on_its_own(rate: float) -> None:
    taken = inclusions(rate)
    draws, population = taken.shape
    deviation = (rate * (1 - rate) / draws) ** 0.5
    assert np.abs(taken.mean(0) - rate).max() < 5 * deviation
    overall = abs(taken.mean() - rate) / deviation * population**0.5
    wrong = abs(taken.mean() - 1.2 * rate) / deviation * population**0.5
    assert overall < 5 < wrong
    correlation = np.corrcoef(taken.T) - np.eye(population)
    assert np.abs(correlation).max() < 5.5 / draws**0.5
    sizes = taken.sum(1)
    variance = population * rate * (1 - rate)
    assert sizes.var() == pytest.approx(variance, rel=0.2)


def test_shuffled_batches_would_not_pass_for_poisson() -> None:
    generator = np.random.default_rng(1)
    taken = np.zeros((4000, 40))
    for row in taken:
        row[generator.permutation(40)[:12]] = 1
    assert taken.sum(1).var() == 0
    assert (np.corrcoef(taken.T) - np.eye(40)).mean() < -0.02


def test_empty_population_and_no_normals_are_fine() -> None:
    stream = RandomStream(KEYS[0])
    assert len(stream.poisson_sample(0, 0.5)) == 0
    assert len(stream.normals(0)) == 0


def test_secure_streams_differ_even_for_one_round() -> None:
    randomness = SecureRandomness()
    streams = [randomness.stream(number).words(4).tobytes() for number in (1, 1, 2)]
    assert len(set(streams)) == 3
    assert randomness.kind == "csprng"


def seeds(source: str) -> list[str]:
    """Every way by which a source file could fix randomness: names and arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = {
            ast.Attribute: lambda n: [n.attr],
            ast.Name: lambda n: [n.id],
            ast.arg: lambda n: [n.arg],
            ast.keyword: lambda n: [n.arg or ""],
        }.get(type(node), lambda _: [])(node)
        found += [name for name in names if "seed" in name.lower() or name in _GENERATORS]
    return sorted(found)


_GENERATORS = {"default_rng", "RandomState", "Random", "Generator", "set_rng_state", "fork_rng"}


def test_client_has_no_seed_but_that_of_the_made_up_examples() -> None:
    assert seeds("def f(seed): np.random.default_rng(seed)") == ["default_rng", "seed", "seed"]
    found = {
        str(path.relative_to(ROOT)): seeds(path.read_text())
        for path in sorted((ROOT / "client").rglob("*.py"))
    }
    assert len(found) > 10
    used = {path: names for path, names in found.items() if names}
    assert used == {"client/training/admission.py": 3 * ["Generator"] + 3 * ["manual_seed"]}


def test_only_the_stream_draws_in_the_private_step() -> None:
    """No torch or numpy sampler lies beside it."""
    for path in (ROOT / "client").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and path.name != "admission.py":
                drawn = node.attr in {
                    "randn",
                    "rand",
                    "normal",
                    "normal_",
                    "randint",
                    "permutation",
                }
                assert not drawn, path
