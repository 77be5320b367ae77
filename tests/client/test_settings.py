"""SITE.toml: what is wrong is one line that names the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bract.client import settings
from bract.client.settings import SiteSettings
from bract.shared.errors import UsageError

KEY = "a" * 64


def tables(**changes: Any) -> dict[str, Any]:
    domain = {
        "epsilon": 8.0,
        "delta": 1e-5,
        "data": {"name": "digits", "part": "1/2"},
        **changes.pop("domain", {}),
    }
    keys = {"root_certificate": "ca.pem", "node": "node.pem", "ledger": "ledger.pem",
            **changes.pop("keys", {})}  # fmt: skip
    whole = {
        "site": "alpha",
        "server": "127.0.0.1:8443",
        "device": "cpu",
        "coordinators": [KEY],
        "models": ["linear"],
        "keys": keys,
        "domains": changes.pop("domains", {"ward": domain}),
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "SITE.toml"
    path.write_text(tomli_w.dumps(tables(**changes)))
    return path


def read(folder: Path, **changes: Any) -> SiteSettings:
    return settings.read(written(folder, **changes))


def test_relative_paths_lie_beside_the_file_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site"
    path = written(
        folder,
        state="var/state",
        head_file="../apart/head.json",
        keys={"ledger": "/etc/ledger.pem"},
        domain={"data": {"name": "heart-disease", "part": "va", "folder": "data"}},
    )
    monkeypatch.chdir(tmp_path)
    for named in (path, Path("site/SITE.toml")):
        found = settings.read(named)
        assert found.state == str(folder / "var/state")
        assert Path(found.head_file or "").resolve() == tmp_path / "apart/head.json"
        assert found.keys.root_certificate == str(folder / "ca.pem")
        assert found.keys.ledger == "/etc/ledger.pem"
        assert found.domains["ward"].data.folder == str(folder / "data")


def test_what_is_not_said_has_its_documented_default(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.state == str(tmp_path / "state")
    assert found.head_file is None
    assert found.domains["ward"].data.folder is None
    assert found.mechanisms == ("dp-sgd",)


def test_the_policy_of_the_file_is_the_gates(tmp_path: Path) -> None:
    found = read(tmp_path, min_noise_multiplier=0.7, max_sampling_rate=0.2).policy()
    assert (found.site, found.coordinators, found.models) == ("alpha", (KEY,), ("linear",))
    assert (found.min_noise_multiplier, found.max_sampling_rate) == (0.7, 0.2)
    assert (found.domains["ward"].epsilon, found.domains["ward"].delta) == (8.0, 1e-5)
    # A file that says the same makes the same policy: entries name it by its hash.
    assert (
        read(tmp_path / "other", min_noise_multiplier=0.7, max_sampling_rate=0.2).policy() == found
    )


def test_the_column_that_tells_persons_apart_is_the_sites_own_to_name(tmp_path: Path) -> None:
    found = read(tmp_path, domain={"person_column": "patient"}).policy()
    assert found.domains["ward"].person_column == "patient"
    assert read(tmp_path / "none").policy().domains["ward"].person_column is None


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "at the top": ({"sites": "alpha"}, "did you mean 'site'?"),
    "in a table": ({"keys": {"nodes": "x"}}, "did you mean 'keys.node'?"),
    "in a domain": ({"domain": {"epsilonn": 3}}, "did you mean 'domains.ward.epsilon'?"),
    "in data": (
        {"domain": {"data": {"name": "digits", "part": "1/2", "foldr": "x"}}},
        "did you mean 'domains.ward.data.folder'?",
    ),
    "in a filter": (
        {"domain": {"composition": {"rule": "filter", "ordr": 3}}},
        "did you mean 'domains.ward.composition.filter.order'?",
    ),
    "in a menu": (
        {"domain": {"composition": {"rule": "menu", "class": []}}},
        "did you mean 'domains.ward.composition.menu.classes'?",
    ),
    "in a class of a menu": (
        {"domain": {"composition": {"rule": "menu", "classes": [
            {"sampling_rate": 0.1, "noise_multiplier": 1.0, "max_step": 9}]}}},
        "did you mean 'domains.ward.composition.menu.classes.0.max_steps'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", UNKNOWN)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, where: str) -> None:
    changes, remedy = UNKNOWN[where]
    path = tmp_path / "SITE.toml"
    path.write_text(toml_of(tables(**changes)))
    with pytest.raises(UsageError, match="unknown key") as refused:
        settings.read(path)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def toml_of(value: dict[str, Any]) -> str:
    """Returns a TOML file whose nested tables are written in line."""
    return "\n".join(f"{name} = {inline(one)}" for name, one in value.items()) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {inline(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no port": ({"server": "127.0.0.1"}, "server: must be HOST:PORT, as in 127.0.0.1:8443 (got"),
    "a URL": ({"server": "https://127.0.0.1:8443"}, "server: must be HOST:PORT"),
    "a port too high": ({"server": "localhost:65536"}, "server: must be HOST:PORT"),
    "no coordinator": ({"coordinators": []}, "coordinators: "),
    "half a key": ({"coordinators": ["ab"]}, "coordinators.0: must be 64 hexadecimal digits"),
    "no model": ({"models": []}, "models: "),
    "no noise": ({"mechanisms": ["none"]}, "mechanisms.0: "),
    "sigma 0": ({"min_noise_multiplier": 0.0}, "greater than 0 (got 0.0)"),
    "q over 1": ({"max_sampling_rate": 1.5}, "less than or equal to 1 (got 1.5)"),
    "batch 0": ({"physical_batch": 0}, "greater than or equal to 1 (got 0)"),
    "stop before now": ({"stop_seconds": -1.0}, "greater than or equal to 0 (got -1.0)"),
    "an odd name": ({"site": "alpha beta"}, "@ = + - alone, up to 200 in all (got 'alpha beta')"),
    "another device": ({"device": "tpu"}, "unknown device 'tpu'"),
    "epsilon 0": ({"domain": {"epsilon": 0.0}}, "domains.ward.epsilon: "),
    "epsilon infinite": ({"domain": {"epsilon": float("inf")}}, "finite number"),
    "epsilon not a number": ({"domain": {"epsilon": float("nan")}}, "finite number"),
    "delta 1": ({"domain": {"delta": 1.0}}, "less than 1 (got 1.0)"),
    "no data": ({"domain": {"data": {"name": "digits"}}}, "domains.ward.data.part: "),
    "other data": (
        {"domain": {"data": {"name": "digit", "part": "1/2"}}},
        "did you mean 'digits'?",
    ),
    "an overlap that is not there": (
        {"domain": {"overlaps": ["clinic"]}},
        "domain 'ward' overlaps 'clinic', which is not declared",
    ),
    "a rule that is not there": (
        {"domain": {"composition": {"rule": "sum"}}},
        "domains.ward.composition: ",
    ),
    "no domain": ({"domains": {}}, "domains: "),
    "no key": ({"keys": {"ledger": 3}}, "keys.ledger: "),
    "no site": ({"site": None}, "site: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    changes, said = BAD[case]
    path = tmp_path / "SITE.toml"
    path.write_text(toml_of(tables(**changes)))
    with pytest.raises(UsageError) as refused:
        settings.read(path)
    words = str(refused.value)
    assert said in words
    assert "\n" not in words
    assert "pydantic" not in words
    assert "input_value" not in words


def test_what_is_no_toml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "half.toml").write_text("site = ")
    for name in ("bytes.toml", "half.toml"):
        with pytest.raises(UsageError, match=f"{name} is not TOML"):
            settings.read(tmp_path / name)
    for missing in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot read"):
            settings.read(missing)


@pytest.mark.parametrize("server", ["localhost:1", "hospital.example:65535", "[::1]:8443"])
def test_a_server_is_a_name_or_an_address_with_its_port(tmp_path: Path, server: str) -> None:
    assert read(tmp_path, server=server).server == server


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    expected = settings.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert settings.read(path) == expected
