from __future__ import annotations

import json
import ssl
import stat
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.shared import canonical, keyfiles, keys, node_keys, pki
from bract.shared.reports import schema
from bract.shared.terms import SiteTerms

Bract = Callable[..., Any]


def strict(text: str) -> Any:
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=pytest.fail)


@pytest.fixture
def made(bract: Bract, tmp_path: Path) -> dict[str, Any]:
    """What the four commands printed with --json, in a folder with pki, server, north and erin."""
    reports = {}
    for name, arguments in {
        "coordinator": ["--out", "pki"],
        "server": ["--ca", "pki", "--host", "localhost", "--host", "127.0.0.1", "--out", "server"],
        "site": ["north", "--out", "north", "--domain", "heart", "--nominal-size", "300"],
        "auditor": ["erin", "--ca", "pki", "--out", "erin"],
    }.items():
        done = bract("keys", name, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        reports[name] = strict(done.stdout)
        jsonschema.validate(reports[name], schema(f"keys-{name}"))
    return reports


def test_private_files_are_private_and_nothing_else_is_made(
    made: dict[str, Any], tmp_path: Path
) -> None:
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    public = {"pki/ca.pem", "server/server.pem", "north/node-key.pub", "erin/auditor.pem"}
    private = {
        "pki/ca-key.pem",
        "pki/coordinator.pem",
        "server/server-key.pem",
        "server/witness.pem",
        "north/ledger.pem",
        "north/node-key.pem",
        "erin/auditor-key.pem",
    }
    assert modes == dict.fromkeys(public, 0o644) | dict.fromkeys(private, 0o600)
    named = {v for report in made.values() for k, v in report.items() if k.endswith("_file")}
    assert named == public | private


def test_reports_hold_the_public_halves_of_the_files(made: dict[str, Any], tmp_path: Path) -> None:
    pinned = keys.load(tmp_path / "pki/coordinator.pem").public
    assert made["coordinator"]["coordinator"] == pinned
    assert made["server"]["witness"] == keys.load(tmp_path / "server/witness.pem").public
    assert made["site"]["key"] == keys.load(tmp_path / "north/ledger.pem").public
    node = node_keys.load(tmp_path / "north/node-key.pem").public_key()
    assert made["site"]["node_key"] == node_keys.public_line(node, "north")
    assert (tmp_path / "north/node-key.pub").read_text() == made["site"]["node_key"] + "\n"
    authority, auditor = (
        pki.certificates(tmp_path / file)[0] for file in ("pki/ca.pem", "erin/auditor.pem")
    )
    assert made["coordinator"]["certificate_sha256"] == pki.fingerprint(authority)
    assert made["auditor"]["certificate_sha256"] == pki.fingerprint(auditor)
    assert made["server"]["hosts"] == ["localhost", "127.0.0.1"]


def test_fragments_are_toml_to_paste(made: dict[str, Any], tmp_path: Path) -> None:
    site_toml = tomllib.loads(made["coordinator"]["toml"])
    assert site_toml == {"coordinators": [made["coordinator"]["coordinator"]]}
    # A site's own half follows the coordinator's in one file.
    site_toml = tomllib.loads(made["coordinator"]["toml"] + made["site"]["own_toml"])
    assert site_toml["keys"] == {
        "root_certificate": "ca.pem",
        "node": str(tmp_path / "north/node-key.pem"),
        "ledger": str(tmp_path / "north/ledger.pem"),
    }
    own = tomllib.loads(made["coordinator"]["own_toml"] + made["server"]["toml"])
    assert own["coordinator_key"] == str(tmp_path / "pki/coordinator.pem")
    federation = tomllib.loads(
        "".join(made[name]["toml"] for name in ("server", "site", "auditor"))
    )
    assert federation == {
        "server": {
            "certificate": str(tmp_path / "server/server.pem"),
            "key": str(tmp_path / "server/server-key.pem"),
            "witness_key": str(tmp_path / "server/witness.pem"),
        },
        "sites": [
            {
                "name": "north",
                "key": made["site"]["key"],
                "node_key": made["site"]["node_key"],
                "domain": "heart",
                "nominal_size": 300,
            }
        ],
        "auditors": [{"name": "erin", "certificate_sha256": made["auditor"]["certificate_sha256"]}],
    }


def test_the_certificates_serve_tls(made: dict[str, Any], tmp_path: Path) -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(tmp_path / "server/server.pem", tmp_path / "server/server-key.pem")
    theirs.load_verify_locations(tmp_path / "pki/ca.pem")
    theirs.verify_mode = ssl.CERT_REQUIRED
    ours = ssl.create_default_context(cafile=str(tmp_path / "pki/ca.pem"))
    ours.load_cert_chain(tmp_path / "erin/auditor.pem", tmp_path / "erin/auditor-key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = theirs.wrap_bio(up, down, server_side=True)
    client = ours.wrap_bio(down, up, server_hostname="localhost")
    waiting = [client, server]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    assert waiting == []
    shown = server.getpeercert(binary_form=True)
    assert shown is not None
    assert canonical.sha256(shown) == made["auditor"]["certificate_sha256"]


def test_people_get_the_fragment_on_stdout_and_the_files_on_stderr(bract: Bract) -> None:
    done = bract("keys", "coordinator", "--out", "pki")
    assert set(tomllib.loads(done.stdout)) == {"coordinators"}
    assert done.stderr.splitlines()[:3] == [
        "public  pki/ca.pem",
        "secret  pki/ca-key.pem",
        "secret  pki/coordinator.pem",
    ]
    assert set(tomllib.loads("\n".join(done.stderr.splitlines()[3:]))) == {"coordinator_key"}


def test_what_is_left_to_fill_in_is_marked_and_refused_as_it_stands(bract: Bract) -> None:
    text = bract("keys", "site", "north", "--out", "north").stdout
    assert text.count("# TO FILL IN") == 2
    (site,) = tomllib.loads(text)["sites"]
    terms = {key: site[key] for key in ("name", "key", "domain", "nominal_size")}
    for filled in ({}, {"domain": "heart"}, {"nominal_size": 300}):
        with pytest.raises(ValueError, match=r"domain|nominal_size"):
            SiteTerms.model_validate({**terms, **filled})
    SiteTerms.model_validate({**terms, "domain": "heart", "nominal_size": 300})


def test_a_fragment_survives_an_odd_folder(bract: Bract, made: dict[str, Any]) -> None:
    odd = 'a "b" \\ # \x7f\t é'
    done = bract("keys", "server", "--ca", "pki", "--host", "a", "--out", odd)
    assert done.returncode == 0
    assert Path(tomllib.loads(done.stdout)["server"]["key"]).is_file()


@pytest.mark.parametrize(
    ("command", "there"),
    [
        (["coordinator", "--out", "new"], "coordinator.pem"),
        (["server", "--ca", "pki", "--host", "a", "--out", "new"], "witness.pem"),
        (["site", "north", "--out", "new"], "node-key.pub"),
        (["auditor", "erin", "--ca", "pki", "--out", "new"], "auditor-key.pem"),
    ],
)
def test_where_a_file_exists_nothing_is_written(
    command: list[str], there: str, made: dict[str, Any], bract: Bract, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / there).write_text("old")
    done = bract("keys", *command)
    assert done.returncode == 2
    assert done.stderr == (
        f"bract: new/{there} exists: keys are never overwritten; name another place\n"
    )
    assert done.stdout == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == [there]
    assert (tmp_path / "new" / there).read_text() == "old"


BAD = {
    ("coordinator", "--out", "x", "--days", "0"): "--days 0 must be from 1",
    ("coordinator", "--out", "pki/ca.pem"): "is a file",
    ("coordinator",): "Missing option '--out'",
    ("server", "--ca", "pki", "--out", "x"): "Missing option '--host'",
    ("server", "--ca", "pki", "--host", "a:80", "--out", "x"): "host 'a:80' is neither",
    ("server", "--ca", "none", "--host", "a", "--out", "x"): "cannot read none/ca.pem",
    ("server", "--ca", "pki", "--host", "a", "--out", "x", "--days", "9999"): "would outlive",
    ("auditor", "erin", "--ca", "server", "--out", "x"): "cannot read server/ca.pem",
    ("auditor", "erin smith", "--ca", "pki", "--out", "x"): "NAME 'erin smith' must be",
    ("auditor", "e" * 65, "--ca", "pki", "--out", "x"): "1 to 64 characters",
    ("site", "no rth", "--out", "x"): "NAME 'no rth' must be",
    ("site", 'a"\n', "--out", "x"): "must be 1 to 200 letters",
    ("site", "a" * 201, "--out", "x"): "must be 1 to 200 letters",
    ("site", "north", "--out", "x", "--domain", ""): "--domain '' must be",
    ("site", "north", "--out", "x", "--nominal-size", "0"): "--nominal-size 0 must be at least 1",
    ("show", "none.pem"): "cannot read none.pem: No such file",
    ("show", "pki"): "cannot read pki: Is a directory",
    ("show", "pki/ca.pem", "text"): "text is neither a certificate nor a key",
    ("show", "half.pem"): "half.pem holds no readable certificate",
}


def test_bad_input_is_one_clear_line_and_leaves_nothing(
    made: dict[str, Any], bract: Bract, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "half.pem").write_bytes((tmp_path / "pki/ca.pem").read_bytes()[:200])
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in BAD.items():
        done = bract("keys", *arguments, "--json")
        assert done.returncode == 2, arguments
        assert message in strict(done.stdout)["error"]["message"]
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_show_says_what_each_file_is_and_no_secret(
    made: dict[str, Any], bract: Bract, tmp_path: Path
) -> None:
    paths = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    done = bract("keys", "show", *paths, "--json")
    assert done.returncode == 0
    report = strict(done.stdout)
    jsonschema.validate(report, schema("keys-show"))
    found = {(file["path"], file["kind"]): file for file in report["files"]}
    assert {(path, kind) for path, kind in found} == {
        ("pki/ca.pem", "certificate"),
        ("pki/ca-key.pem", "certificate key"),
        ("pki/coordinator.pem", "signing key"),
        ("server/server.pem", "certificate"),
        ("server/server-key.pem", "certificate key"),
        ("server/witness.pem", "signing key"),
        ("north/ledger.pem", "signing key"),
        ("north/node-key.pem", "node key"),
        ("north/node-key.pub", "node public key"),
        ("erin/auditor.pem", "certificate"),
        ("erin/auditor-key.pem", "certificate key"),
    }
    assert (
        found["pki/coordinator.pem", "signing key"]["public"]
        == (made["coordinator"]["coordinator"])
    )
    assert found["north/node-key.pub", "node public key"]["public"] == made["site"]["node_key"]
    assert found["north/node-key.pem", "node key"]["public"] == (
        made["site"]["node_key"].removesuffix(" north")
    )
    leaf = next(file for file in report["files"] if file["path"] == "server/server.pem")
    assert leaf["hosts"] == ["localhost", "127.0.0.1"]
    assert leaf["days_left"] == 364
    assert not leaf["expired"]
    assert leaf["sha256"] == made["server"]["certificate_sha256"]
    assert leaf["public"] == found["server/server-key.pem", "certificate key"]["public"]
    assert not any(file["warnings"] for file in report["files"])
    printed = done.stdout + bract("keys", "show", *paths).stdout
    for path in paths:
        text = (tmp_path / path).read_text()
        if "PRIVATE" in text:
            assert not any(line in printed for line in text.splitlines()[1:-1])


def test_show_says_in_words_that_a_certificate_has_expired(bract: Bract, tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(days=5, hours=1)
    authority = pki.new_authority(now=before)
    for days, name in ((2, "old"), (9, "new")):
        pem = pki.issue_server(authority, ["a"], days=days, now=before).certificate_pem()
        keyfiles.create([keyfiles.public(tmp_path / f"{name}.pem", pem)])
    done = bract("keys", "show", "new.pem", "old.pem")
    assert done.returncode == 1
    assert "EXPIRED 3 days ago" in done.stdout
    assert "3 days left" in done.stdout
    assert done.stderr.startswith("bract: old.pem expired")
    told = bract("keys", "show", "old.pem", "--json")
    assert told.returncode == 1
    assert [file["expired"] for file in strict(told.stdout)["files"]] == [True, False]
    assert strict(told.stdout)["files"][0]["days_left"] == -4
    assert bract("keys", "show", "new.pem").returncode == 0


def test_show_warns_of_a_private_key_that_others_may_open(
    made: dict[str, Any], bract: Bract, tmp_path: Path
) -> None:
    for path in ("pki/ca-key.pem", "north/ledger.pem", "north/node-key.pem"):
        for mode in (0o640, 0o604, 0o620):
            (tmp_path / path).chmod(mode)
            done = bract("keys", "show", path)
            assert done.returncode == 0
            assert f"mode {mode:04o} opens it to others: chmod 600 {path}" in done.stdout
        (tmp_path / path).chmod(0o400)
        assert "warning" not in bract("keys", "show", path).stdout


def test_show_names_a_certificate_that_is_not_valid_yet(bract: Bract, tmp_path: Path) -> None:
    pem = pki.new_authority(now=datetime.now(UTC) + timedelta(days=2)).certificate_pem()
    keyfiles.create([keyfiles.public(tmp_path / "ca.pem", pem)])
    assert "warning    not valid yet" in bract("keys", "show", "ca.pem").stdout


def test_a_file_of_certificate_and_key_is_shown_as_both(
    made: dict[str, Any], bract: Bract, tmp_path: Path
) -> None:
    both = b"".join(
        (tmp_path / "server" / n).read_bytes() for n in ("server-key.pem", "server.pem")
    )
    (tmp_path / "both.pem").write_bytes(both)
    (tmp_path / "both.pem").chmod(0o644)
    files = strict(bract("keys", "show", "both.pem", "--json").stdout)["files"]
    assert [file["kind"] for file in files] == ["certificate", "certificate", "certificate key"]
    assert files[-1]["warnings"]
