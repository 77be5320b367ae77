"""FEDERATION.toml: what is wrong is one line, and the contract is what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bract.shared import federation, keys, node_keys
from bract.shared.errors import UsageError
from bract.shared.federation import Federation
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import accounting, entries, events
from bract.shared.privacy.orders import best_order

NODE_KEYS = [node_keys.public_line(node_keys.new().public_key()) for _ in range(2)]
SITE_KEYS = [keys.generate().public for _ in range(2)]


def sites(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "key": SITE_KEYS[place],
            "node_key": NODE_KEYS[place],
            "domain": "ward",
            "nominal_size": 100,
            **change,
        }
        for place, (name, change) in enumerate(
            zip(("alpha", "beta"), changes or ({}, {}), strict=True)
        )
    ]


def tables(**changes: Any) -> dict[str, Any]:
    nested: dict[str, dict[str, Any]] = {
        "server": {
            "listen": "127.0.0.1:8443",
            "certificate": "server.pem",
            "key": "server-key.pem",
            "witness_key": "witness.pem",
            "out": "run",
        },
        "model": {"name": "linear"},
        "data": {"name": "digits"},
        "training": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {"epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "batch": 10.0},
    }
    whole: dict[str, Any] = {"run": "trial", "coordinator_key": "coordinator.pem", "rounds": 3}
    for name in list(nested):
        nested[name] |= changes.pop(name, {})
    whole |= {**nested, "sites": sites(), **changes}
    return whole


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "FEDERATION.toml"
    path.write_text(tomli_w.dumps(tables(**changes)))
    return path


def read(folder: Path, **changes: Any) -> Federation:
    return federation.read(written(folder, **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("coordinator", "witness"):
        keys.save(keys.generate(), tmp_path / f"{name}.pem")
    return tmp_path


def test_relative_paths_lie_beside_the_file_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "coordinator"
    absolute = str(tmp_path / "elsewhere")
    path = written(folder, server={"state": absolute, "public_data": "../public"})
    monkeypatch.chdir(tmp_path)
    for named in (path, Path("coordinator/FEDERATION.toml")):
        found = federation.read(named)
        assert found.coordinator_key == str(folder / "coordinator.pem")
        assert found.contract == str(folder / "contract.json")
        assert found.server.out == str(folder / "run")
        assert found.server.state == absolute
        assert found.server.witness_key == str(folder / "witness.pem")
        assert Path(found.server.public_data or "").resolve() == tmp_path / "public"
    assert read(folder).server.public_data is None


UNKNOWN = {
    "at the top": ({"round": 3}, "did you mean 'rounds'?"),
    "in the server": ({"server": {"listn": "x"}}, "did you mean 'server.listen'?"),
    "in the deadlines": ({"deadlines": {"gathr": 3}}, "did you mean 'deadlines.gather'?"),
    "in the privacy": ({"privacy": {"epsilonn": 3}}, "did you mean 'privacy.epsilon'?"),
    "in a site": (
        {"sites": sites({}, {"nominal_sise": 3})},
        "did you mean 'sites.1.nominal_size'?",
    ),
}


@pytest.mark.parametrize("where", UNKNOWN)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, where: str) -> None:
    changes, remedy = UNKNOWN[where]
    with pytest.raises(UsageError, match="unknown key") as refused:
        read(tmp_path, **changes)
    assert remedy in str(refused.value)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rounds": ({"rounds": 0}, "rounds: Input should be greater than or equal to 1 (got 0)"),
    "more spare attempts than a contract has": (
        {"spare_attempts": 1_000_001},
        "spare_attempts: Input should be less than or equal to 1000000",
    ),
    "a cohort of none": ({"minimum_cohort": 0}, "minimum_cohort: "),
    "a cohort over the sites": ({"minimum_cohort": 3}, "minimum_cohort 3 is over the 2 sites"),
    "an odd run": ({"run": "a run"}, "run: "),
    "a seed below 0": ({"init_seed": -1}, "init_seed: "),
    "no site": ({"sites": []}, "sites: "),
    "a size of 0": ({"sites": sites({}, {"nominal_size": 0})}, "sites.1.nominal_size: "),
    "half a key": ({"sites": sites({"key": "ab"}, {})}, "sites.0.key: "),
    "no node key": (
        {"sites": sites({}, {"node_key": "ssh-rsa AAAA"})},
        "sites.1.node_key: node key must be one line that begins with ecdsa-sha2-nistp384",
    ),
    "half a node key": (
        {"sites": sites({}, {"node_key": NODE_KEYS[0][:60]})},
        "sites.1.node_key: node key holds no readable",
    ),
    "two sites of one name": (
        {"sites": sites({}, {"name": "alpha"})},
        "two sites have the name 'alpha'",
    ),
    "two sites of one key": (
        {"sites": sites({}, {"key": SITE_KEYS[0]})},
        f"two sites have the key '{SITE_KEYS[0][:60]}'",
    ),
    "two sites of one node": (
        {"sites": sites({}, {"node_key": NODE_KEYS[0]})},
        "two sites have the node_key",
    ),
    "two sites of one node under two comments": (
        {"sites": sites({}, {"node_key": f"{NODE_KEYS[0]} beta@hospital"})},
        "two sites have the node_key",
    ),
    "no host": ({"server": {"listen": ":8443"}}, "server.listen: must be HOST:PORT"),
    "no port": ({"server": {"listen": "localhost"}}, "server.listen: must be HOST:PORT"),
    "a port in words": ({"server": {"listen": "localhost:https"}}, "must be HOST:PORT"),
    "a port too high": ({"server": {"listen": "localhost:65536"}}, "must be HOST:PORT"),
    "a port below 0": ({"server": {"listen": "localhost:-1"}}, "must be HOST:PORT"),
    "a reply of nothing": ({"server": {"greatest_reply_mib": 0}}, "greatest_reply_mib: "),
    "no patience": ({"deadlines": {"round": 0.0}}, "deadlines.round: "),
    "epsilon 0": ({"privacy": {"epsilon": 0.0}}, "privacy.epsilon: "),
    "epsilon infinite": ({"privacy": {"epsilon": float("inf")}}, "privacy.epsilon: "),
    "delta 1": ({"privacy": {"delta": 1.0}}, "privacy.delta: "),
    "a clip norm of 0": ({"privacy": {"clip_norm": 0.0}}, "privacy.clip_norm: "),
    "momentum 1": ({"training": {"momentum": 1.0}}, "training.momentum: "),
    "no step": ({"training": {"local_steps": 0}}, "training.local_steps: "),
    "scale 0": ({"data": {"scale": 0.0}}, "data.scale: "),
    "half a fingerprint": (
        {"auditors": [{"name": "eve", "certificate_sha256": "ab"}]},
        "auditors.0.certificate_sha256: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    changes, said = BAD[case]
    with pytest.raises(UsageError) as refused:
        read(tmp_path, **changes)
    words = str(refused.value)
    assert said in words
    assert words.startswith(str(tmp_path / "FEDERATION.toml"))
    assert "\n" not in words


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:8443", "127.0.0.1", 8443),
        ("192.0.2.1:0", "192.0.2.1", 0),
        ("[::1]:8443", "::1", 8443),
        ("coordinator.example:443", "coordinator.example", 443),
    ],
)
def test_listen_is_a_host_and_a_port(tmp_path: Path, listen: str, host: str, port: int) -> None:
    server = read(tmp_path, server={"listen": listen}).server
    assert (server.host, server.port) == (host, port)


# The contract


def test_the_contract_is_what_the_file_says_and_the_coordinator_signs_it(folder: Path) -> None:
    chosen = read(folder, spare_attempts=4, data={"offset": 1.0}, training={"server_momentum": 0.5})
    signed = federation.propose(chosen)
    agreed = signed.verify(keys.load(folder / "coordinator.pem").public)
    assert agreed.witness == keys.load(folder / "witness.pem").public
    assert (agreed.run, agreed.rounds, agreed.max_attempts) == ("trial", 3, 7)
    assert (agreed.simulation, agreed.privacy.randomness) == (False, "csprng")
    assert (agreed.privacy.sampling_rate, agreed.privacy.clip_norm) == (0.1, 1.0)
    assert (agreed.data.offset, agreed.data.scale) == (1.0, 16.0)
    assert agreed.training == chosen.training
    listed = [(s.name, s.key, s.domain, s.nominal_size) for s in agreed.cohort]
    assert listed == [(s.name, s.key, s.domain, s.nominal_size) for s in chosen.sites]
    assert federation.propose(chosen).contract.sha256 != agreed.sha256  # another run


def test_sigma_is_calibrated_to_every_attempt_that_the_contract_allows(folder: Path) -> None:
    agreed = federation.propose(read(folder)).contract
    event = events.decode(entries.event_for(agreed))
    spent = accounting.epsilon([event] * agreed.max_attempts, 1e-5)
    assert 1.95 < spent <= 2.0
    given = federation.propose(read(folder, privacy={"noise_multiplier": 3.5})).contract
    assert given.privacy.noise_multiplier == 3.5
    with pytest.raises(UsageError, match=r"privacy\.noise_multiplier.*0\.1"):
        read(folder, privacy={"noise_multiplier": 0.01})  # whose ε takes gigabytes to be told
    with pytest.raises(UsageError, match=r"privacy\.noise_multiplier.*100000 \(got 1e\+300\)"):
        read(folder, privacy={"noise_multiplier": 1e300})
    for noise, range_ in ((0.001, r"0\.001 must be 0\.1 or more"), (1e300, "100000")):
        with pytest.raises(UsageError, match=rf"evaluation\.noise_multiplier.*{range_}"):
            read(folder, evaluation={"every": 1, "noise_multiplier": noise})


def test_a_ceiling_raises_sigma_until_the_sites_filter_admits_the_whole_run(folder: Path) -> None:
    free = federation.propose(read(folder)).contract
    tied = federation.propose(read(folder, privacy={"ceiling": 2.0})).contract
    assert tied.privacy.noise_multiplier > free.privacy.noise_multiplier
    event = events.decode(entries.event_for(tied))
    order = best_order(2.0, 1e-5)
    whole = [event] * tied.max_attempts
    limit = DomainPolicy(epsilon=2.0, delta=1e-5)
    assert accounting.fits(whole, limit=limit.epsilon, delta=limit.delta, order=order)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"batch": 101.0}}, "privacy.batch 101 is over the mean nominal size 100"),
        ({"privacy": {"delta": 0.01}}, "below 1/100"),
        ({"data": {"name": "digit"}}, "did you mean 'digits'?"),
        ({"server": {"public_data": "nowhere"}}, "no data folder"),
        ({"coordinator_key": "nowhere.pem"}, "no key at"),
        ({"server": {"witness_key": "nowhere.pem"}}, "no key at"),
        ({"server": {"witness_key": "FEDERATION.toml"}}, "holds no readable private key"),
        ({"privacy": {"epsilon": 1e-12}}, "no noise multiplier"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_no_contract_can_be_made_of_is_said(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    chosen = read(folder, **changes)
    with pytest.raises(UsageError) as refused:
        federation.propose(chosen)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
