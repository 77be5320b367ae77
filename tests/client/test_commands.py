"""`bract client`: what does not fit together is one line before anything is connected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.client import installed, service
from bract.shared import keys, logs, pki
from bract.shared.privacy import contents
from bract.shared.reports import schema
from bract.simulations.federations.loopback import Layout

Bract = Callable[..., Any]


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logs, "begin", lambda form: None)
    monkeypatch.setattr(service, "_serve", None)  # nothing here may get as far as to connect
    installed.opened.cache_clear()
    yield
    installed.opened.cache_clear()


def site_file(layout: Layout, name: str) -> Path:
    return layout.site("alpha").parent / name


def without(name: str) -> Callable[[Layout], None]:
    return lambda layout: site_file(layout, name).unlink()


def holding(name: str, data: Callable[[], bytes]) -> Callable[[Layout], None]:
    return lambda layout: site_file(layout, name).write_bytes(data()) and None


def replaced(old: str, new: str) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        text = layout.site("alpha").read_text()
        assert text.count(old) == 1, old
        layout.site("alpha").write_text(text.replace(old, new))

    return change


BAD: dict[str, tuple[Callable[[Layout], Any], str]] = {
    "no settings": (without("SITE.toml"), "cannot read"),
    "no ledger key": (without("ledger.pem"), "no key at"),
    "no key in the file": (holding("ledger.pem", lambda: b"x"), "holds no readable private key"),
    "a certificate's key for the ledger": (
        holding("ledger.pem", lambda: pki.issue_server(pki.new_authority(), ["x"]).key_pem()),
        "an Ed25519 key is needed",
    ),
    "no node key": (without("node-key.pem"), "node-key.pem"),
    "the ledger's key for the node": (
        holding("node-key.pem", lambda: keys.to_pem(keys.generate())),
        "holds no node key",
    ),
    "no root certificate": (without("ca.pem"), "copy ca.pem from the coordinator"),
    "no certificate in the file": (holding("ca.pem", lambda: b"\xff"), "copy ca.pem"),
    "an unknown key": (replaced("device =", "devise ="), "did you mean 'device'?"),
    "an unknown device": (replaced('device = "cpu"', 'device = "tpu"'), "unknown device 'tpu'"),
    "a file for the state": (holding("state", lambda: b"in the way"), "correct state"),
    "no head file in the file": (holding("head.json", lambda: b"x"), "no readable head file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_serve_is_one_line_and_bad_usage(
    layout: Layout, bract: Bract, case: str
) -> None:
    spoil, said = BAD[case]
    spoil(layout)
    done = bract("client", str(layout.site("alpha")), "--json")
    assert done.returncode == 2
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("error"))
    assert said in value["error"]["message"]
    assert done.stdout.count("\n") == done.stderr.count("\n") == 1
    assert "unexpected" not in done.stderr


@pytest.mark.parametrize("name", ["updates", "fingerprints"])
def test_a_file_in_the_way_is_named_with_the_systems_own_words(
    layout: Layout, bract_process: Bract, name: str
) -> None:
    site_file(layout, "state").mkdir()
    site_file(layout, f"state/{name}").write_bytes(b"in the way")
    done = bract_process("client", str(layout.site("alpha")), "--log-format", "json", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)["error"]["message"]
    assert said == f"cannot use {site_file(layout, f'state/{name}')}: File exists"
    told = json.loads(done.stderr.splitlines()[-1])  # the log's last line too, in its form
    assert (told["level"], told["event"], told["message"]) == ("error", "ended", said)


def test_a_ledger_signed_by_another_key_is_one_line_and_a_failure(
    world: Any, layout: Layout, bract: Bract
) -> None:
    site = installed.opened(str(layout.site("alpha")))
    site.gate.recover("alpha", None)
    site.gate.ledger.close()
    installed.opened.cache_clear()
    before = contents.read(layout.ledger("alpha")).rows
    site_file(layout, "ledger.pem").write_bytes(keys.to_pem(keys.generate()))
    done = bract("client", str(layout.site("alpha")))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "another key than the pinned" in done.stderr
    assert contents.read(layout.ledger("alpha")).rows == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("delta = 1e-05", "delta = 1e-06", "the ledger fixed delta 1e-05, the policy says 1e-06"),
        ("epsilon = 8.0", 'epsilon = 8.0\ncomposition = {rule = "filter", order = 3}', "rule"),
    ],
    ids=["delta", "order"],
)
def test_a_policy_on_other_terms_than_its_ledger_ends_before_it_connects(
    layout: Layout, bract: Bract, old: str, new: str, said: str
) -> None:
    site = installed.opened(str(layout.site("alpha")))
    site.gate.recover("alpha", None)  # a first entry
    site.gate.ledger.close()
    installed.opened.cache_clear()
    replaced(old, new)(layout)
    done = bract("client", str(layout.site("alpha")))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert "put it back" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere.toml",), "cannot read nowhere.toml"),
        ((".",), "cannot read ."),
        (("nowhere.toml", "--status"), "cannot read nowhere.toml"),
        (("nowhere.toml", "--check", "x.json"), "cannot read nowhere.toml"),
        (("nowhere.toml", "--recover", "ward"), "cannot read nowhere.toml"),
        (("nowhere.toml", "--status", "--check", "x.json"), "asked one at a time"),
        ((), "Missing argument"),
        (("nowhere.toml", "--checks"), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_bad_usage_is_one_line(bract: Bract, words: tuple[str, ...], said: str) -> None:
    done = bract("client", *words, "--json")
    assert done.returncode == 2
    assert said in json.loads(done.stdout)["error"]["message"]
    assert done.stderr.count("\n") == 1


def test_a_contract_that_cannot_be_read_is_one_line(layout: Layout, bract: Bract) -> None:
    site = str(layout.site("alpha"))
    missing = bract("client", site, "--check", "nowhere.json")
    assert (missing.returncode, "cannot read the contract" in missing.stderr) == (2, True)
    broken = bract("client", site, "--check", site)
    assert (broken.returncode, "SITE.toml is not canonical JSON" in broken.stderr) == (1, True)
